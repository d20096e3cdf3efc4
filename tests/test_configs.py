"""The paper's configurations: at full size in shape, and in small from end to end."""

import ast
import dataclasses
import itertools
import json
import runpy

import jax
import numpy as np
import pytest
from conftest import DIGITS, PLANS

from dtrak_jax import cli, files, models, planning
from dtrak_jax.config import FeaturesConfig, flatten
from dtrak_jax.planning.stages import stages_of
from dtrak_jax.planning.topology import AXES

# From the paper's code: parameters, and steps of 200 epochs.
PAPER = {
    "cifar2": (38_307_203, 8_000, 5_000),
    "cifar10": (38_307_203, 78_200, 50_000),
    "celeba": (118_795_011, 8_000, 5_000),
}
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]
SMALL = {
    "data.train": "6",
    "data.validation": "2",
    "model.layers-per-block": "1",
    "model.norm-num-groups": "2",
    "train.steps": "2",
    "train.batch-size": "4",
    "sample.count": "2",
    "sample.steps": "2",
    "features.timesteps": "2",
    "features.dim": "32",
    "features.batch-size": "2",
    "attribution.damping": "0.1",
}


def path(name):
    return DIGITS.parent / f"{name}.py"


def config_of(name):
    return runpy.run_path(str(path(name)))["get_config"]()


def common_flags(name, chip):
    """The flags of the project's own features, in the docstring of a config."""
    lines = ast.get_docstring(ast.parse(path(name).read_text())).splitlines()
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
    assert config.features.dim == 32768 and config.features.timesteps == 100
    assert 100 % config.features.batch_size == 0, "else some images are computed twice"


@pytest.mark.parametrize("name", ["cifar2", "celeba"])
@pytest.mark.parametrize("apart", [False, True], ids=["averaged", "apart"])
def test_one_step_at_full_size(name, apart):
    """Shapes of what the real functions make of a batch on eight devices."""
    config, parameters = config_of(name), PAPER[name][0]
    if apart:
        config = dataclasses.replace(config, features=FeaturesConfig(batch_size=2))
    stages = {s.name: s for s in stages_of(config, planning.find(None))}
    (gradient, _), (project, _) = stages["featurize train"].calls
    slots = 16 if apart else 8
    found, errors = jax.eval_shape(gradient.function, *gradient.arguments)
    assert set(found) == {"square", "loss"}
    for parts in found.values():
        assert sum(part.shape[1] for part in parts) == parameters
        assert {part.shape[0] for part in parts} == {slots}
        assert {part.dtype for part in parts} == {np.dtype(np.float32)}
    assert errors.shape == (slots, 1 if apart else config.features.batch_size)
    results = jax.tree.leaves(jax.eval_shape(project.function, *project.arguments))
    shapes = {(slots, config.features.dim), (slots,)}
    assert {result.shape for result in results} == shapes
    if not apart:
        ((train, _),) = stages["train"].calls
        state = train.arguments[0]
        after, _ = jax.eval_shape(train.function, *train.arguments)
        assert jax.tree.map(lambda a, b: a.shape == b.shape, state, after)
        # Parameters, and the two moments of AdamW.
        numbers = sum(leaf.size for leaf in jax.tree.leaves(after))
        assert 3 * parameters < numbers < 3 * parameters + 10


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
    config = cli.parse(["plan", str(path(name)), *flags[features]])[1]
    settings = json.loads(json.dumps(flatten(config)))
    assert saved["config"].items() <= settings.items()
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
    """By the paper's recipe and by the project's own; on slices up to 256 chips."""
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
    assert large >= set(itertools.product(recipes, AXES))


@pytest.mark.parametrize("name", PAPER)
def test_a_small_run_of_each(name, mocked, tmp_path, one_device):
    """From a prepared data set to the report, with few images and a narrow network."""
    levels = len(config_of(name).model.block_out_channels)
    flags = SMALL | {"model.block-out-channels": " ".join(["8"] * levels)}
    line = ["run", str(path(name)), "--workdir", str(tmp_path / "run")]
    for flag, value in flags.items():
        line += [f"--{flag}", *value.split()]
    line.append("--attribution.no-absolute")
    if name == "celeba":
        data = mocked("celeb_a", 12, ("train", "validation"))
    else:
        data = mocked("cifar10", 100, ("train", "test"), CIFAR10)
    with data:
        cli.main(line)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    for queries in ("validation", "generated"):
        scores = files.read_npz(tmp_path / "run" / "scores" / f"dtrak-{queries}.npz")
        assert scores["scores"].shape == (2, 6)
        assert np.isfinite(scores["scores"]).all() and scores["scores"].any()
