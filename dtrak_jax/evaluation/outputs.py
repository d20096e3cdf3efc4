"""The losses of queries under retrained models: the truth that scores must predict."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.checks import at_least, check_images, function, instance, seed
from dtrak_jax.diffusion import Schedule, denoising_loss
from dtrak_jax.digests import digest, digest_rows, digest_tree, settings_text
from dtrak_jax.evaluation.config import EnsembleConfig
from dtrak_jax.evaluation.truth import named
from dtrak_jax.features.arrays import as_arrays, check_rows
from dtrak_jax.network import Apply, Params, Shapes, network_params, rows_of
from dtrak_jax.parallel import P, Program
from dtrak_jax.progress import progress
from dtrak_jax.rng import fold_in, id_words, normal, stream
from dtrak_jax.switches import standard


def timestep_grid(
    timesteps: int | Sequence[int], schedule: Schedule, name: str = "ensemble.timesteps"
) -> np.ndarray:
    """Returns the timesteps themselves, or that many evenly spaced over the schedule.

    A number T stands for the middles of T equal parts, so that no end counts more.

    Raises:
      ValueError: a timestep, or their number, is out of range; calls it `name`.
    """
    steps = schedule.steps
    if np.ndim(timesteps) == 0:
        timesteps = at_least(name, timesteps, 1, steps)
        parts = (np.arange(timesteps) + 0.5) * steps / timesteps
        return np.floor(parts).astype(np.int32)
    grid = [at_least(f"an entry of {name}", t, 0, steps - 1) for t in timesteps]
    if not grid:
        raise ValueError(
            f"{name} is empty; it must name one or more of 0 to {steps - 1}."
        )
    return np.array(grid, np.int32)


def measure(
    apply: Apply,
    schedule: Schedule,
    params: Params,
    images: np.ndarray,
    ids: np.ndarray,
    settings: "EnsembleConfig | QueryLosses",
    cond=None,
    frozen: Params | None = None,
) -> np.ndarray:
    """Returns the mean denoising loss of every image under several models, [models, n].

    F(x; theta) = mean over timesteps t and draws of (1/d) |prediction - target|^2, the
    "model output" of the D-TRAK paper. The noise is a function of (seed, id, t, draw):
    the same for all models, and drawn from another stream than that of the features.

    Args:
      apply, schedule: the network without dropout, and its noise schedule.
      params: the models' parameters, stacked along a first axis; at most as many models
        as this process has devices, one on each.
      images, ids: what the network is given [n, H, W, C], and the names [n].
      cond, frozen: its conditions and frozen parameters, as in `featurize`.
      settings: timesteps (see `timestep_grid`), draws, seed and batch_size.
    """
    models, n = len(jax.tree.leaves(params)[0]), len(images)
    mesh = parallel.mesh(jax.local_devices()[:models], models)
    losses = losses_function(apply, schedule, mesh)
    params, frozen = parallel.put(params, mesh, P("member")), parallel.put(frozen, mesh)
    words, total = id_words(ids), np.zeros((models, n))
    pairs = [
        (t, np.int32(draw))
        for t in timestep_grid(settings.timesteps, schedule)
        for draw in range(settings.draws)
    ]
    seed, size = np.uint32(settings.seed), min(settings.batch_size, n)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        inputs = jax.tree.map(
            lambda array, rows=rows: parallel.pad(array[rows], size),
            (images, words, cond),
        )
        # All are dispatched before the first is waited for.
        values = [losses(params, frozen, *inputs, t, draw, seed) for t, draw in pairs]
        for value in progress(values, "measure losses", unit="pass", delay=5):
            total[:, rows] += np.asarray(value)[:, : rows.stop - rows.start]
    return total / len(pairs)


@functools.cache
def losses_function(apply: Apply, schedule: Schedule, mesh: jax.sharding.Mesh):
    """Compiles (params, frozen, x [B,...], words [B,2], cond, t, draw, seed) -> losses
    [models, B]."""

    def losses(params, frozen, x, words, cond, t, draw, seed):
        member_params = jax.tree.map(lambda leaf: leaf[0], params)
        network = network_params(member_params, frozen)

        def eps(word):
            return noise(seed, word, t, draw, x.shape[1:])

        def predict(x_t, t):
            return apply(network, x_t, t, cond)

        t_all = jnp.full(len(x), t)
        return denoising_loss(predict, schedule, x, t_all, jax.vmap(eps)(words))[None]

    specs = (P("member"), *7 * [P()])
    return parallel.sharded(losses, mesh, specs, P("member"))


def noise(seed, word, t, draw, shape: tuple[int, ...]) -> jax.Array:
    """Returns the noise of a query, known by its word [2], at a timestep and draw."""
    return normal(fold_in(stream(seed, "outputs"), word[0], word[1], t, draw), shape)


def measured_gradients(
    apply: Apply,
    schedule: Schedule,
    params: Params,
    images: np.ndarray,
    ids: np.ndarray,
    settings: "EnsembleConfig | QueryLosses",
    cond=None,
    frozen: Params | None = None,
) -> Params:
    """Returns the gradient of every image's `measure` by one model's parameters, stacked
    [n, ...] on the host; the arguments are those of `measure`, with one model alone."""
    gradient, words = gradient_function(apply, schedule), id_words(ids)
    grid = timestep_grid(settings.timesteps, schedule)
    draws = np.arange(settings.draws, dtype=np.int32)
    pairs = np.stack(np.meshgrid(grid, draws, indexing="ij"), axis=-1).reshape(-1, 2)
    size = min(settings.batch_size, len(pairs))
    params, frozen = jax.device_put((params, frozen))
    stack = []
    for i in progress(range(len(images)), "gradients", unit="query", delay=5):
        example = jax.tree.map(lambda column, i=i: column[i : i + 1], (images, cond))
        total = 0.0
        for start in range(0, len(pairs), size):
            rows = pairs[start : start + size]
            share = np.pad(np.full(len(rows), 1 / len(pairs)), (0, size - len(rows)))
            given = words[i], parallel.pad(rows, size), share, np.uint32(settings.seed)
            part = jax.device_get(gradient(params, frozen, *example, *given))
            total = part if start == 0 else jax.tree.map(np.add, total, part)
        stack.append(total)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *stack)


@functools.cache
def gradient_function(apply: Apply, schedule: Schedule) -> Callable:
    """Compiles (params, frozen, x [1,...], cond, word [2], pairs [B, 2], shares [B], seed)
    -> the gradient of the sum over pairs (t, draw) of their shares of a query's loss."""

    def total(params, frozen, x, cond, word, pairs, shares, seed):
        network = network_params(params, frozen)

        def many(column):
            return jnp.broadcast_to(column, (len(pairs), *column.shape[1:]))

        def eps(pair):
            return noise(seed, word, pair[0], pair[1], x.shape[1:])

        def predict(x_t, t):
            return apply(network, x_t, t, jax.tree.map(many, cond))

        noises = jax.vmap(eps)(pairs)
        losses = denoising_loss(predict, schedule, many(x), pairs[:, 0], noises)
        return jnp.sum(shares * losses)

    return jax.jit(jax.grad(total))


def losses_program(
    apply: Apply,
    schedule: Schedule,
    params: Params,
    given: Shapes,
    queries: int,
    settings: EnsembleConfig,
    devices: list[jax.Device],
) -> tuple[Program, int]:
    """Returns the program that `measure` calls, and how often for a model on each device."""
    mesh, shape = parallel.mesh(devices, len(devices)), jax.ShapeDtypeStruct
    size = min(settings.batch_size, queries)
    arguments = (
        jax.tree.map(lambda p: shape((len(devices), *p.shape), p.dtype), params),
        given.frozen,
        rows_of(given.x, size),
        shape((size, 2), np.uint32),
        rows_of(given.cond, size),
        *(shape((), dtype) for dtype in (np.int32, np.int32, np.uint32)),
    )
    pairs = len(timestep_grid(settings.timesteps, schedule)) * settings.draws
    program = Program(losses_function(apply, schedule, mesh), arguments, mesh)
    return program, pairs * -(-queries // size)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QueryLosses:
    """The function params -> losses [queries] of a model of one's own, see `measure`.

    It is compiled once for all models. Every model sees the same noise, so that losses
    differ by what the models were trained on and by nothing else.

    Raises:
      ValueError: settings, ids or images are wrong; says what would be right.
    """

    apply: Apply
    """The network without dropout, (params, x, t, cond) -> prediction; or ((params,
    frozen), x, t, cond) where there are frozen parameters."""
    schedule: Schedule
    """The noise schedule that the network was trained with."""
    images: np.ndarray
    """The queries as the network is given them [queries, H, W, C]."""
    _: dataclasses.KW_ONLY
    ids: Sequence[str] | None = None
    """Names that decide the noise, str [queries]; "0", "1", ... if None."""
    cond: Any = None
    """A pytree of arrays with a row for each query, or None."""
    frozen: Params | None = None
    """The network's other parameters, or None."""
    timesteps: int | Sequence[int] = 100
    """The timesteps at which losses are measured: their number, evenly spaced, or
    themselves."""
    draws: int = 3
    """The noise draws at each timestep."""
    seed: int = 0
    """The seed of the noise."""
    bounds: tuple[float, float] | None = None
    """The least and the largest value of a pixel, or None."""
    batch_size: int = 256
    """Noised queries at once; limits memory."""

    def __post_init__(self):
        function("apply", self.apply)
        instance("schedule", self.schedule, Schedule)
        timestep_grid(self.timesteps, self.schedule, "timesteps")
        images = check_images(self.images, self.bounds)
        cond = as_arrays("cond", self.cond)
        check_rows(cond, len(images))
        settings = {
            "images": images,
            "ids": named(self.ids, len(images)),
            "cond": cond,
            "frozen": as_arrays("frozen", self.frozen),
            "draws": at_least("draws", self.draws, 1),
            "seed": seed("seed", self.seed),
            "batch_size": at_least("batch_size", self.batch_size, 1),
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    @standard()
    def __call__(self, params: Params) -> np.ndarray:
        """Returns the loss of every query under one model, float64 [queries]."""
        params = as_arrays("params", params)
        stack = jax.tree.map(lambda leaf: np.asarray(leaf)[None], params)
        queries = self.images, self.ids, self, self.cond, self.frozen
        return measure(self.apply, self.schedule, stack, *queries)[0]

    @functools.cached_property
    def made_from(self) -> str:
        """A hash of the queries, their conditions, the noise and its schedule, and of frozen
        parameters; not of the network."""
        grid = timestep_grid(self.timesteps, self.schedule, "timesteps")
        settings = f"{grid.tolist()} {self.draws} {self.seed}"
        return digest(
            *(settings, settings_text(self.schedule), *digest_rows(self.images)),
            *(digest_tree(self.cond), digest_tree(self.frozen)),
        )
