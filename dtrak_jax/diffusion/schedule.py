"""Noise schedules, which say how much noise there is at each timestep."""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax.checks import at_least, between, check_fields, one_of
from dtrak_jax.files import at, read_json

Prediction = Literal["epsilon", "v"]

DIFFUSERS_FILE = "scheduler_config.json"

DIFFUSERS_CHOICES = {
    "_class_name": ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "predict_epsilon": (True,),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
}
"""Fields of diffusers' schedulers, and the values that a `Schedule` can have.

The first value is diffusers' default.
"""

DIFFUSERS_NUMBERS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
"""Numeric fields of diffusers' schedulers, and the defaults of its DDPMScheduler."""

DIFFUSERS_SAMPLING = (
    "clip_sample",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "set_alpha_to_one",
    "skip_prk_steps",
    "steps_offset",
    "tensor_format",
    "thresholding",
    "timestep_spacing",
    "timestep_values",
    "variance_type",
)
"""Fields of diffusers' schedulers that say how to sample, not how to add noise."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Variances beta_t of the forward process, and what the network predicts.

    x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) eps, t = 0 ... T-1, with
    alpha_t = 1 - beta_t and alpha_bar_t the product of alpha_0 ... alpha_t
    (Ho et al. 2020, eq. 4).
    """

    betas: tuple[float, ...]
    """T numbers in (0, 1)."""
    prediction: Prediction = "epsilon"
    """epsilon, the noise; or v, sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x
    (Salimans & Ho 2022)."""

    def __post_init__(self):
        betas = tuple(float(beta) for beta in self.betas)
        if not betas or not all(0 < beta < 1 for beta in betas):
            raise ValueError("betas must be one or more numbers between 0 and 1.")
        one_of("prediction", self.prediction, get_args(Prediction))
        object.__setattr__(self, "betas", betas)

    @classmethod
    def from_diffusers(cls, folder: epath.PathLike) -> "Schedule":
        """Returns the schedule that a folder of diffusers describes.

        It is the folder of a pipeline, with scheduler/scheduler_config.json, or that of
        a scheduler. Fields that say how to sample are not used.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: a field or its value has no counterpart here.
        """
        folder = at(folder)
        paths = folder / "scheduler" / DIFFUSERS_FILE, folder / DIFFUSERS_FILE
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"{folder} has no scheduler/{DIFFUSERS_FILE} and no {DIFFUSERS_FILE}; "
                "it must be the folder of a diffusers pipeline or scheduler."
            )
        settings = {field: allowed[0] for field, allowed in DIFFUSERS_CHOICES.items()}
        settings |= DIFFUSERS_NUMBERS
        known = {*settings, *DIFFUSERS_SAMPLING}
        settings |= read_json(path)
        for field, allowed in DIFFUSERS_CHOICES.items():
            one_of(f"{path}: {field}", settings[field], allowed)
        check_fields(str(path), settings, known)
        steps, start, end = (settings[field] for field in DIFFUSERS_NUMBERS)
        kind = settings["beta_schedule"]
        prediction = settings["prediction_type"].removesuffix("_prediction")
        at_least(f"{path}: num_train_timesteps", steps, 1)
        if kind == "squaredcos_cap_v2":
            return cosine_schedule(steps, prediction)
        between(f"{path}: beta_start", start, 1e-12, 0.999)
        between(f"{path}: beta_end", end, start, 0.999)
        return SCHEDULES[kind](steps, start, end, prediction)

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """The products alpha_bar_t, t = 0 ... T-1, float32 [T], computed in float64."""
        return np.cumprod(1.0 - np.asarray(self.betas)).astype(np.float32)

    @functools.cached_property
    def elbo_weights(self) -> np.ndarray:
        """The weights of |eps_hat - eps|^2 in the variational bound, float32 [T].

        They are beta_t / (2 alpha_t (1 - alpha_bar_t)), for a variance that is fixed to
        beta_t (Ho et al. 2020, eq. 12).
        """
        beta = np.asarray(self.betas)
        alpha_bar = np.cumprod(1.0 - beta)
        return (beta / (2 * (1 - beta) * (1 - alpha_bar))).astype(np.float32)

    def __repr__(self) -> str:
        first, last = self.alpha_bar[[0, -1]]
        shares = f"alpha_bar {first:.4g} … {last:.4g}"
        return f"Schedule({self.steps} steps, {shares}, {self.prediction})"

    def add_noise(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Returns x_t of images x [B, ...] with noise eps [B, ...], timesteps t [B]."""
        signal, noise = self._scales(t, x.ndim)
        return signal * x + noise * eps

    def target(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Returns what a perfect network predicts for x_t; shapes as in `add_noise`."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self._scales(t, x.ndim)
        return signal * eps - noise * x

    def denoise(
        self, prediction: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (x, eps) that a prediction implies for x_t [B, ...] at t [B]."""
        signal, noise = self._scales(t, x_t.ndim)
        if self.prediction == "epsilon":
            return (x_t - noise * prediction) / signal, prediction
        return signal * x_t - noise * prediction, signal * prediction + noise * x_t

    def _scales(self, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Returns sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped for a batch."""
        alpha_bar = jnp.asarray(self.alpha_bar)[t]
        alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (ndim - 1))
        return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def linear_schedule(
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    prediction: str = "epsilon",
) -> Schedule:
    """Returns a schedule whose beta_t grows linearly (Ho et al. 2020)."""
    return Schedule(tuple(np.linspace(beta_start, beta_end, steps)), prediction)


def scaled_linear_schedule(
    steps: int = 1000,
    beta_start: float = 8.5e-4,
    beta_end: float = 0.012,
    prediction: str = "epsilon",
) -> Schedule:
    """Returns a schedule whose sqrt(beta_t) grows linearly (Rombach et al. 2022)."""
    roots = np.linspace(beta_start**0.5, beta_end**0.5, steps)
    return Schedule(tuple(roots**2), prediction)


def cosine_schedule(steps: int = 1000, prediction: str = "epsilon") -> Schedule:
    """Returns a schedule whose alpha_bar_t follows a squared cosine.

    beta_t = min(0.999, 1 - f((t+1)/T) / f(t/T)), with
    f(u) = cos^2((u + 0.008) / 1.008 * pi/2) (Nichol & Dhariwal 2021, eq. 17).
    """

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = (min(0.999, 1 - f((t + 1) / steps) / f(t / steps)) for t in range(steps))
    return Schedule(tuple(betas), prediction)


SCHEDULES = {
    "linear": linear_schedule,
    "scaled_linear": scaled_linear_schedule,
    "cosine": cosine_schedule,
}

ScheduleName = Literal[tuple(SCHEDULES)]
