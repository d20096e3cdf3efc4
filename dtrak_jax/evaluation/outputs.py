"""What retrained models make of the queries: the truth that scores must predict."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.config import EnsembleConfig
from dtrak_jax.diffusion.loss import denoising_loss
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.parallel import P
from dtrak_jax.streams import fold_in, id_words, stream


def timestep_grid(timesteps: int | tuple[int, ...], schedule: Schedule) -> np.ndarray:
    """The timesteps themselves, or that many evenly spaced over all of the schedule.

    Of a number T the middles of T equal parts, so that no end counts more.

    Raises:
      ValueError: one of them, or their number, is out of range.
    """
    last = schedule.steps - 1
    if isinstance(timesteps, int):
        if not 1 <= timesteps <= schedule.steps:
            raise ValueError(
                f"ensemble.timesteps is {timesteps}; the schedule has 1 to "
                f"{schedule.steps}."
            )
        parts = (np.arange(timesteps) + 0.5) * schedule.steps / timesteps
        return np.floor(parts).astype(np.int32)
    grid = np.array(timesteps, np.int32)
    if not len(grid) or grid.min() < 0 or grid.max() > last:
        raise ValueError(
            f"ensemble.timesteps is {timesteps}; it must name one or more of 0 to {last}."
        )
    return grid


def measure(
    apply: Callable,
    schedule: Schedule,
    params,
    images: np.ndarray,
    ids: np.ndarray,
    settings: EnsembleConfig,
) -> np.ndarray:
    """The mean denoising loss of every image under several models, [models, n].

    F(x; theta) = mean over timesteps t and draws of (1/d) |prediction - target|^2, the
    "model output" of the D-TRAK paper. The noise is a function of (seed, id, t, draw):
    the same for all models, and drawn from another stream than that of the features.

    Args:
      apply: the network, (params, x, t, cond) -> prediction, without dropout.
      schedule: the noise schedule.
      params: of the models, stacked along a first axis; at most as many models as
        this process has devices, one on each.
      images: [n, H, W, C] in [-1, 1].
      ids: their names [n].
      settings: its timesteps (see `timestep_grid`), draws, seed and batch_size.
    """
    models, n = len(jax.tree.leaves(params)[0]), len(images)
    mesh = parallel.mesh(jax.local_devices()[:models], models)
    losses = _losses(apply, schedule, mesh)
    params = parallel.place(params, mesh, P("member"))
    words = id_words(ids)
    total = np.zeros((models, n))
    grid = timestep_grid(settings.timesteps, schedule)
    pairs = [(t, d) for t in grid for d in range(settings.draws)]
    seed, size = np.uint32(settings.seed), min(settings.batch_size, n)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        x, w = (parallel.pad(a[rows], size) for a in (images, words))
        # All are dispatched before the first is waited for.
        values = [losses(params, x, w, t, np.int32(d), seed) for t, d in pairs]
        for value in values:
            total[:, rows] += np.asarray(value)[:, : rows.stop - rows.start]
    return total / len(pairs)


@functools.cache
def _losses(apply: Callable, schedule: Schedule, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (params, x [B,...], words [B,2], t, draw, seed) -> losses [models, B]."""

    def per_device(params, x, words, t, draw, seed):
        own = jax.tree.map(lambda leaf: leaf[0], params)

        def eps(word):
            key = fold_in(stream(seed, "outputs"), word[0], word[1], t, draw)
            return jax.random.normal(key, x.shape[1:])

        def predict(x_t, t):
            return apply(own, x_t, t, None)

        t_all = jnp.full(len(x), t)
        return denoising_loss(predict, schedule, x, t_all, jax.vmap(eps)(words))[None]

    specs = (P("member"), P(), P(), P(), P(), P())
    return parallel.over_mesh(per_device, mesh, specs, P("member"))
