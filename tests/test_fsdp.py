"""A state spread over the devices trains as one that each device has all of."""

import dataclasses
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import losses

from dtrak_jax import diffusion, parallel, training
from dtrak_jax.config import TrainConfig
from dtrak_jax.parallel import P
from dtrak_jax.training import fsdp, loop

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


def apply(params, x, t, cond, key):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    y = jnp.tanh(convolve(x, params["first"]) + params["bias"].reshape(1, 1, 1, -1))
    return convolve(y, params["last"]) + convolve(x, params["odd"])


def run(images, directory, config):
    return training.train(init, apply, SCHEDULE, images, config, directory)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)


def use(monkeypatch, count):
    """Makes the first devices the only ones."""
    first = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: first)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_spread_state_changes_rounding_alone(images, tmp_path, monkeypatch, count):
    use(monkeypatch, count)
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
        with pytest.raises(KeyboardInterrupt, match="after step 7 of 12"):
            run(images, tmp_path / "cut", before)
    use(monkeypatch, 2)
    assert_close(run(images, tmp_path / "cut", after), whole)
    np.testing.assert_allclose(
        losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=1e-5
    )
    for config in (before, after):
        assert_close(training.load_params(init, config, tmp_path / "cut"), whole)


def test_the_specs_split_the_largest_dimension_that_fits():
    shapes = {"a": (3, 3, 16, 8), "b": (16, 24), "c": (3, 5), "d": (16,), "e": ()}
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    assert fsdp.shard_specs(shapes, 8) == {
        "a": P(None, None, "data"),
        "b": P(None, "data"),
        "c": P(),
        "d": P(),
        "e": P(),
    }


def test_the_norm_is_that_of_the_whole_gradient():
    params = init(jax.random.key(0))
    specs = fsdp.shard_specs(params, 8)
    assert sum(spec != P() for spec in specs.values()) == 2
    norm = parallel.over_mesh(
        lambda parts: fsdp.global_norm(parts, specs),
        parallel.mesh(jax.devices()),
        (specs,),
        P(),
    )
    np.testing.assert_allclose(norm(params), optax.tree.norm(params), rtol=1e-6)


def compiled(config):
    """The first state's shapes, and its step on eight devices."""
    mesh = parallel.mesh(jax.devices())
    make_state, specs = loop._state_maker(init, config, mesh)
    step = loop._compile(apply, SCHEDULE, config, False, mesh, specs)
    x = np.zeros((8, 8, 8, 1), np.float32)
    batch = loop._place(mesh, x, np.arange(8), np.ones(8, np.float32))
    state = jax.eval_shape(make_state)
    return state, step.lower(state, *batch, np.uint32(0)).compile()


def test_a_device_keeps_an_eighth_of_what_can_be_spread():
    """Of parameters, averages and both moments."""
    sizes = []
    for config in (WHOLE, SPREAD):
        state, step = compiled(config)
        here = [
            leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)
        ]
        state_bytes = 4 * sum(map(np.prod, here))
        batch_bytes = 4 * (8 * 8 + 4)
        arguments = step.memory_analysis().argument_size_in_bytes
        assert abs(arguments - state_bytes - batch_bytes) < 64
        sizes.append(state_bytes)
    whole, spread = sizes
    saved = 4 * 4 * (7 / 8) * 2 * 9 * 64
    assert whole - spread == saved


def test_a_step_gathers_once_and_scatters_once():
    """And sums only scalars and what is whole everywhere."""
    _, step = compiled(SPREAD)
    found = re.findall(
        r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", step.as_text()
    )
    results = {}
    for result, kind in found:
        shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", result)
        results.setdefault(kind, []).extend(shapes)
    assert results.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert sorted(results["all-gather"]) == ["3,3,1,64", "3,3,64,1"]
    assert sorted(results["reduce-scatter"]) == ["3,3,1,8", "3,3,8,1"]
    # The sum of the weights, the loss, the norm, and who was asked to stop.
    assert sorted(results["all-reduce"]) == ["", "", "", "", "3,3,1,1", "64"]
