"""Learning: has the model learnt more of the images than anybody knows beforehand?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dtrak_jax.diffusion import Schedule
from dtrak_jax.features import Features

LEARNT = 0.9
"""A model whose loss is above this part of the baseline has learnt next to nothing."""

LEAST_TIMESTEPS = 8
"""Fewer timesteps of features may miss those at which there is something to learn."""

MOST_ROWS = 1000
"""Training examples whose spread is measured."""


class Learning(NamedTuple):
    """A model's loss, and what it would be without learning."""

    loss: float
    """The mean squared error of training images."""
    baseline: float
    """The error of one who knew only the images' mean and spread, see `baseline`."""

    @property
    def is_nothing(self) -> bool:
        """True if the model has learnt next to nothing of these images."""
        return not self.loss <= LEARNT * self.baseline


def learning(
    metrics: Sequence[Mapping],
    features: Features | None,
    schedule: Schedule | None,
    x: np.ndarray,
) -> Learning | None:
    """Returns what the last loss of training says, or else that of the features.

    Without a schedule, the baseline is 1, that of predicting 0 instead of the noise; of
    features alone, nothing is said then, nor of those at few timesteps. x are the training examples as the network sees
    them.
    """
    if metrics:
        loss, timesteps = metrics[-1]["loss"], None
    elif features is not None and schedule is not None:
        loss, timesteps = features.losses.mean(), features.fingerprint["timesteps"]
        if len(timesteps) < LEAST_TIMESTEPS:
            return None
    else:
        return None
    value = 1.0 if schedule is None else baseline(schedule, x, timesteps)
    return Learning(float(loss), value)


def baseline(
    schedule: Schedule, x: np.ndarray, timesteps: Sequence[int] | None = None
) -> float:
    """Returns the loss of the best prediction from the examples' mean and variance alone.

    With x_t = p x + s eps and target a eps + b x, and v the variance of x around its mean,
    over all examples and entries, the best affine prediction from x_t has the mean squared
    error v (a p - b s)^2 / (p^2 v + s^2). Its mean over timesteps (all if None) is returned.
    A network that is trained on noise gets there, and no further.
    """
    steps = range(schedule.steps) if timesteps is None else timesteps
    t = jnp.asarray(np.asarray(steps))
    one, zero = jnp.ones((len(t), 1)), jnp.zeros((len(t), 1))
    p, s, a, b = (
        np.asarray(function(*pair, t), np.float64)
        for function, pair in (
            (schedule.add_noise, (one, zero)),
            (schedule.add_noise, (zero, one)),
            (schedule.target, (zero, one)),
            (schedule.target, (one, zero)),
        )
    )
    v = max(float(np.var(x[:MOST_ROWS], axis=0).mean()), 1e-12)
    return float((v * (a * p - b * s) ** 2 / (p**2 * v + s**2)).mean())
