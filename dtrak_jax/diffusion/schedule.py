"""Noise schedules: how much noise there is at each timestep."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.config import PREDICTIONS, DiffusionConfig, one_of


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Variances beta_t of the forward process, and what the network predicts.

    x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) eps, t = 0 ... T-1, with
    alpha_t = 1 - beta_t and alpha_bar_t the product of alpha_0 ... alpha_t
    (Ho et al. 2020, eq. 4).

    Attributes:
      betas: T numbers in (0, 1).
      prediction: "epsilon", the noise; or "v", sqrt(alpha_bar_t) eps -
        sqrt(1 - alpha_bar_t) x (Salimans & Ho 2022).
    """

    betas: tuple[float, ...]
    prediction: str = "epsilon"

    def __post_init__(self):
        betas = tuple(float(beta) for beta in self.betas)
        if not betas or not all(0 < beta < 1 for beta in betas):
            raise ValueError("betas must be one or more numbers between 0 and 1.")
        one_of("prediction", self.prediction, PREDICTIONS)
        object.__setattr__(self, "betas", betas)

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar_t for t = 0 ... T-1, float32 [T] (computed in float64)."""
        return np.cumprod(1.0 - np.asarray(self.betas)).astype(np.float32)

    @functools.cached_property
    def elbo_weights(self) -> np.ndarray:
        """w_t = beta_t / (2 alpha_t (1 - alpha_bar_t)), float32 [T].

        The weight of |eps_hat - eps|^2 in the variational bound with the variance
        fixed to beta_t (Ho et al. 2020, eq. 12).
        """
        beta = np.asarray(self.betas)
        alpha_bar = np.cumprod(1.0 - beta)
        return (beta / (2 * (1 - beta) * (1 - alpha_bar))).astype(np.float32)

    def add_noise(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """x_t of the images x [B, ...] with noise eps [B, ...] at timesteps t [B]."""
        signal, noise = self._scales(t, x.ndim)
        return signal * x + noise * eps

    def target(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """What a perfect network would predict for x_t; shapes as in `add_noise`."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self._scales(t, x.ndim)
        return signal * eps - noise * x

    def denoise(
        self, prediction: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(x, eps) that the prediction implies for x_t [B, ...] at t [B]."""
        signal, noise = self._scales(t, x_t.ndim)
        if self.prediction == "epsilon":
            return (x_t - noise * prediction) / signal, prediction
        return signal * x_t - noise * prediction, signal * prediction + noise * x_t

    def _scales(self, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
        """(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)), shaped to scale a batch."""
        alpha_bar = jnp.asarray(self.alpha_bar)[t]
        alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (ndim - 1))
        return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def linear_schedule(
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    prediction: str = "epsilon",
) -> Schedule:
    """beta_t grows linearly from beta_start to beta_end (Ho et al. 2020)."""
    return Schedule(tuple(np.linspace(beta_start, beta_end, steps)), prediction)


def scaled_linear_schedule(
    steps: int = 1000,
    beta_start: float = 8.5e-4,
    beta_end: float = 0.012,
    prediction: str = "epsilon",
) -> Schedule:
    """sqrt(beta_t) grows linearly, as in latent diffusion (Rombach et al. 2022)."""
    roots = np.linspace(beta_start**0.5, beta_end**0.5, steps)
    return Schedule(tuple(roots**2), prediction)


def cosine_schedule(steps: int = 1000, prediction: str = "epsilon") -> Schedule:
    """alpha_bar_t follows a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    beta_t = min(0.999, 1 - f((t+1)/T) / f(t/T)),
    f(u) = cos^2((u + 0.008) / 1.008 * pi/2).
    """

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = (min(0.999, 1 - f((t + 1) / steps) / f(t / steps)) for t in range(steps))
    return Schedule(tuple(betas), prediction)


def build(config: DiffusionConfig) -> Schedule:
    """The schedule that a run's settings describe."""
    if config.schedule == "cosine":
        return cosine_schedule(config.steps, config.prediction)
    make = {"linear": linear_schedule, "scaled_linear": scaled_linear_schedule}
    return make[config.schedule](
        config.steps, config.beta_start, config.beta_end, config.prediction
    )
