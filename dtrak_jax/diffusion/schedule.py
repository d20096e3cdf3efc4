"""Noise schedules, which say how much noise there is at each timestep."""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax.checks import at_least, between, items, one_of, positive, real_numbers
from dtrak_jax.diffusion.scheduler_config import read_scheduler
from dtrak_jax.network import Apply

Prediction = Literal["epsilon", "v", "sample", "flow"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The noise of each timestep t = 0 ... T-1, and what the network predicts.

      x_t = signal_t x + noise_t eps,
      signal_t = sqrt(alpha_bar_t), noise_t = sqrt(1 - alpha_bar_t),

    with alpha_t = 1 - beta_t and alpha_bar_t the product of alpha_0 ... alpha_t
    (Ho et al. 2020, eq. 4); or in flow matching (Lipman et al. 2022) signal_t = 1 -
    sigma_t and noise_t = sigma_t.

    A last beta of 1, that is alpha_bar_T-1 = 0, leaves nothing of x (zero terminal SNR;
    Lin et al. 2023). Its noise tells nothing of x then: epsilon is no prediction for it.
    """

    betas: tuple[float, ...] = ()
    """T numbers in (0, 1), of which the last may be 1; none in flow matching."""
    prediction: Prediction = "epsilon"
    """epsilon, the noise; sample, the image x; v, signal_t eps - noise_t x (Salimans & Ho
    2022); or flow, eps - x, in flow matching and only there."""
    sigmas: tuple[float, ...] = ()
    """T rising numbers in (0, 1] of flow matching, see `flow_schedule`; else none."""

    def __post_init__(self):
        one_of("prediction", self.prediction, get_args(Prediction))
        betas, sigmas = (
            tuple(real_numbers(name, items(name, values), ndim=1).tolist())
            for name, values in (("betas", self.betas), ("sigmas", self.sigmas))
        )
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "sigmas", sigmas)
        if self.prediction == "flow":
            rising = all(a < b for a, b in zip((0.0, *sigmas), (*sigmas, 2.0)))
            if betas or not sigmas or not rising or sigmas[-1] > 1:
                raise ValueError(
                    "sigmas of flow matching must be one or more rising numbers above 0 "
                    "and up to 1, and betas empty; `flow_schedule` makes such a schedule."
                )
            return
        if sigmas:
            raise ValueError(
                f"sigmas are for prediction='flow'; prediction is {self.prediction!r}."
            )
        inner, last = betas[:-1], betas[-1:]
        if not last or not all(0 < b < 1 for b in inner) or not 0 < last[0] <= 1:
            raise ValueError(
                "betas must be one or more numbers between 0 and 1, the last up to 1."
            )
        if last[0] == 1 and self.prediction == "epsilon":
            raise ValueError(
                "prediction is 'epsilon', but the last beta is 1 (zero terminal SNR): "
                "nothing of the image is left then, and the noise does not tell it. It "
                "must be 'v' or 'sample'."
            )

    @classmethod
    def from_diffusers(cls, folder: epath.PathLike) -> "Schedule":
        """Returns the schedule that a folder of diffusers describes.

        It is the folder of a pipeline, with scheduler/scheduler_config.json, that of a
        scheduler, or that of a network which has `scheduler` beside it. Fields that say
        how to sample are not used.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: a field or its value has no counterpart here.
        """
        settings = read_scheduler(folder)
        steps = settings["num_train_timesteps"]
        prediction = settings["prediction_type"].removesuffix("_prediction")
        if prediction == "flow":
            dynamic = settings["use_dynamic_shifting"]
            return flow_schedule(steps, 1.0 if dynamic else settings["shift"])
        kind, trained = settings["beta_schedule"], settings["trained_betas"]
        limits = settings["beta_start"], settings["beta_end"]
        if trained is not None:
            betas = tuple(trained)
        elif kind == "squaredcos_cap_v2":
            betas = cosine_schedule(steps).betas
        else:
            betas = SCHEDULES[kind](steps, *limits).betas
        if settings["rescale_betas_zero_snr"]:
            betas = without_signal_at_the_end(betas)
        return cls(betas, prediction)

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas or self.sigmas)

    @functools.cached_property
    def _exact_alpha_bar(self) -> np.ndarray:
        """The numbers `alpha_bar` in float64."""
        if self.sigmas:
            sigma = np.asarray(self.sigmas)
            return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
        return np.cumprod(1.0 - np.asarray(self.betas))

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """The numbers alpha_bar_t, t = 0 ... T-1, float32 [T], computed in float64.

        In flow matching they are signal_t^2 / (signal_t^2 + noise_t^2).
        """
        return self._exact_alpha_bar.astype(np.float32)

    @functools.cached_property
    def elbo_weights(self) -> np.ndarray:
        """The weights of |prediction - target|^2 in the variational bound, float32 [T].

        They are c_t^2 beta_t / (2 alpha_t (1 - alpha_bar_t)) for a variance that is
        fixed to beta_t (Ho et al. 2020, eq. 12), where c_t is the error in eps that an
        error of 1 in the prediction makes: 1 for epsilon, signal_t for v and flow, and
        signal_t / noise_t for sample. Flow matching has the beta_t of its `alpha_bar`.
        """
        alpha_bar = self._exact_alpha_bar
        before = np.concatenate([[1.0], alpha_bar[:-1]])
        alpha = 1 - np.asarray(self.betas) if self.betas else alpha_bar / before
        if self.prediction == "epsilon":
            factor = 1 / alpha
        elif self.prediction == "v":
            factor = before
        elif self.prediction == "sample":
            factor = before / (1 - alpha_bar)
        else:
            sigma = np.asarray(self.sigmas)
            factor = before * ((1 - sigma) ** 2 + sigma**2)
        return (factor * (1 - alpha) / (2 * (1 - alpha_bar))).astype(np.float32)

    def times(self, t: jax.Array) -> jax.Array:
        """Returns timesteps t [B] as the network is given them: t, or T sigma_t in flow
        matching, float32."""
        if not self.sigmas:
            return t
        times = self.steps * np.asarray(self.sigmas)
        return jnp.asarray(times.astype(np.float32))[t]

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
        if self.prediction == "sample":
            return x
        if self.prediction == "flow":
            return eps - x
        signal, noise = self._scales(t, x.ndim)
        return signal * eps - noise * x

    def denoise(
        self, prediction: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (x, eps) that a prediction implies for x_t [B, ...] at t [B]."""
        signal, noise = self._scales(t, x_t.ndim)
        if self.prediction == "epsilon":
            return (x_t - noise * prediction) / signal, prediction
        if self.prediction == "sample":
            return prediction, (x_t - signal * prediction) / noise
        if self.prediction == "flow":
            return x_t - noise * prediction, x_t + signal * prediction
        return signal * x_t - noise * prediction, signal * prediction + noise * x_t

    def _scales(self, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Returns signal_t and noise_t, shaped for a batch."""
        shape = jnp.shape(t) + (1,) * (ndim - 1)
        if self.sigmas:
            sigma = jnp.asarray(np.asarray(self.sigmas, np.float32))[t].reshape(shape)
            return 1 - sigma, sigma
        alpha_bar = jnp.asarray(self.alpha_bar)[t].reshape(shape)
        return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


@functools.cache
def in_own_time(apply: Apply, schedule: Schedule) -> Apply:
    """Returns a network as a function of the schedule's timesteps t = 0 ... T-1."""

    def apply_at(params, x, t, cond):
        return apply(params, x, schedule.times(t), cond)

    return apply_at


def linear_schedule(
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    prediction: str = "epsilon",
) -> Schedule:
    """Returns a schedule whose beta_t grows linearly (Ho et al. 2020)."""
    return Schedule(tuple(_line(steps, beta_start, beta_end)), prediction)


def scaled_linear_schedule(
    steps: int = 1000,
    beta_start: float = 8.5e-4,
    beta_end: float = 0.012,
    prediction: str = "epsilon",
) -> Schedule:
    """Returns a schedule whose sqrt(beta_t) grows linearly (Rombach et al. 2022)."""
    roots = _line(steps, beta_start, beta_end, 0.5)
    return Schedule(tuple(roots**2), prediction)


def _line(steps: int, start: float, end: float, power: float = 1) -> np.ndarray:
    """Returns numbers from start^power to end^power, once the arguments are checked."""
    start, end = between("beta_start", start, 0, 1), between("beta_end", end, 0, 1)
    return np.linspace(start**power, end**power, at_least("steps", steps, 1))


def cosine_schedule(steps: int = 1000, prediction: str = "epsilon") -> Schedule:
    """Returns a schedule whose alpha_bar_t follows a squared cosine.

    beta_t = min(0.999, 1 - f((t+1)/T) / f(t/T)), with
    f(u) = cos^2((u + 0.008) / 1.008 * pi/2) (Nichol & Dhariwal 2021, eq. 17).
    """

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    at_least("steps", steps, 1)
    betas = (min(0.999, 1 - f((t + 1) / steps) / f(t / steps)) for t in range(steps))
    return Schedule(tuple(betas), prediction)


def flow_schedule(steps: int = 1000, shift: float = 1.0) -> Schedule:
    """Returns the schedule of flow matching, with the timesteps of diffusers.

    sigma_t = shift u / (1 + (shift - 1) u), u = (t + 1) / T (Esser et al. 2024, eq. 23),
    rising with t = 0 ... T-1. x_t = (1 - sigma_t) x + sigma_t eps; the network is given
    T sigma_t and predicts eps - x.
    """
    at_least("steps", steps, 1)
    positive("shift", shift)
    u = np.arange(1, steps + 1) / steps
    return Schedule((), "flow", tuple(shift * u / (1 + (shift - 1) * u)))


def without_signal_at_the_end(betas: tuple[float, ...]) -> tuple[float, ...]:
    """Returns betas whose sqrt(alpha_bar_t) is shifted and scaled to end in 0.

    The first one stays (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    signal = np.sqrt(np.cumprod(1 - np.asarray(betas, float)))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alpha_bar = signal**2
    return tuple(1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]]))


SCHEDULES = {
    "linear": linear_schedule,
    "scaled_linear": scaled_linear_schedule,
    "cosine": cosine_schedule,
}

ScheduleName = Literal[tuple(SCHEDULES)]
