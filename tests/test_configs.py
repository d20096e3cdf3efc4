"""The configurations: at full size in shape, by what commands need, and one in small."""

import ast
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import DIGITS, PLANS, use_simple_network

from dtrak_jax import cli, feature_sets, files, models, pipeline, planning, training
from dtrak_jax.config import FeaturesConfig, flatten
from dtrak_jax.diffusion.sampling import sampling_timesteps
from dtrak_jax.features.measurements import MEASUREMENTS
from dtrak_jax.methods import METHODS
from dtrak_jax.models.autoencoder import autoencoder_config
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.stable_diffusion import stable_diffusion_1
from dtrak_jax.planning.topology import AXES
from dtrak_jax.run import Run

NAMES = Path(__file__).parent / "goldens" / "latent_names.npz"
CONFIGS = {path.stem: path for path in sorted(DIGITS.parent.glob("*.py"))}
# From the paper's code: parameters, and steps of 200 epochs.
PAPER = {
    "cifar2": (38_307_203, 8_000, 5_000),
    "cifar10": (38_307_203, 78_200, 50_000),
    "celeba": (118_795_011, 8_000, 5_000),
}
# Of text-to-image: steps of 100 epochs, images, and prompts in their order.
ARTBENCH = {
    "artbench2": (7_900, 5_000, ["ukiyo e", "post impressionism"]),
    "artbench5": (
        *(19_600, 12_500),
        ["ukiyo e", "post impressionism", "romanticism", "renaissance", "baroque"],
    ),
}
PROGRAMS = (
    *("data", "model", "diffusion", "train", "sample", "features", "ensemble"),
    "attribution",
)
"""The sections of a config that decide programs and their calls."""

SMALL = {
    "data.train": "6",
    "data.validation": "2",
    "train.steps": "2",
    "train.batch-size": "4",
    "sample.count": "2",
    "sample.steps": "2",
    "features.timesteps": "2",
    "features.dim": "32",
    "features.batch-size": "2",
    "attribution.damping": "0.1",
    # As the network of the tests has.
    "model.in-channels": "1",
    "model.out-channels": "1",
}


def config_of(name):
    return cli.load_config(str(CONFIGS[name]))


def common_flags(name, chip):
    """The flags of the project's own features, in the docstring of a config."""
    lines = ast.get_docstring(ast.parse(CONFIGS[name].read_text())).splitlines()
    lines = [line for line in lines if line.startswith("    --")]
    if name == "celeba" and chip != "v5e":
        # A v5e has no room for two measurements.
        lines.pop()
    return " ".join(lines).split()


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name):
    config, (parameters, steps, images) = config_of(name), PAPER[name]
    key = jax.eval_shape(jax.random.key, 0)
    shapes = jax.eval_shape(models.init_fn(models.build(config.model)), key)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert config.data.train == images
    assert config.data.validation == config.sample.count == 1000
    assert config.train.steps == steps == 200 * -(-images // config.train.batch_size)
    assert config.features.dim == 32768
    assert config.features.timesteps == 100
    assert 100 % config.features.batch_size == 0, "else some images are computed twice"


@pytest.mark.parametrize("name", ARTBENCH)
def test_settings_of_text_to_image_are_the_papers(name):
    config, (steps, images, styles) = config_of(name), ARTBENCH[name]
    train, lora, sample = config.train, config.lora, config.sample
    assert config.data.train == images
    assert config.data.validation == sample.count == 1000
    assert sorted(s.replace(" ", "_") for s in styles) == sorted(config.data.labels)
    assert config.data.flip and config.base.resolution == 256
    assert train.steps == steps == 100 * -(-images // 64)
    assert (train.batch_size, train.learning_rate, train.b1, train.b2) == (
        *(64, 3e-4),
        *(0.9, 0.999),
    )
    assert (train.warmup, train.weight_decay, train.clip_norm) == (0.1, 1e-6, 1)
    assert train.caption_dropout == lora.dropout == 0.1
    assert (lora.rank, lora.scale) == (128, 1)
    assert training.kept_steps(train) == [steps * i // 4 for i in (1, 2, 3, 4)]
    assert list(sample.prompts) == [f"a {style} painting" for style in styles]
    assert (sample.sampler, sample.steps, sample.eta) == ("ddim", 50, 0)
    assert sample.guidance == 7.5 and not sample.negative
    features, ensemble = config.features, config.ensemble
    assert (features.dim, features.timesteps, features.draws) == (32768, 100, 1)
    assert (features.noise, features.noise_batch) == ("reference", 32)
    assert features.measurements == ("square", "loss") and not features.per_timestep
    assert (ensemble.subsets, ensemble.seeds, ensemble.fraction) == (64, 3, 0.5)
    assert (ensemble.timesteps, ensemble.draws) == (1000, 3)
    assert (config.counterfactual.queries, config.counterfactual.count) == (60, 1000)


def test_text_to_image_at_full_size(monkeypatch):
    """Shapes of what the networks of Stable Diffusion 1 make of pictures of 256x256."""
    parts = stable_diffusion_1()
    vae = json.loads(str(np.load(NAMES)["vae"]))[0]
    assert parts.vae.config == autoencoder_config(vae)
    # As if of larger pictures, in which the config does not believe.
    assert parts.unet.config.sample_size == 64
    monkeypatch.setattr(models, "resolve_stable_diffusion", lambda folder: parts)
    run = Run(config_of("artbench2"), None)
    assert run.space.image_shape == (256, 256, 3)
    assert run.network.shape == (32, 32, 4)
    adapters = run.param_shapes
    assert len(adapters) == 32 * 4
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 25_509_888

    def shape(*sizes, dtype=np.float16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def params(module):
        halves = jax.tree.map(lambda leaf: shape(*leaf.shape), parameter_shapes(module))
        return {"params": halves}

    ids = shape(2, 77, dtype=np.int32)
    context = jax.eval_shape(parts.text.apply, params(parts.text), ids).last
    assert context.shape == (2, 77, 768)
    encode = functools.partial(parts.vae.apply, method="encode")
    picture = shape(1, *run.space.image_shape, dtype=np.float32)
    for moment in jax.eval_shape(encode, params(parts.vae), picture):
        assert moment.shape == (1, 32, 32, 4) and moment.dtype == np.float32
    steps = [
        s for s in pipeline.STAGES if s.programs and s.name in ("encode", "sample")
    ]
    at_hand = planning.find(None)
    planned = {p.name: p for stage in steps for p in stage.programs(run, at_hand)}
    # Means and deviations of paintings, of their mirror images, and of queries.
    assert planned["encode"].stored == 2 * (2 * 5000 + 1000 + 1000) * 4 * 32 * 32 * 4
    ((program, calls),) = planned["decode"].calls
    (pictures,) = jax.eval_shape(program.function, *program.arguments)
    assert pictures.shape[1:] == run.space.image_shape
    assert calls == -(-1000 // len(pictures))
    frozen = {"unet": params(parts.unet)["params"], "empty": shape(77, 768)}
    x, t = shape(2, *run.network.shape, dtype=np.float32), shape(2, dtype=np.int32)
    predict = run.network.apply, (adapters, frozen), x, t, context
    assert jax.eval_shape(*predict).shape == x.shape
    sampler = run.space.sampler
    timesteps = sampling_timesteps(sampler.schedule, sampler.steps, sampler.offset)
    assert list(timesteps[[0, -1]]) == [981, 1]


@pytest.mark.parametrize("command", [stage.name for stage in pipeline.STAGES])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_each_command_needs_is_made(name, command):
    """Every stage comes after those that it needs, and the command's own is the last."""
    config, made = config_of(name), []
    for stage in pipeline.needed(command, config):
        assert set(stage.needs(config)) <= set(made)
        made.append(stage.name)
    assert made[-1] == command


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_that_is_named_is_made(name):
    """Its features are configured, and it is made of what stages make."""
    config = config_of(name)
    named = {*config.methods, *config.shown_methods}
    named |= {method for method, _ in config.removal_methods}
    folders = feature_sets.folders(config)
    made = {f: {MEASUREMENTS[m] for m in names} for f, names in folders.items()}
    stages = {stage.name for stage in pipeline.STAGES}
    assert set(config.shown_methods) <= set(config.attribution.methods)
    for method in map(METHODS.get, named):
        assert set(method.needs) <= stages
        assert ("featurize" in method.needs) == bool(method.measurement)
        for folder in method.folders(config):
            assert method.measurement in made[folder]


@pytest.mark.parametrize(
    ("name", "apart"), [("celeba", False), ("cifar2", True)], ids=["averaged", "apart"]
)
def test_one_step_at_full_size(name, apart):
    """Shapes of what the real functions make of a batch on eight devices."""
    config, parameters = config_of(name), PAPER[name][0]
    if apart:
        config = dataclasses.replace(config, features=FeaturesConfig(batch_size=2))
    run, topology = Run(config, None), planning.find(None)
    programs = {stage.name: stage.programs for stage in pipeline.STAGES}
    (gradient, _), (project, _) = programs["featurize"](run, topology)[0].calls
    slots = 16 if apart else 8
    parts_of, errors = jax.eval_shape(gradient.function, *gradient.arguments)
    assert set(parts_of) == {"square", "loss"}
    for parts in parts_of.values():
        assert sum(part.shape[1] for part in parts) == parameters
        assert {part.shape[0] for part in parts} == {slots}
        assert {part.dtype for part in parts} == {np.dtype(np.float32)}
    assert errors.shape == (slots, 1 if apart else config.features.batch_size)
    results = jax.tree.leaves(jax.eval_shape(project.function, *project.arguments))
    shapes = {(slots, config.features.dim), (slots,)}
    assert {result.shape for result in results} == shapes
    if not apart:
        ((train, _),) = programs["train"](run, topology)[0].calls
        state = train.arguments[0]
        after, _ = jax.eval_shape(train.function, *train.arguments)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, state, after))
        # Parameters, and the two moments of AdamW.
        numbers = sum(leaf.size for leaf in jax.tree.leaves(after))
        assert 3 * parameters < numbers < 3 * parameters + 10


def decisive(settings):
    """The settings that decide programs, of {dotted name: value}."""
    sections = {name: name.partition(".")[0] for name in settings}
    return {k: v for k, v in settings.items() if sections[k] in PROGRAMS}


@pytest.mark.parametrize("plan", PLANS, ids=[plan.stem for plan in PLANS])
def test_planned_is_what_the_configs_say(plan):
    """Plans, compiled for hours, are of the settings as they are now, and all fit.

    Gradients are nine tenths of the arithmetic or more, and nothing that grows with the
    number of images is exchanged.
    """
    name, features, topology = plan.stem.split("_")
    saved = files.read_json(plan)
    flags = {"reference": [], "gaussian": ["--features.projection", "gaussian"]}
    flags["common"] = common_flags(name, topology.partition("-")[0])
    config = cli.parse(["plan", str(CONFIGS[name]), *flags[features]])[1]
    settings = json.loads(json.dumps(flatten(config)))
    assert decisive(saved["config"]).items() <= settings.items()
    for row in saved["stages"]:
        assert row["fits"], row["stage"]
        if row["stage"].startswith("featurize"):
            assert not row["collectives"]
            assert row["useful"] >= 0.9 or features == "gaussian"
        if row["stage"] == "attribute":
            ((kind, (count, size)),) = row["collectives"].items()
            side = min(config.features.dim, config.data.train)
            assert (kind, count, size) == ("all-reduce", 1, 4 * side**2)


def test_gradients_of_all_are_planned_for_every_kind_of_chip():
    """By the paper's recipe and by the project's own; but for a v5e also on 256 chips."""
    planned, large = set(), set()
    for plan in PLANS:
        name, features, topology = plan.stem.split("_")
        chip, saved = topology.partition("-")[0], files.read_json(plan)
        if any(row["stage"] == "featurize train" for row in saved["stages"]):
            planned.add((name, features, chip))
            if saved["devices"] >= 256:
                large.add((features, chip))
    recipes = "common", "reference"
    assert planned >= set(itertools.product(PAPER, recipes, AXES))
    slices = [chip for chip in AXES if chip != "v5e"]
    assert large >= set(itertools.product(recipes, slices))


def test_a_small_run_of_celeba(mocked, tmp_path, one_device, monkeypatch):
    """From a prepared data set to the report, with few images and another network."""
    use_simple_network(monkeypatch)
    line = ["run", str(CONFIGS["celeba"]), "--workdir", str(tmp_path / "run")]
    for flag, value in SMALL.items():
        line += [f"--{flag}", value]
    with mocked("celeb_a", 12, ("train", "validation")):
        cli.main([*line, "--attribution.no-absolute"])
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    for queries in ("validation", "generated"):
        scores = files.read_npz(tmp_path / "run" / "scores" / f"dtrak-{queries}.npz")
        assert scores["scores"].shape == (2, 6)
        assert np.isfinite(scores["scores"]).all()
        assert scores["scores"].any()
