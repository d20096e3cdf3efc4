"""A state spread over the devices trains as one that each device has all of."""

import dataclasses
import math
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import losses

from dtrak_jax import diffusion, training
from dtrak_jax.config import TrainConfig
from dtrak_jax.network import Shapes
from dtrak_jax.parallel import P
from dtrak_jax.training import loop, programs

SCHEDULE = diffusion.linear_schedule()
WHOLE = TrainConfig(
    steps=12,
    batch_size=5,
    learning_rate=1e-2,
    weight_decay=0.1,
    clip_norm=0.5,
    ema_decay=0.9,
    checkpoints=(1.0,),
    save_every=4,
    log_every=1,
)
SPREAD = dataclasses.replace(WHOLE, fsdp=True)


def init(key):
    """Arrays that eight devices can share, and some that they cannot."""
    keys = jax.random.split(key, 3)
    return {
        "first": 0.3 * jax.random.normal(keys[0], (3, 3, 1, 64)),
        "bias": jnp.zeros(64),
        "last": 0.1 * jax.random.normal(keys[1], (3, 3, 64, 1)),
        "odd": 0.1 * jax.random.normal(keys[2], (3, 3, 1, 1)),
    }


def apply(params, x, t, cond, keys):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    y = jnp.tanh(convolve(x, params["first"]) + params["bias"].reshape(1, 1, 1, -1))
    return convolve(y, params["last"]) + convolve(x, params["odd"])


def run(images, directory, config):
    recipe = training.Recipe(init, apply, SCHEDULE, config)
    return training.train(recipe, images, directory)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)


def test_a_spread_state_changes_rounding_alone(images, tmp_path):
    whole = run(images, tmp_path / "whole", WHOLE)
    spread = run(images, tmp_path / "spread", SPREAD)
    np.testing.assert_allclose(
        losses(tmp_path / "spread"), losses(tmp_path / "whole"), rtol=1e-5
    )
    assert_close(spread, whole)


@pytest.mark.parametrize(("before", "after"), [(SPREAD, WHOLE), (WHOLE, SPREAD)])
def test_a_run_goes_on_in_another_layout(images, tmp_path, monkeypatch, before, after):
    """Begun on eight devices, ended on two, read on one."""
    whole = run(images, tmp_path / "whole", WHOLE)

    def interrupt(n, size, seed, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return training.batch(n, size, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch", interrupt)
        with pytest.raises(KeyboardInterrupt, match="after step 8 of 12"):
            run(images, tmp_path / "cut", before)
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    assert_close(run(images, tmp_path / "cut", after), whole)
    np.testing.assert_allclose(
        losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=1e-5
    )
    for config in (before, after):
        assert_close(training.load_params(init, config, tmp_path / "cut"), whole)


def test_the_specs_split_the_largest_dimension_that_fits():
    shapes = {"a": (3, 3, 16, 8), "b": (16, 24), "c": (3, 5), "d": (16,), "e": ()}
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    assert programs.shard_specs(shapes, 8) == {
        "a": P(None, None, "data"),
        "b": P(None, "data"),
        "c": P(),
        "d": P(),
        "e": P(),
    }


def compiled(config):
    """The step on eight devices, and the bytes of a state that one device holds."""
    recipe = training.Recipe(init, apply, SCHEDULE, config)
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    shapes = Shapes(x, None, None, x)
    program = training.planned_step(recipe, shapes, jax.devices())
    step = program.function.lower(*program.arguments).compile()
    (shardings, *_), _ = step.input_shardings
    state = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)),
        program.arguments[0],
        shardings,
    )
    return step, 4 * sum(jax.tree.leaves(state))


def test_a_device_keeps_an_eighth_of_what_can_be_spread():
    """Of parameters, averages and both moments."""
    sizes = []
    for config in (WHOLE, SPREAD):
        step, state_bytes = compiled(config)
        batch_bytes = 4 * (8 * 8 + 4)
        arguments = step.memory_analysis().argument_size_in_bytes
        assert abs(arguments - state_bytes - batch_bytes) < 64
        sizes.append(state_bytes)
    whole, spread = sizes
    saved = 4 * 4 * (7 / 8) * 2 * 9 * 64
    assert whole - spread == saved


@pytest.mark.parametrize("config", [WHOLE, SPREAD])
def test_only_parameters_and_their_gradients_travel(config):
    """No activation does: XLA's own choice of what to split is the one that is meant.

    What is spread is gathered; gradients and scalars (the sum of the weights, the loss,
    norms, who was asked to stop) are summed.
    """
    step, _ = compiled(config)
    found = re.findall(
        r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", step.as_text()
    )
    results = {}
    for result, kind in found:
        shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", result)
        results.setdefault(kind, set()).update(shapes)
    gathered = results.pop("all-gather", set())
    assert gathered == ({"3,3,1,64", "3,3,64,1"} if config.fsdp else set())
    gradients = {"3,3,1,64", "3,3,64,1", "3,3,1,1", "64"}
    assert results == {"all-reduce": {"", *gradients}}
