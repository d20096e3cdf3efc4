"""Measurements f: the scalar of the network's output whose gradient is the feature.

Each takes the prediction and the target of one noised image (arrays of d elements),
its timestep and the schedule, and returns a scalar. Names and formulas are those of
"Intriguing Properties of Data Attribution on Diffusion Models" (D-TRAK, section 4).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.checks import at_least, one_of
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.rng import fold_in, normal, stream

Measurement = Callable[[jax.Array, jax.Array, jax.Array, Schedule], jax.Array]


def loss(prediction, target, t, schedule):
    """Returns (1/d) |prediction - target|^2, the measurement of TRAK."""
    return jnp.mean((prediction - target) ** 2)


def square(prediction, target, t, schedule):
    """Returns (1/d) |prediction|^2, the measurement of D-TRAK."""
    return jnp.mean(prediction**2)


def mean(prediction, target, t, schedule):
    """Returns (1/d) sum_j prediction_j."""
    return jnp.mean(prediction)


def l1(prediction, target, t, schedule):
    """Returns sum_j |prediction_j|."""
    return jnp.sum(jnp.abs(prediction))


def l2(prediction, target, t, schedule):
    """Returns sqrt(sum_j prediction_j^2)."""
    return jnp.sqrt(jnp.sum(prediction**2))


def linf(prediction, target, t, schedule):
    """Returns max_j |prediction_j|."""
    return jnp.max(jnp.abs(prediction))


def elbo(prediction, target, t, schedule):
    """Returns (w_t/d) |eps_hat - eps|^2, w_t = beta_t / (2 alpha_t (1 - alpha_bar_t)).

    eps_hat is the noise that the prediction implies, see `Schedule.elbo_weights`.
    """
    weight = jnp.asarray(schedule.elbo_weights)[t]
    return weight * jnp.mean((prediction - target) ** 2)


@dataclasses.dataclass(frozen=True)
class Probe:
    """The inner product of the prediction with a random cotangent c = eta sqrt(2/D), eta ~
    N(0, I), another one for each image and pair, so that E c c^T = (2/D) I."""

    number: int

    @property
    def __name__(self) -> str:
        return f"probe{self.number}"

    def __call__(self, prediction: jax.Array, key: jax.Array) -> jax.Array:
        """Returns <c, prediction> for an image's key, a number."""
        key = fold_in(key, self.number)
        return jnp.vdot(random_cotangent(key, prediction), prediction)


def probes(count: int = 8) -> tuple[Probe, ...]:
    """Returns random readouts of the whole output, to be a task's measurements.

    Their gradients are P J^T c, J the derivative of the prediction of D entries; c is
    random, see `Probe`. Features of queries by them are what the method "das" takes:

      task = dtrak.Task(apply, schedule, dtrak.probes(8), ...)
      queries = dtrak.featurize(task, params, images, projection)  # {name: features}

    Raises:
      ValueError: a count below 1.
    """
    return tuple(map(Probe, range(at_least("count", count, 1))))


def random_cotangent(key: jax.Array, prediction: jax.Array) -> jax.Array:
    """Returns c = eta sqrt(2/D), eta ~ N(0, I), for a prediction of D entries."""
    return math.sqrt(2 / prediction.size) * normal(key, prediction.shape)


def value_of(
    measure: Measurement | Probe,
    prediction: jax.Array,
    target: jax.Array,
    t: jax.Array,
    key: jax.Array,
    schedule: Schedule,
) -> jax.Array:
    """Returns a measurement of one noised image; those but `Probe` leave nothing to chance."""
    if isinstance(measure, Probe):
        return measure(prediction, key)
    return measure(prediction, target, t, schedule)


FUNCTIONS = {f.__name__: f for f in (loss, square, mean, l1, l2, linf, elbo)}

MEASUREMENTS = {name: name for name in FUNCTIONS} | {
    "mean-squared-l2-norm": "square",
    "l1-norm": "l1",
    "l2-norm": "l2",
    "linf-norm": "linf",
    "weighted-mse": "elbo",
}
"""Every accepted name of a measurement, such as those of the D-TRAK paper's code, with
the name it stands for."""

RESERVED = (*FUNCTIONS, "losses")
"""Names that functions of a user must not have: of measurements, and of what stores keep."""

MeasurementName = Literal[tuple(MEASUREMENTS)]


def named(measurement: str | Measurement | Probe) -> tuple[str, Measurement | Probe]:
    """Returns a measurement's name and function, given either, or an alias.

    Raises:
      ValueError: an unknown name (lists the known ones), or a function without one or
        with that of something else.
    """
    if callable(measurement):
        name = getattr(measurement, "__name__", "")
        if name in RESERVED and measurement is not FUNCTIONS.get(name):
            raise ValueError(
                f"the measurement {measurement!r} is called {name!r}, which is known "
                f"already. Its name must not be one of: {', '.join(RESERVED)}."
            )
        if not name.isidentifier():
            raise ValueError(
                f"the measurement {measurement!r} has no name to file its features "
                "under; define it with `def`, or set its __name__."
            )
        return name, measurement
    one_of("measurement", measurement, MEASUREMENTS)
    name = MEASUREMENTS[measurement]
    return name, FUNCTIONS[name]


def check_values(
    measurements: dict[str, Measurement | Probe],
    schedule: Schedule,
    shape: tuple[int, ...],
) -> None:
    """Raises a ValueError unless every measurement is a number of floating point."""
    x = jax.ShapeDtypeStruct(shape, np.float32)
    key = jax.eval_shape(lambda: stream(0, "cotangent"))
    given = x, x, jax.ShapeDtypeStruct((), np.int32), key
    for name, f in measurements.items():
        value = jax.eval_shape(
            functools.partial(value_of, f, schedule=schedule), *given
        )
        dtype = getattr(value, "dtype", np.dtype(object))
        scalar = getattr(value, "shape", None) == ()
        if not (scalar and jnp.issubdtype(dtype, np.floating)):
            raise ValueError(
                f"the measurement {name!r} makes {value} of one image; it must make one "
                "number of floating point, such as a mean."
            )
