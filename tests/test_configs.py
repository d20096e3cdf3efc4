"""The configurations: at full size in shape, by what commands need, and one in small."""

import ast
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from conftest import DIGITS, PLANS, use_simple_network

from dtrak_jax import cli, feature_sets, files, models, pipeline, planning
from dtrak_jax.config import FeaturesConfig, flatten
from dtrak_jax.features.measurements import MEASUREMENTS
from dtrak_jax.methods import METHODS
from dtrak_jax.planning.topology import AXES
from dtrak_jax.run import Run

CONFIGS = {path.stem: path for path in sorted(DIGITS.parent.glob("*.py"))}
# From the paper's code: parameters, and steps of 200 epochs.
PAPER = {
    "cifar2": (38_307_203, 8_000, 5_000),
    "cifar10": (38_307_203, 78_200, 50_000),
    "celeba": (118_795_011, 8_000, 5_000),
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
