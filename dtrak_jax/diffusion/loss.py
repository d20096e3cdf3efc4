"""The training loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.network import check_prediction


def denoising_loss(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    x: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    """Returns the simple loss of every example, [B] (Ho et al. 2020, eq. 14).

    l_b = (1/d) |predict(x_t, t) - target|^2, where d is the number of outputs, for
    images x [B, ...], timesteps t [B] and standard normal noise eps [B, ...]. `predict`
    is given x_t and the network's own timesteps, `Schedule.times`; a prediction of
    another shape than x is a ValueError.
    """
    prediction = predict(schedule.add_noise(x, eps, t), schedule.times(t))
    check_prediction(prediction, x)
    residual = prediction - schedule.target(x, eps, t)
    return jnp.mean(residual**2, axis=tuple(range(1, residual.ndim)))
