"""Mistakes cost nothing: they are refused before the first write, or change one stage."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
from conftest import NO_ATTENTION, png, store_of, use_simple_network

from dtrak_jax import cli, files, host, pipeline, results
from dtrak_jax.attribution import Scores
from dtrak_jax.config import (
    Config,
    CounterfactualConfig,
    DataConfig,
    EnsembleConfig,
    FeaturesConfig,
    SampleConfig,
    TrainConfig,
)
from dtrak_jax.run import Run
from dtrak_jax.training.metrics import Metrics


@pytest.fixture(scope="module", autouse=True)
def one_small_device():
    """One device, and a network that compiles fast."""
    first = jax.local_devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: first)
        patch.setattr(jax, "devices", lambda: first)
        use_simple_network(patch)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, run directory, pictures) of a run up to its scores."""
    folder = tmp_path_factory.mktemp("ahead")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8), np.uint8)
    for i, picture in enumerate(pixels):
        files.write_bytes(folder / "pictures" / f"{i:02d}.png", png(picture))
    config = Config(
        data=DataConfig(
            source="folder", name=str(folder / "pictures"), train=12, validation=2
        ),
        model=NO_ATTENTION,
        train=TrainConfig(steps=4, batch_size=4, save_every=2),
        sample=SampleConfig(count=2, steps=2),
        features=FeaturesConfig(timesteps=(100,), dim=8, batch_size=4),
    )
    pipeline.run("attribute", config, folder / "run")
    return config, folder / "run", folder / "pictures"


@pytest.fixture
def run(made, tmp_path):
    """(config, a copy of the run directory that a test may change)."""
    return made[0], shutil.copytree(made[1], tmp_path / "run")


def changed(config, **sections):
    """The config with some fields of some sections changed."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in sections.items()
        },
    )


def content(workdir):
    """The bytes of every file."""
    return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("command", "sections", "message"),
    [
        ("run", {"features": {"timesteps": 5000}}, "timesteps is 5000"),
        ("run", {"features": {"dim": 10**10}}, "of memory; this host has"),
        ("run", {"features": {"parameters": "nowhere"}}, "which finds none of"),
        ("run", {"sample": {"prompts": ("a",)}}, "the model takes no prompts"),
        ("run", {"data": {"groups": ("hand",), "csv": "a.csv"}}, "there is no CSV"),
        ("run", {"data": {"name": "/nowhere"}}, "'/nowhere', which is not a folder"),
        ("run", {"queries": {"folder": "/nowhere"}}, "queries.folder is '/nowhere'"),
        ("run", {"clip": {"folder": "/nowhere"}}, "/nowhere"),
        ("lds", {"ensemble": {"subsets": 7}}, "subsets is 7; the LDS needs at least 8"),
        ("ablate", {"ensemble": {"subsets": 7}}, "an ablation needs at least 8"),
        (
            "attribute",
            {
                "attribution": {"methods": ("datamodels",)},
                "ensemble": {"subsets": 7},
            },
            "method 'datamodels' needs at least 8",
        ),
        ("retrain", {"ensemble": {"timesteps": 1001}}, "ensemble.timesteps is 1001"),
        ("retrain", {"ensemble": {"fraction": 0.01}}, "a subset would have 0"),
        ("counterfactual", {"counterfactual": {"count": 12}}, "it must be 1 to 11"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    made, tmp_path, command, sections, message
):
    """In a stage that comes first or last: there is no run directory afterwards."""
    with pytest.raises((ValueError, OSError, MemoryError), match=message):
        pipeline.run(command, changed(made[0], **sections), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_damaged_query_is_refused_before_training(made, tmp_path):
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "a.png").write_bytes(b"no picture")
    config = changed(made[0], queries={"folder": str(tmp_path / "queries")})
    with pytest.raises(ValueError, match="The image a.png"):
        pipeline.run("run", config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_features_that_do_not_fit_the_disk(run, tmp_path, monkeypatch):
    """n J k 4 bytes a measurement, norms and losses, and 4 checkpoints of 10 numbers."""
    config = changed(run[0], attribution={"methods": ("pixel-dot",)})
    expected = 4 * (12 + 2 + 2) * (2 * (8 + 1) + 1) + 4 * 4 * 3 * 10
    monkeypatch.setattr(host, "free_disk", lambda folder: expected - 1)
    with pytest.raises(OSError, match=f"take {files.size_text(expected)} on the disk"):
        pipeline.run("featurize", config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    # What is there already needs no more.
    pipeline.run("featurize", config, run[1])


@pytest.mark.parametrize(
    ("command", "sections", "message"),
    [
        ("train", {"features": {"timesteps": 5000}}, "`dtrak-jax featurize` will"),
        ("retrain", {"ensemble": {"subsets": 6}}, "`dtrak-jax lds` will refuse"),
    ],
)
def test_what_later_stages_would_refuse_is_a_warning(
    made, tmp_path, command, sections, message
):
    config = changed(made[0], **sections)
    with pytest.warns(UserWarning, match=message):
        pipeline.check(Run.at(config, tmp_path), pipeline.needed(command, config))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda seed: TrainConfig(seed=seed - 1), "train.seed"),
        (lambda seed: DataConfig(seed=seed), "data.seed"),
        (lambda seed: FeaturesConfig(seed=seed), "features.seed"),
        (lambda seed: EnsembleConfig(seed=seed), "ensemble.seed"),
        (lambda seed: CounterfactualConfig(seed=seed), "counterfactual.seed"),
        (lambda seed: SampleConfig(seed=seed // 1000 + 1), "sample.seed"),
    ],
)
def test_seeds_have_32_bits(make, name):
    make(2**32 - 2000)
    with pytest.raises(ValueError, match=f"{name} is .* an integer between 0 and 4294"):
        make(2**32)


def test_only_what_a_setting_decides_is_made_again(run):
    """Another k beside the old one, without training or sampling; and back at once."""
    config, workdir = run
    before, path = content(workdir), workdir / "scores" / "dtrak-generated.npz"
    pipeline.run("attribute", changed(config, features={"dim": 4}), workdir)
    after = content(workdir)
    written = {p for p in after if before.get(p) != after[p]}
    tops = {p.relative_to(workdir).parts[0] for p in written}
    assert tops == {"features", "kernels", "scores", "config.json"}
    assert before.keys() < after.keys()
    places = {p.relative_to(workdir).parts[1] for p in written if "phi" in p.parts}
    assert places == {"common-1x1-sketch4"}
    assert store_of(workdir, "train").parent.name == "common-1x1-sketch4"
    assert Scores.load(path).eigenvalues.shape == (1, 4)
    pipeline.run("attribute", config, workdir)
    assert path.read_bytes() == before[path]


@pytest.mark.parametrize(
    ("sections", "kept"),
    [
        ({"train": {"log_every": 3, "save_every": 3}}, ("train", "samples", "train-")),
        (
            {"data": {"validation": 3}},
            ("checkpoints", "samples", "train-", "generated-"),
        ),
        ({"sample": {"count": 3}}, ("checkpoints", "train-", "validation-")),
    ],
)
def test_settings_that_leave_training_alone(run, sections, kept):
    config, workdir = run
    before = content(workdir)
    pipeline.run("attribute", changed(config, **sections), workdir)
    after = content(workdir)
    for path in before:
        if any(part.startswith(kept) for part in path.relative_to(workdir).parts):
            assert after[path] == before[path], path


def test_a_mean_loss_is_of_the_steps_since_the_line_before(tmp_path):
    """Also where training goes on after step 5 with lines at other steps."""
    files.write_json_lines(tmp_path / "metrics.jsonl", [{"step": 3}])
    config = TrainConfig(steps=8, log_every=4)
    metrics = Metrics(tmp_path / "metrics.jsonl", 5, config)
    assert metrics.write(8, np.float32(10)) == 2


def test_pictures_may_move(run, made, tmp_path):
    """Another place of the same pictures is no other data."""
    config, workdir = run
    moved = shutil.copytree(made[2], tmp_path / "elsewhere")
    before = content(workdir)
    pipeline.run("attribute", changed(config, data={"name": str(moved)}), workdir)
    after = content(workdir)
    assert {p.name for p in after if before.get(p) != after[p]} <= {"config.json"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"seed": 7}}, "train.seed is 42 there and 7 here.*delete .*checkp"),
        ({"data": {"train": 11}}, "data.train is 12 there and 11 here"),
        ({"data": {"center_crop": 4}}, "data.center_crop is 0 there and 4 here"),
        ({"data": {"seed": 7}}, "data.seed is 42 there and 7 here"),
        ({"data": {"flip": True}}, "data.flip is False there and True here"),
        ({"diffusion": {"steps": 900}}, "diffusion.steps is 1000 there and 900 here"),
    ],
)
def test_a_model_of_other_settings_is_refused(run, sections, message):
    """Nothing that was made is touched, and the settings of before go on."""
    config, workdir = run
    before = content(workdir)
    for command in ("train", "featurize"):
        with pytest.raises(ValueError, match=message):
            pipeline.run(command, changed(config, **sections), workdir)
        assert content(workdir) == before
    pipeline.run("attribute", config, workdir)
    assert content(workdir) == before


def test_a_model_of_other_pictures_is_refused(run, made, tmp_path):
    """Also where nobody knows any more which pictures there were."""
    config, workdir = run
    folder = shutil.copytree(made[2], tmp_path / "pictures")
    for path in folder.iterdir():
        files.write_bytes(path, png(np.zeros((8, 8), np.uint8)))
    (workdir / "splits.npz").unlink()
    other = changed(config, data={"name": str(folder)})
    for command in ("train", "featurize"):
        with pytest.raises(ValueError, match="the training images have other pixels"):
            pipeline.run(command, other, workdir)
    for path in folder.iterdir():
        path.rename(path.with_suffix(".jpg.png"))
    with pytest.raises(ValueError, match="there are other training images there"):
        pipeline.run("sample", other, workdir)


def test_an_overwritten_picture_is_noticed_before_anything_is_written(
    run, made, tmp_path
):
    """A file that is only written anew is looked at, and is the same picture."""
    (config, workdir), before = run, content(run[1])
    folder = shutil.copytree(made[2], tmp_path / "pictures")
    moved = changed(config, data={"name": str(folder)})
    ids = files.read_npz(workdir / "splits.npz")
    train, validation = (
        folder / ids[f"{role}_ids"][0] for role in ("train", "validation")
    )
    os.utime(train, (0, 0))
    pipeline.run("attribute", moved, workdir)
    assert {p.name for p, b in content(workdir).items() if before.get(p) != b} == {
        "config.json"
    }
    before = content(workdir)
    for path in (train, validation):
        pixels = path.read_bytes()
        files.write_bytes(path, png(np.zeros((8, 8), np.uint8)))
        for command in ("train", "sample", "featurize", "attribute", "lds", "report"):
            with pytest.raises(ValueError, match=f"1 of .* changed .* {path.name}"):
                pipeline.run(command, moved, workdir)
        assert content(workdir) == before
        path.write_bytes(pixels)


def test_a_mistake_without_a_model_is_forgotten(run):
    """Settings of training may change as long as there is no checkpoint."""
    config, workdir = run
    for step in (workdir / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(step)
    other = changed(config, train={"learning_rate": 0.02})
    pipeline.run("attribute", other, workdir)
    with pytest.raises(ValueError, match="train.learning_rate is 0.02 there"):
        pipeline.run("train", config, workdir)
    model = files.read_npz(workdir / "samples" / "samples.npz")["model"]
    assert str(model) == Run.at(other, workdir).params_digest()


def test_a_result_of_other_scores_is_left_out(run):
    """Until the settings are those of before again."""
    config, workdir = run
    opened = Run.at(config, workdir)
    results.save(opened, "lds", {"queries": {}}, ["model", "scores of dtrak"])
    assert Run.at(config, workdir).json("lds") == {"queries": {}}
    other = Run.at(changed(config, attribution={"damping": 0.3}), workdir)
    with pytest.warns(
        UserWarning, match="made from other scores of dtrak.*dtrak-jax lds"
    ):
        assert other.json("lds") is None
    assert Run.at(config, workdir).json("lds") == {"queries": {}}
    # A method of no setting, whose features were under other checkpoints.
    saved = {"made_from": {"scores of gas": "..."}, "queries": {}}
    files.write_json(workdir / "lds.json", saved)
    with pytest.warns(UserWarning, match="made from other scores of gas"):
        assert Run.at(config, workdir).json("lds") is None


def test_devices_wait_for_each_other_on_a_busy_machine(monkeypatch):
    """The flag is one that XLA knows: all tests run under it."""
    assert cli.PATIENCE in os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    cli.use_cores(1)
    cli.use_cores(1)
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to= {cli.PATIENCE}"
