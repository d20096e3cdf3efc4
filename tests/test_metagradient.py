"""Metagradients against finite differences of training, and closed forms."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import apply, init, train_apply

import dtrak_jax as dtrak
from dtrak_jax import diffusion, training
from dtrak_jax.config import TrainConfig
from dtrak_jax.evaluation.outputs import measure, measured_gradients
from dtrak_jax.training import metagradient as module
from dtrak_jax.training import step
from dtrak_jax.training.metagradient import Course, metagradient, train_weighted

SCHEDULE = diffusion.linear_schedule()
# The rate is high, so that 14 steps go far; the last batch of an epoch is filled up.
CONFIG = TrainConfig(
    steps=14, batch_size=5, learning_rate=3e-2, eps_root=1e-6, weight_decay=1e-2,
    clip_norm=0.5, log_every=4,
)  # fmt: skip
RECIPE = training.Recipe(init, train_apply, SCHEDULE, CONFIG)
IDS = ["a", "b", "c"]


def course(images, recipe=RECIPE, **changes):
    return Course(recipe._replace(config=CONFIG_WITH(changes)), (images, None))


def CONFIG_WITH(changes):
    return dataclasses.replace(CONFIG, **changes)


@pytest.fixture
def float64(monkeypatch):
    """Training in float64, which its own switches prevent."""
    for name in ("train_step", "first_state"):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(step, name)))
    module.replayed_step.cache_clear()
    module.pulled_step.cache_clear()
    with jax.enable_x64(True):
        yield
    module.replayed_step.cache_clear()
    module.pulled_step.cache_clear()


def wide_init(key):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), init(key))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_metagradients_are_finite_differences_of_training(images, ema_decay, float64):
    recipe = RECIPE._replace(
        init=wide_init, view=training.mirror,
        config=CONFIG_WITH({"ema_decay": ema_decay}),
    )  # fmt: skip
    train = Course(recipe, (images.astype(np.float64), None))
    settings = dtrak.QueryLosses(apply, SCHEDULE, images[:3], timesteps=4, draws=2)
    queries = images[:3].astype(np.float64), IDS, settings

    def measured(params):
        return measured_gradients(apply, SCHEDULE, params, *queries)

    def losses(weights):
        params = train_weighted.__wrapped__(train, weights)
        assert params["w"].dtype == np.float64
        stack = jax.tree.map(lambda leaf: leaf[None], params)
        return measure(apply, SCHEDULE, stack, *queries)[0]

    ours, width = metagradient(train, measured, 3), 1e-4
    for n in (0, 4, 11):
        unit = width * np.eye(12)[n]
        expected = (losses(1 + unit) - losses(1 - unit)) / (2 * width)
        np.testing.assert_allclose(ours[:, n], expected, rtol=1e-5)
