"""The training loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtrak_jax.diffusion.schedule import Schedule


def denoising_loss(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    x: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    """Returns the simple loss of every example, [B] (Ho et al. 2020, eq. 14).

    l_b = (1/d) |predict(x_t, t) - target|^2, where d is the number of outputs.

    x are images [B, ...], t timesteps [B] and eps standard normal noise [B, ...];
    `predict` maps (x_t, t) to predictions, and `schedule` says what the target is.
    """
    residual = predict(schedule.add_noise(x, eps, t), t) - schedule.target(x, eps, t)
    return jnp.mean(residual**2, axis=tuple(range(1, residual.ndim)))
