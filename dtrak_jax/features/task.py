"""A task: what exactly is differentiated, and with which noise."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtrak_jax.config import NOISES, STRATEGIES, at_least, one_of, pattern
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.features.measurements import Measurement, named
from dtrak_jax.streams import fold_in, stream


@dataclasses.dataclass(frozen=True)
class Task:
    """The gradient feature of an image x, before projection:

      g_j(x) = grad_theta f(prediction of x_t, target, t),
      x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) eps,

    for each pair j of a timestep t and a noise draw; or the mean of g_j over all
    pairs.

    Attributes:
      apply: the network, (params, x [B,H,W,C], t [B], cond) -> prediction [B,H,W,C];
        any pure function, params any pytree. `cond` is None or what `featurize` was
        given for these images.
      schedule: the noise schedule that the network was trained with.
      measurement: f: a name, a function (prediction, target, t, schedule) -> scalar of
        one image, or a tuple of them, whose gradients then share one forward pass.
      timesteps: how many, or the timesteps themselves.
      strategy: which, if only their number is given: "uniform", every (T // number)-th
        from 0 on; or "cumulative", the first ones.
      noise: "common", eps a function of (seed, t, draw), the same for every image;
        "independent", also of the image's id; "reference", also of the image's
        position modulo `noise_batch`, as in the paper's code; "cyclic", the common
        noise of the next pair: give it to the queries only, as a control that
        training images and queries no longer share their noise.
      noise_batch: see "reference".
      draws: noise draws per timestep.
      per_timestep: keep the pairs apart, each with a kernel of its own; or average.
      parameters: regular expression; only parameters whose path, such as
        "mid_block/conv/kernel", it finds somewhere are differentiated. Empty: all.
      seed: of the noise.

    Raises:
      ValueError: a field is out of range; says which, and what is allowed.
      TypeError: apply is not a function.
    """

    apply: Callable
    schedule: Schedule
    measurement: str | Measurement | tuple[str | Measurement, ...] = "square"
    timesteps: int | tuple[int, ...] = 10
    strategy: str = "uniform"
    noise: str = "common"
    noise_batch: int = 52
    draws: int = 1
    per_timestep: bool = True
    parameters: str = ""
    seed: int = 0

    def __post_init__(self):
        if not callable(self.apply):
            raise TypeError(
                f"apply is {self.apply!r}; it must be a function "
                "(params, x, t, cond) -> prediction."
            )
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("noise", self.noise, NOISES)
        at_least("noise_batch", self.noise_batch, 1)
        at_least("draws", self.draws, 1)
        at_least("seed", self.seed, 0)
        pattern("parameters", self.parameters)
        if isinstance(self.measurement, list):
            object.__setattr__(self, "measurement", tuple(self.measurement))
        if not isinstance(self.timesteps, int):
            timesteps = tuple(int(t) for t in self.timesteps)
            object.__setattr__(self, "timesteps", timesteps)
        last = self.schedule.steps - 1
        number = self.timesteps if isinstance(self.timesteps, int) else 1
        if not 1 <= number <= self.schedule.steps:
            raise ValueError(
                f"timesteps is {number}; the schedule has 1 to {self.schedule.steps}."
            )
        if not self.grid or not all(0 <= t <= last for t in self.grid):
            raise ValueError(
                f"timesteps is {self.grid}; it must name one or more of 0 to {last}."
            )
        if len(set(self.grid)) != len(self.grid):
            raise ValueError(f"timesteps is {self.grid}; one of them is there twice.")
        if self.noise == "cyclic" and len(self.pairs) < 2:
            raise ValueError(
                "noise='cyclic' takes the next pair's noise; it needs two or more "
                "pairs of a timestep and a draw."
            )
        if not self.measurements:
            raise ValueError("measurement is empty; name one or more.")

    @functools.cached_property
    def measurements(self) -> dict[str, Measurement]:
        """The measurements by name."""
        given = self.measurement
        given = given if isinstance(given, tuple) else (given,)
        return dict(named(measurement) for measurement in given)

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """The timesteps."""
        if not isinstance(self.timesteps, int):
            return self.timesteps
        uniform = self.strategy == "uniform"
        stride = self.schedule.steps // self.timesteps if uniform else 1
        return tuple(range(0, stride * self.timesteps, stride))

    @functools.cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (timestep, draw) pairs; the first axis of features kept apart."""
        return tuple((t, draw) for t in self.grid for draw in range(self.draws))

    def eps(
        self,
        pair: jax.Array,
        words: jax.Array,
        position: jax.Array,
        shape: tuple[int, ...],
    ) -> jax.Array:
        """The noise of one image at one pair.

        Args:
          pair: index into `pairs`.
          words: the image's id as uint32 [2], see `streams.id_words`.
          position: the image's index in its data set.
          shape: of the image.
        """
        if self.noise == "cyclic":
            pair = (pair + 1) % len(self.pairs)
        t, draw = jnp.asarray(self.pairs, jnp.int32)[pair]
        key = fold_in(stream(self.seed, "noise"), t, draw)
        if self.noise == "independent":
            key = fold_in(key, words[0], words[1])
        if self.noise == "reference":
            key = fold_in(key, position % self.noise_batch)
        return jax.random.normal(key, shape)
