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
    """The simple loss of every example, [B] (Ho et al. 2020, eq. 14).

    l_b = (1/d) |predict(x_t, t) - target|^2, d the number of outputs.

    Args:
      predict: maps (x_t [B, ...], t [B]) to predictions [B, ...].
      schedule: the noise schedule; it knows what the target is.
      x: images [B, ...] in [-1, 1].
      t: timesteps [B].
      eps: standard normal noise, shaped as x.
    """
    residual = predict(schedule.add_noise(x, eps, t), t) - schedule.target(x, eps, t)
    return jnp.mean(residual**2, axis=tuple(range(1, residual.ndim)))
