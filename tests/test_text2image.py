"""Text-to-image: all stages on a tiny Stable Diffusion that diffusers wrote."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import use_two_devices
from PIL import Image

from dtrak_jax import data, models, pipeline, planning, training
from dtrak_jax.config import (
    AttributionConfig,
    BaseConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    LoRAConfig,
    ModelConfig,
    QueriesConfig,
    SampleConfig,
    TrainConfig,
)
from dtrak_jax.encoding import encode
from dtrak_jax.encoding.adapted import posterior_view
from dtrak_jax.models import lora
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.lora_files import write_peft
from dtrak_jax.planning import programs
from dtrak_jax.run import Run

GOLDEN = Path(__file__).with_name("goldens") / "stable_diffusion.npz"
HANDS = {"ada": (200, 40, 40), "ben": (40, 60, 200)}


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Two of the devices: small work needs not be cut in eight."""
    with pytest.MonkeyPatch.context() as patch:
        use_two_devices(patch)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("base")
    for name, content in np.load(GOLDEN).items():
        if name.startswith("file/"):
            path = folder / name.removeprefix("file/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.tobytes())
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of captioned pictures by two hands."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for i in range(20):
        hand = list(HANDS)[i % 2]
        pixels = rng.normal(HANDS[hand], 20, (8, 8, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append([f"{i}.png", f"by {hand}", hand])
    write_csv(folder / "all.csv", rows)
    write_csv(folder / "gaps.csv", [[*rows[0][:1], "", "ada"], *rows[1:]])
    return folder


def write_csv(path, rows):
    with path.open("w") as file:
        csv.writer(file).writerows([["file", "caption", "contributor"], *rows])


def config_of(base, pictures, **changes):
    sections = {
        "data": DataConfig(
            source="folder",
            name=str(pictures),
            csv="all.csv",
            groups=("contributor",),
            train=16,
            validation=4,
            flip=True,
        ),
        "base": BaseConfig(folder=str(base), batch_size=2),
        "lora": LoRAConfig(rank=2, dropout=0.1),
        "train": TrainConfig(
            steps=6, batch_size=4, learning_rate=1e-2, caption_dropout=0.1
        ),
        "sample": SampleConfig(count=4, steps=2, batch_size=2, guidance=3.0),
        "features": FeaturesConfig(
            measurements=("loss",),
            timesteps=(100, 500),
            projection="none",
            batch_size=2,
        ),
        "attribution": AttributionConfig(methods=("trak", "pixel-cosine")),
    }
    return Config(**sections | changes)


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    """A run up to its report."""
    workdir = tmp_path_factory.mktemp("run")
    return pipeline.run("run", config_of(base, pictures), workdir)


def test_latents_are_those_of_each_picture(run):
    """Of the mirrored one, too; and an embedding is that of each caption."""
    parts, params = models.from_stable_diffusion(run.space.folder)
    images = run.splits.train.images
    moments, vae = run.space.training_examples, {"params": params["vae"]}
    encode_images = jax.jit(lambda x: parts.vae.apply(vae, x, method="encode"))
    scale = parts.vae.config.scaling_factor
    for variant, x in enumerate((images, images[:, :, ::-1])):
        mean, log_variance = encode_images(x)
        for key, expected in (("mean", mean), ("std", np.exp(log_variance / 2))):
            np.testing.assert_allclose(
                moments[key][:, variant], expected * scale, rtol=1e-4, atol=1e-6
            )
    np.testing.assert_array_equal(run.space.x("train"), moments["mean"][:, 0])
    captions = run.splits.train.captions.tolist()
    ids = parts.tokenizer(captions)
    expected = parts.text.apply({"params": params["text"]}, ids).last
    context = run.space.cond("train")
    assert len(context.table) == 3  # two captions, and none
    np.testing.assert_allclose(context[:], expected, atol=1e-6)


def test_a_step_sees_a_sample_of_the_posterior(run):
    """Of the picture or of its mirror image, and a share of the captions left out."""
    moments = {k: jnp.asarray(v[0]) for k, v in run.space.training_examples.items()}
    moments["std"] = jnp.full_like(moments["std"], 0.1)
    view, context = posterior_view(0.25), run.space.cond("train")[0]
    keys = jax.random.split(jax.random.key(0), 4000)
    x, seen = jax.vmap(view, (0, None, None))(
        keys, (moments, context), run.space.frozen
    )
    x, seen, mean = np.asarray(x), np.asarray(seen), np.asarray(moments["mean"])
    np.testing.assert_allclose(x.mean(axis=0), mean.mean(axis=0), atol=0.02)
    mirrored = np.square(x[:, None] - mean).sum((2, 3, 4)).argmin(axis=1)
    assert abs(mirrored.mean() - 0.5) < 0.04
    deviations = x - mean[mirrored]
    assert abs(np.std(deviations) - 0.1) < 0.002
    empty = np.all(seen == run.space.frozen["empty"], axis=(1, 2))
    assert abs(empty.mean() - 0.25) < 0.03
    np.testing.assert_array_equal(
        seen[~empty], np.broadcast_to(context, seen.shape)[~empty]
    )


def test_features_are_gradients_of_the_adapters(run):
    """Of training images and of generated ones; the base is no part of them."""
    parts, params = models.from_stable_diffusion(run.space.folder)
    scales = lora.scales_of(run.config.lora, params["unet"])
    adapters, task = run.params(), run.task()
    names = [f"{path} {side}" for path in adapters for side in ("down", "up")]
    assert len(names) == len(jax.tree.leaves(adapters))

    @jax.jit
    def gradient(x, context, pair, words):
        t = jnp.asarray(task.pairs)[pair, :1]
        eps = task.eps(pair, words, 0, x.shape)

        def loss(adapters):
            noised = task.schedule.add_noise(x[None], eps[None], t)
            with lora.adapting(adapters, scales):
                inputs = {"params": params["unet"]}, noised, t, context[None]
                prediction = parts.unet.apply(*inputs)
            return jnp.mean((prediction[0] - eps) ** 2)

        return jnp.concatenate(
            [leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(adapters))]
        )

    for name in ("train", "generated"):
        x, context = run.space.x(name), run.space.cond(name)
        features = np.asarray(run.features(name, "loss"))
        for i in (0, len(x) - 1):
            for pair in range(2):
                expected = gradient(x[i], context[i], pair, np.zeros(2, np.uint32))
                scale = np.abs(expected).max()
                np.testing.assert_allclose(
                    features[pair, i], expected, rtol=0, atol=2e-5 * scale
                )


def test_generated_pictures_are_decoded_latents(run):
    """Each depends on its seed and on its prompt alone; prompts come in blocks."""
    generated = run.generated
    assert generated.captions.tolist() == 2 * ["by ada"] + 2 * ["by ben"]
    latents = run.generate(run.params(), run.seeds[2:3])
    pixels = data.to_pixels(run.space.decode(latents))
    np.testing.assert_array_equal(pixels, data.to_pixels(generated.images[2:3]))
    x, _ = encode.moments(run, generated.images)
    np.testing.assert_allclose(x[:, 0], run.space.x("generated"), atol=1e-5)
    # The baseline of similar pictures is of latents, as in the paper.
    query, train = (
        rows.reshape(len(rows), -1)
        / np.linalg.norm(rows.reshape(len(rows), -1), axis=1)[:, None]
        for rows in (x[:, 0], run.space.x("train"))
    )
    scores = run.scores("pixel-cosine", "generated").scores
    np.testing.assert_allclose(scores, query @ train.T, atol=1e-5)


def test_encoding_calls_what_is_planned(run, tmp_path, monkeypatch):
    """As often, with arrays of the planned shapes; and it writes as many bytes."""
    sample = dataclasses.replace(run.config.sample, count=0)
    config = dataclasses.replace(run.config, sample=sample)
    (step,) = programs.encode(Run(config, None), planning.find(None))
    ((program, count),) = step.calls
    batches, real = [], encode.encode_function

    def counted(vae, mesh):
        assert real(vae, mesh) is program.function
        return lambda params, x: batches.append(x.shape) or real(vae, mesh)(params, x)

    monkeypatch.setattr(encode, "encode_function", counted)
    done = pipeline.run("encode", config, tmp_path)
    assert batches == [program.arguments[1].shape] * count
    latents = done.space.training_examples, {"x": done.space.x("validation")}
    sizes = [sum(leaf.nbytes for leaf in part.values()) for part in latents]
    assert step.stored == sizes[0] + 2 * sizes[1]


def test_nothing_is_encoded_twice(run, monkeypatch):
    """A finished run computes nothing; a lost file alone is made again.

    Only the pictures of that file are in memory.
    """
    (lost,) = (run.workdir / "encoded" / "validation").glob("0*.npz")
    before = dict(np.load(lost))
    lost.unlink()
    encoded, real = [], encode.moments

    def count(run, images, *arguments):
        encoded.append(len(images))
        return real(run, images, *arguments)

    monkeypatch.setattr(encode, "moments", count)
    for _ in range(2):
        again = pipeline.run("encode", run.config, run.workdir)
        assert "images" not in vars(again.splits.validation)
    assert encoded == [4]
    after = dict(np.load(lost))
    assert before.keys() == after.keys()
    np.testing.assert_array_equal(after["mean"], before["mean"])


def test_adapters_that_another_program_made_are_attributed(run, tmp_path):
    """Those that the run exported, in two layouts, and the pictures that it generated
    give its own features and scores."""
    folder = tmp_path / "queries"
    folder.mkdir()
    with (folder / "prompts.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["file", "prompt"])
        for i, prompt in enumerate(run.generated.captions):
            name = f"{i:05d}.png"
            shutil.copy(run.workdir / "samples" / name, folder)
            table.writerow([name, prompt])
    config = dataclasses.replace(
        run.config,
        lora=LoRAConfig(file=str(run.workdir / "adapters" / "peft")),
        queries=QueriesConfig(folder=str(folder), csv="prompts.csv"),
    )
    given = pipeline.run("attribute", config, tmp_path / "given")
    assert not (tmp_path / "given" / "checkpoints").exists()
    for queries in ("validation", "generated"):
        scores, own = (r.scores("trak", queries).scores for r in (given, run))
        np.testing.assert_allclose(scores, own, rtol=1e-3, atol=1e-5)
    other = dataclasses.replace(
        config, lora=LoRAConfig(file=str(run.workdir / "adapters" / "diffusers"))
    )
    params = Run.at(other, tmp_path / "other").params()
    jax.tree.map(np.testing.assert_array_equal, params, run.params())

    # Other adapters in the same run: all that is made of them is made again, as one.
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    shapes = parameter_shapes(run.space.pipeline.unet)
    write_peft(tmp_path / "doubled", shapes, doubled, run.space.scales)
    lora_file = LoRAConfig(file=str(tmp_path / "doubled"))
    changed = dataclasses.replace(config, lora=lora_file)
    again = pipeline.run("attribute", changed, tmp_path / "given")
    assert again.params_digest() != given.params_digest()
    for queries in ("validation", "generated"):
        scores = again.scores("trak", queries).scores
        assert not np.allclose(scores, run.scores("trak", queries).scores, rtol=0.01)
    zero = jax.tree.map(np.zeros_like, params)
    write_peft(tmp_path / "zero", shapes, zero, run.space.scales)
    nothing = LoRAConfig(file=str(tmp_path / "zero"))
    with pytest.raises(ValueError, match="whose adapters are all zero"):
        pipeline.run(
            "attribute", dataclasses.replace(config, lora=nothing), tmp_path / "given"
        )


def test_members_share_the_base_and_equal_the_main_model(run, tmp_path, one_device):
    """Three in one batch on a device: each as if it were trained alone."""
    rows = np.arange(16)
    members = [
        training.Member(f"m{i}", rows, seed) for i, seed in enumerate((42, 1, 2))
    ]
    recipe, space = run.recipe(6), run.space
    training.train_members(
        recipe,
        space.training_examples,
        members,
        tmp_path,
        cond=space.cond("train"),
        frozen=space.frozen,
        per_device=3,
    )
    stack = training.load_members(recipe.init, ["m0", "m1"], 6, tmp_path)
    for path, pair in run.params().items():
        for side, leaf in pair.items():
            np.testing.assert_allclose(stack[path][side][0], leaf, atol=2e-4)
            assert np.abs(stack[path][side][1] - leaf).max() > 1e-3


def test_a_changed_base_is_refused(run, tmp_path):
    """A run directory belongs to the weights that its first stage saw."""
    folder = tmp_path / "base"
    shutil.copytree(run.space.folder, folder)
    config = dataclasses.replace(run.config, base=BaseConfig(folder=str(folder)))
    pipeline.run("encode", config, tmp_path / "run")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="the unet in .* has other weights than"):
        pipeline.run("train", config, tmp_path / "run")


def test_refusals(base, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"base.folder=.* decides all of `model`"):
        config_of(base, pictures, model=ModelConfig(sample_size=16))
    with pytest.raises(ValueError, match="base.folder is .* and base.pictures 8"):
        BaseConfig(folder="x", pictures=8)
    with pytest.raises(ValueError, match="lora.file is .*: base.folder must be"):
        Config(lora=LoRAConfig(file="x"), base=BaseConfig(pictures=8))
    with pytest.raises(
        ValueError, match="base and lora have settings of text-to-image"
    ):
        Config(lora=LoRAConfig(rank=2))
    bare = dataclasses.replace(config_of(base, pictures).data, csv="", groups=())
    with pytest.raises(ValueError, match="all of 16 train pictures have no caption"):
        pipeline.run("train", config_of(base, pictures, data=bare), tmp_path / "bare")
    with pytest.raises(
        ValueError, match="lora.file is 'x', .*; leave out lora.rank=4.$"
    ):
        LoRAConfig(file="x", rank=4)
    gaps = config_of(
        base,
        pictures,
        data=dataclasses.replace(
            config_of(base, pictures).data, csv="gaps.csv", train=19, validation=0
        ),
    )
    with pytest.raises(ValueError, match=r"gaps.csv, line 2: `caption` is empty"):
        pipeline.run("encode", gaps, tmp_path / "gaps")
    index = base / "model_index.json"
    kept = index.read_text()
    index.write_text(json.dumps(json.loads(kept) | {"_class_name": "FluxPipeline"}))
    try:
        with pytest.raises(ValueError, match="'FluxPipeline'"):
            pipeline.run("encode", config_of(base, pictures), tmp_path / "flux")
    finally:
        index.write_text(kept)
