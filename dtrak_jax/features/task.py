"""A task says what exactly is differentiated, and with which noise."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.checks import at_least, function, instance, one_of, pattern, seed
from dtrak_jax.diffusion.schedule import Schedule, in_own_time
from dtrak_jax.features.measurements import Measurement, Probe, named
from dtrak_jax.network import Apply, mean_of
from dtrak_jax.rng import fold_in, normal, stream

Noise = Literal["common", "independent", "reference", "cyclic"]
Strategy = Literal["uniform", "cumulative"]
Variance = Literal["refuse", "ignore"]

REFERENCE_SHARD = 1000
"""Examples in a shard of the paper's code, in each of which its batches begin anew."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The gradient feature of an image x, before projection:

      g_j(x) = grad_theta f(prediction of x_t, target, t),
      x_t = signal_t x + noise_t eps (see `Schedule`),

    for each pair j of a timestep t and a noise draw; or the mean of g_j over all
    pairs.

    Attributes:
      apply: the network, (params, x [B,H,W,C], t [B], cond) -> prediction [B,H,W,C];
        any pure function, params any pytree, or (params, frozen) where `featurize` is
        given both. `cond` is None, or these images' rows of what `featurize` is given.
        In flow matching t is in the network's own unit, see `Schedule.times`.
      schedule: the noise schedule that the network was trained with.
      measurement: f: a name, a function (prediction, target, t, schedule) -> scalar of
        one image, or a tuple of them, whose gradients then share one forward pass; or
        the random ones of `probes`.
      timesteps: their number K, or the timesteps themselves.
      strategy: the choice of K of T timesteps: "uniform", floor(i T / K) for i < K; or
        "cumulative", the first K. Where K does not divide T, the paper's code takes
        every floor(T / K)-th and divides their sum by K: for K = 3 give (0, 333, 666,
        999); the mean of these four is 3/4 of the paper's features.
      noise: "common", eps a function of (seed, t, draw), the same for every image;
        "independent", also of the image's id and role, see `featurize`, or else of its
        own content, so that no training image has a query's noise by accident;
        "reference", also of the image's slot
        in the paper's batches, (position mod 1000) mod `noise_batch`, which begin anew
        in each shard of 1000 images (of 10,000 for CIFAR-10, which is not reproduced):
        a query shares its noise with the training images of its own slot, which come
        first for that reason, nine times in ten at 10 timesteps;
        "cyclic", the common noise of the next pair: give it to the queries only, as a
        control that training images and queries no longer share their noise.
      noise_batch: the number of slots of "reference".
      draws: noise draws per timestep; 2 or more, kept apart, give scores their standard
        errors.
      per_timestep: True keeps the pairs apart, each with a kernel of its own; False
        averages their gradients.
      parameters: a regular expression; only parameters whose path, such as
        "mid_block/conv/kernel", it finds somewhere are differentiated. Empty: all.
      seed: of the noise.
      variance: of a network whose prediction has twice the channels of x, since it also
        learned a variance (Nichol & Dhariwal 2021): "ignore" takes the first half, the
        mean; "refuse" is an error.
    """

    apply: Callable
    schedule: Schedule
    measurement: str | Measurement | tuple[str | Measurement | Probe, ...] = "square"
    timesteps: int | tuple[int, ...] = 10
    strategy: Strategy = "uniform"
    noise: Noise = "common"
    noise_batch: int = 52
    draws: int = 1
    per_timestep: bool = True
    parameters: str = ""
    seed: int = 0
    variance: Variance = "refuse"

    def __post_init__(self):
        function("apply", self.apply)
        instance("schedule", self.schedule, Schedule)
        instance("per_timestep", self.per_timestep, bool, np.bool_)
        one_of("strategy", self.strategy, get_args(Strategy))
        one_of("noise", self.noise, get_args(Noise))
        one_of("variance", self.variance, get_args(Variance))
        pattern("parameters", self.parameters)
        steps, timesteps = self.schedule.steps, self.timesteps
        if np.ndim(timesteps):
            kept = tuple(at_least("a timestep", t, 0) for t in timesteps)
        else:
            kept = at_least("timesteps", timesteps, 1, steps)
        settings = {
            "measurement": self.measurement,
            "timesteps": kept,
            "noise_batch": at_least("noise_batch", self.noise_batch, 1),
            "draws": at_least("draws", self.draws, 1),
            "seed": seed("seed", self.seed),
        }
        if isinstance(self.measurement, list):
            settings["measurement"] = tuple(self.measurement)
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        if not self.grid or not set(self.grid) <= set(range(steps)):
            raise ValueError(
                f"timesteps is {self.grid}; it must name one or more of 0 to {steps - 1}."
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

    def __repr__(self) -> str:
        grid = f"timestep {self.grid[0]}"
        if len(self.grid) > 1:
            grid = f"{len(self.grid)} timesteps {self.grid[0]} … {self.grid[-1]}"
        draws = f" × {self.draws} draws" if self.draws > 1 else ""
        means = "" if self.per_timestep else ", averaged"
        return (
            f"Task({', '.join(self.measurements)}, {grid}{draws}{means}, {self.noise} "
            f"noise, seed {self.seed})"
        )

    @functools.cached_property
    def network(self) -> Apply:
        """The network as a function of the schedule's timesteps, without a variance."""
        apply = self.apply
        if self.schedule.sigmas:
            apply = in_own_time(apply, self.schedule)
        return mean_of(apply) if self.variance == "ignore" else apply

    @functools.cached_property
    def measurements(self) -> dict[str, Measurement | Probe]:
        """The measurements by name."""
        several = isinstance(self.measurement, tuple)
        entries = list(map(named, self.measurement if several else (self.measurement,)))
        names = [name for name, _ in entries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"measurement has {names.count(name)} entries that are called "
                    f"{name!r}; their features would be one. Give each another name."
                )
        return dict(entries)

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """The timesteps."""
        number = self.timesteps
        if not isinstance(number, int):
            return number
        end = self.schedule.steps if self.strategy == "uniform" else number
        return tuple(i * end // number for i in range(number))

    @functools.cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (timestep, draw) pairs; the first axis of features kept apart."""
        return tuple((t, draw) for t in self.grid for draw in range(self.draws))

    def eps(
        self, pair: jax.Array, words: jax.Array, position: jax.Array, shape: tuple
    ) -> jax.Array:
        """Returns the noise of one image at one pair, an index into `pairs`.

        The image is known by the words [2] of `fingerprint.noise_words` and by its
        position in the data set.
        """
        if self.noise == "cyclic":
            pair = (pair + 1) % len(self.pairs)
        t, draw = jnp.asarray(self.pairs, jnp.int32)[pair]
        key = fold_in(stream(self.seed, "noise"), t, draw)
        if self.noise == "independent":
            key = fold_in(key, words[0], words[1])
        if self.noise == "reference":
            key = fold_in(key, position % REFERENCE_SHARD % self.noise_batch)
        return normal(key, shape)

    def cotangent_key(self, pair: jax.Array, words: jax.Array) -> jax.Array:
        """Returns the key of the random cotangents of one image at one pair, see `eps`."""
        t, draw = jnp.asarray(self.pairs, jnp.int32)[pair]
        return fold_in(stream(self.seed, "cotangent"), t, draw, *words)
