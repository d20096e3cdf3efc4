"""DDIM and ancestral sampling."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.checks import at_least, between, check_choices, seed
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.network import Apply, Params, check_prediction, rows_of
from dtrak_jax.parallel import P, Program
from dtrak_jax.progress import progress
from dtrak_jax.rng import fold_in, normal, stream
from dtrak_jax.switches import standard

SamplerKind = Literal["ddim", "ancestral"]


@dataclass(frozen=True)
class Sampler:
    """The settings of sampling, which goes down through `sampling_timesteps`.

    A step goes from t to the next s, and at the end to s < 0. With alpha_bar_s = 1 for
    s < 0 (Song et al. 2021, eq. 12 and 16):

      x_s = sqrt(alpha_bar_s) x + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
      sigma^2 = eta^2 (1 - alpha_bar_s) / (1 - alpha_bar_t)
                (1 - alpha_bar_t / alpha_bar_s)

    where x (clipped to [-1, 1] if `clip`) and eps follow from the network's
    prediction. "ddim" keeps that eps when x was clipped, as the reference does.
    "ancestral" is eta = 1 with eps recomputed from the clipped x: the posterior of
    Ho et al. 2020, eq. 7.
    """

    schedule: Schedule
    kind: SamplerKind = "ddim"
    steps: int = 50
    """The number of steps, at most T."""
    eta: float = 0.0
    """The noise of DDIM, from 0 to 1; "ancestral" does not use it."""
    clip: bool = True
    offset: int = 0
    """Added to every timestep, as diffusers' steps_offset."""
    to_one: bool = True
    """False takes alpha_bar_0 for alpha_bar_s where s < 0, as Stable Diffusion does."""

    def __post_init__(self):
        check_choices("sampler", self)
        at_least("sampler.steps", self.steps, 1)
        if self.steps > self.schedule.steps:
            raise ValueError(
                f"sampler.steps is {self.steps}; it must be at most "
                f"{self.schedule.steps}, the number of timesteps of the schedule."
            )
        between("sampler.eta", self.eta, 0, 1)
        if self.schedule.prediction == "flow":
            raise ValueError(
                "sampler.schedule is one of flow matching, which these samplers do not "
                "know; generate with the network's own sampler, and give the images as "
                "queries."
            )
        first = sampling_timesteps(self.schedule, self.steps)[0]
        between("sampler.offset", self.offset, 0, self.schedule.steps - 1 - first)


def sampling_timesteps(schedule: Schedule, steps: int, offset: int = 0) -> np.ndarray:
    """Returns the timesteps that sampling goes through, descending, [steps].

    They are floor(i T / steps) + offset, i = steps-1 ... 0: those of diffusers with
    timestep_spacing="leading" where the number of steps divides T.
    """
    return np.arange(steps)[::-1] * schedule.steps // steps + offset


@functools.cache
def guided(apply: Apply, scale: float) -> Apply:
    """Returns a network under classifier-free guidance (Ho and Salimans 2022).

    Its prediction is p(negative) + scale (p(prompt) - p(negative)), arXiv 2207.12598,
    eq. 6; its condition is a pair (prompt, negative) of the network's conditions.
    """

    def guided_apply(params, x, t, cond):
        def twice(*halves):
            return jnp.concatenate(halves)

        both = apply(params, twice(x, x), twice(t, t), jax.tree.map(twice, *cond))
        prompt, negative = jnp.split(both, 2)
        return negative + scale * (prompt - negative)

    return guided_apply


@standard()
def sample(
    apply: Apply,
    params: Params,
    sampler: Sampler,
    seeds: np.ndarray,
    shape: tuple[int, ...],
    *,
    batch_size: int = 128,
    cond: Any = None,
    trajectory: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Generates one image for each seed, which depends on this seed alone.

    Args:
      apply, params: the network.
      sampler: the settings of sampling.
      seeds: integers [n].
      shape: the shape (H, W, C) of an image.
      batch_size: images at once on each device.
      cond: the conditions, a pytree of arrays with n rows, or None.
      trajectory: also return the image predicted in each step.

    Returns:
      float32 [n, *shape]; with `trajectory` a pair of these and of the predicted
      images in the order of `sampling_timesteps`, float32 [n, steps, *shape].
    """
    count = len(seeds)
    for value in seeds:
        seed("a seed", value)
    for leaf in jax.tree.leaves(cond):
        if len(leaf) != count:
            raise ValueError(f"cond has {len(leaf)} rows; there are {count} seeds.")
    mesh = parallel.mesh(jax.local_devices())
    step, params = step_function(apply, sampler, mesh), parallel.put(params, mesh)
    size = batch_of(count, batch_size, mesh.size)
    padded = count + -count % size
    inputs = jax.tree.map(
        lambda leaf: parallel.pad(np.asarray(leaf), padded),
        (np.asarray(seeds, np.uint32), cond),
    )
    timesteps = sampling_timesteps(sampler.schedule, sampler.steps, sampler.offset)
    moves = list(zip(timesteps, np.append(timesteps[1:], -1), strict=True))
    images = np.zeros((padded, *shape), np.float32)
    predicted = np.zeros((padded, len(moves) * trajectory, *shape), np.float32)
    total = padded // size * len(moves)
    with progress(total=total, desc="sample", unit="step") as bar:
        for start in range(0, padded, size):
            rows = slice(start, start + size)
            batch_seeds, batch_cond = jax.tree.map(itemgetter(rows), inputs)
            x = parallel.put(_initial_noise(batch_seeds, shape), mesh, P("data"))
            for i, (t, s) in enumerate(moves):
                x, x_0 = step(params, x, batch_seeds, batch_cond, t, s)
                if trajectory:
                    predicted[rows, i] = x_0
                bar.update()
            images[rows] = x
    return (images[:count], predicted[:count]) if trajectory else images[:count]


def sample_program(
    apply: Apply,
    params: Params,
    sampler: Sampler,
    shape: tuple[int, ...],
    count: int,
    batch_size: int,
    devices: Sequence[jax.Device],
    cond: Any = None,
) -> tuple[Program, int]:
    """Returns the program of a sampling step, and how often `sample` calls it.

    It samples `count` images; `params` may be shapes, and `cond` are those of the
    conditions of one image.
    """
    mesh = parallel.mesh(devices)
    size = batch_of(count, batch_size, mesh.size)
    x = jax.ShapeDtypeStruct((size, *shape), np.float32)
    seeds = jax.ShapeDtypeStruct((size,), np.uint32)
    t = jax.ShapeDtypeStruct((), np.int32)
    function = step_function(apply, sampler, mesh)
    arguments = params, x, seeds, rows_of(cond, size), t, t
    program = Program(function, arguments, mesh)
    return program, -(-count // size) * sampler.steps


def batch_of(count: int, batch_size: int, devices: int) -> int:
    """Returns the number of images in a step, `batch_size` or fewer for each device."""
    size = max(1, min(batch_size * devices, count))
    return size + -size % devices


@functools.partial(jax.jit, static_argnums=1)
def _initial_noise(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns x_T of every seed, [n, *shape]."""
    keys = jax.vmap(lambda seed: stream(seed, "sample"))(seeds)
    return jax.vmap(lambda key: normal(key, shape))(keys)


def sampling_step(
    sampler: Sampler,
    prediction: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    s: jax.Array,
    z: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns x_s and the predicted images x, both [B, ...]; see `Sampler`.

    All images go from timestep t to s, which is negative at the end; z is standard
    normal noise [B, ...], or None if the step adds none.
    """
    check_prediction(prediction, x_t)
    schedule = sampler.schedule
    x, eps = schedule.denoise(prediction, x_t, jnp.full(len(x_t), t))
    if sampler.clip:
        x = jnp.clip(x, -1, 1)
    alpha_bar = jnp.asarray(schedule.alpha_bar)
    last = 1.0 if sampler.to_one else alpha_bar[0]
    alpha_bar_t, alpha_bar_s = alpha_bar[t], jnp.where(s >= 0, alpha_bar[s], last)
    eta = sampler.eta
    if sampler.kind == "ancestral":
        eta = 1.0
        eps = (x_t - jnp.sqrt(alpha_bar_t) * x) / jnp.sqrt(1 - alpha_bar_t)
    variance = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    variance *= 1 - alpha_bar_t / alpha_bar_s
    # Rounding may leave a tiny negative number where eta is 1.
    direction = jnp.sqrt(jnp.maximum(1 - alpha_bar_s - variance, 0))
    x_s = jnp.sqrt(alpha_bar_s) * x + direction * eps
    return x_s if z is None else x_s + jnp.sqrt(variance) * z, x


@functools.cache
def step_function(apply: Apply, sampler: Sampler, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the compiled sampling step of a batch that is sharded over the mesh.

    The function is (params, x_t, seeds, cond, t, s) -> (x_s, x), as in
    `sampling_step`, with a seed for each image.
    """

    def noise(seed, t, shape):
        return normal(fold_in(stream(seed, "sample-step"), t), shape)

    def sample_step(params, x_t, seeds, cond, t, s):
        z = None
        if sampler.kind == "ancestral" or sampler.eta > 0:
            z = jax.vmap(lambda seed: noise(seed, t, x_t.shape[1:]))(seeds)
        prediction = apply(params, x_t, jnp.full(len(x_t), t), cond)
        return sampling_step(sampler, prediction, x_t, t, s, z)

    specs = (P(), P("data"), P("data"), P("data"), P(), P())
    return parallel.sharded(sample_step, mesh, specs, P("data"))
