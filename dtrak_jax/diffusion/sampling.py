"""DDIM and ancestral sampling."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dtrak_jax import parallel
from dtrak_jax.config import SAMPLERS, at_least, between, one_of
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.parallel import P
from dtrak_jax.streams import fold_in, stream


def sample(
    apply: Callable,
    params,
    schedule: Schedule,
    seeds: np.ndarray,
    shape: tuple[int, ...],
    *,
    sampler: str = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    clip: bool = True,
    batch_size: int = 128,
    cond: np.ndarray | None = None,
    trajectory: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Generates one image for each seed: float32 [n, *shape].

    One step from t to s = t - T // steps, with alpha_bar_s = 1 for s < 0
    (Song et al. 2021, eq. 12 and 16):

      x_s = sqrt(alpha_bar_s) x + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
      sigma^2 = eta^2 (1 - alpha_bar_s) / (1 - alpha_bar_t)
                (1 - alpha_bar_t / alpha_bar_s)

    where x (clipped to [-1, 1] if `clip`) and eps follow from the network's
    prediction. "ddim" keeps that eps when x was clipped, as the reference does.
    "ancestral" is eta = 1 with eps recomputed from the clipped x: the posterior of
    Ho et al. 2020, eq. 7. Every image depends on its own seed alone.

    Args:
      apply: the network, (params, x, t, cond) -> prediction.
      params: its parameters.
      schedule: the noise schedule that it was trained with.
      seeds: integers [n].
      shape: of one image, (H, W, C).
      sampler: "ddim" or "ancestral".
      steps: number of steps, at most T.
      eta: noise of DDIM, 0 to 1; "ancestral" has no use for it.
      clip: whether predicted images are clipped.
      batch_size: images at once on each device.
      cond: what each image is conditioned on [n, ...], or None.
      trajectory: also return x, the image predicted in every step, in the order of
        `sampling_timesteps` [n, steps, *shape].
    """
    one_of("sampler", sampler, SAMPLERS)
    at_least("steps", steps, 1)
    between("steps", steps, 1, schedule.steps)
    between("eta", eta, 0, 1)
    devices = jax.local_devices()
    mesh = parallel.mesh(devices)
    step = _step_function(apply, schedule, mesh, sampler == "ancestral", eta, clip)
    params = parallel.place(params, mesh)
    stride = schedule.steps // steps
    timesteps = sampling_timesteps(schedule, steps)
    predicted = np.zeros((len(seeds), steps if trajectory else 0, *shape), np.float32)
    size = max(1, min(batch_size * len(devices), len(seeds)))
    size += -size % len(devices)
    images = np.zeros((len(seeds), *shape), np.float32)
    starts = range(0, len(seeds), size)
    with tqdm(
        total=len(starts) * steps, desc="sample", unit="step", disable=None, leave=None
    ) as bar:
        for start in starts:
            rows = slice(start, min(start + size, len(seeds)))
            batch_seeds = parallel.pad(np.asarray(seeds[rows], np.uint32), size)
            batch_cond = None if cond is None else parallel.pad(cond[rows], size)
            x = parallel.place(_initial_noise(batch_seeds, shape), mesh, P("data"))
            for i, t in enumerate(timesteps):
                x, x_0 = step(params, x, batch_seeds, batch_cond, t, t - stride)
                if trajectory:
                    predicted[rows, i] = np.asarray(x_0)[: rows.stop - rows.start]
                bar.update()
            images[rows] = np.asarray(x)[: rows.stop - rows.start]
    return (images, predicted) if trajectory else images


def sampling_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """The timesteps that `sample` goes through, descending to 0 [steps]."""
    return np.arange(steps)[::-1] * (schedule.steps // steps)


@functools.partial(jax.jit, static_argnums=1)
def _initial_noise(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x_T of every seed [n, *shape]."""
    return jax.vmap(lambda seed: jax.random.normal(stream(seed, "sample"), shape))(
        seeds
    )


def sampling_step(
    schedule: Schedule,
    prediction: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    s: jax.Array,
    z: jax.Array | None,
    *,
    ancestral: bool,
    eta: float,
    clip: bool,
) -> tuple[jax.Array, jax.Array]:
    """x_s and x [B, ...] of x_t [B, ...], one t and one s for all; see `sample`.

    z is standard normal noise, or None where the step has none.
    """
    x, eps = schedule.denoise(prediction, x_t, jnp.full(len(x_t), t))
    if clip:
        x = jnp.clip(x, -1, 1)
    alpha_bar = jnp.asarray(schedule.alpha_bar)
    now, after = alpha_bar[t], jnp.where(s >= 0, alpha_bar[s], 1.0)
    if ancestral:
        eta, eps = 1.0, (x_t - jnp.sqrt(now) * x) / jnp.sqrt(1 - now)
    variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
    # Rounding may leave a tiny negative number where eta is 1.
    direction = jnp.sqrt(jnp.maximum(1 - after - variance, 0))
    x_s = jnp.sqrt(after) * x + direction * eps
    return x_s if z is None else x_s + jnp.sqrt(variance) * z, x


@functools.cache
def _step_function(
    apply: Callable,
    schedule: Schedule,
    mesh: jax.sharding.Mesh,
    ancestral: bool,
    eta: float,
    clip: bool,
) -> Callable:
    """Compiles one sampling step for a batch spread over the mesh."""

    def noise(seed, t, shape):
        return jax.random.normal(fold_in(stream(seed, "sample-step"), t), shape)

    def step(params, x_t, seeds, cond, t, s):
        z = None
        if ancestral or eta:
            z = jax.vmap(lambda seed: noise(seed, t, x_t.shape[1:]))(seeds)
        prediction = apply(params, x_t, jnp.full(len(x_t), t), cond)
        return sampling_step(
            schedule, prediction, x_t, t, s, z, ancestral=ancestral, eta=eta, clip=clip
        )

    specs = (P(), P("data"), P("data"), P("data"), P(), P())
    return parallel.over_mesh(step, mesh, specs, P("data"))
