"""Influence functions with EK-FAC's curvature, of whole gradients.

Nothing is projected: preconditioned gradients of queries stay on the devices, and those of
training images pass by, a microbatch at a time, and are never kept.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.attribution.errors import PairSum, summed
from dtrak_jax.attribution.groups import check_columns
from dtrak_jax.attribution.kernel import DEFAULT_DAMPING, Damping
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.checks import at_least, instance, positive
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.features.curvature import HIGHEST, Curvature
from dtrak_jax.features.featurize import (
    StepPrograms,
    checked,
    example_mesh,
    gradient_rounds,
    step_programs,
)
from dtrak_jax.features.fingerprint import Role, example_hashes, noise_words
from dtrak_jax.features.gradients import EXAMPLES
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import chunks_of
from dtrak_jax.parallel import P, sharded
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard

QUERY_BYTES = 2**30
"""The bytes of preconditioned gradients on each device. Where all queries have more, the
training images pass by several times."""


@standard()
def ekfac_influence(
    curvature: Curvature,
    train: np.ndarray | Dataset,
    query: np.ndarray | Dataset,
    *,
    damping: float | Damping = DEFAULT_DAMPING,
    ids: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None),
    cond: tuple[object, object] = (None, None),
    bounds: tuple[float, float] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 64,
) -> Scores:
    """Scores every training image for every query by influence functions,

      tau(q, n) = sum_j g_j(q)^T (F + lambda I)^-1 g_j(n),

    over the pairs j of a timestep and a noise draw of the curvature's task, g_j the
    gradient of the loss; or with the single g, the mean over pairs, where the task
    averages. F, a mean over images, is the same for all pairs. Koh and Liang (arXiv
    1703.04730), with F of `ekfac`; Mlodozeniec et al. (arXiv 2410.13850) average.

    Args:
      curvature: F, the network, and the task: its timesteps, noise and whether it
        averages; `dataclasses.replace(curvature, task=...)` gives it another one.
      train, query: images as `featurize` takes them.
      damping: lambda in units of F's mean eigenvalue, trace(F) / p; or `absolute(lambda)`.
      ids, cond: of `featurize`, for training images and for queries.
      bounds, batch_size: of `featurize`.
      groups: as of `attribute`.

    Returns:
      The scores, all processes alike, which must call this together. With 2 independent
      draws or more, kept apart, they have standard errors as those of `attribute`.

    Raises:
      ValueError: what `featurize` raises; a damping of 0; or groups of other examples.
    """
    instance("curvature", curvature, Curvature)
    damping = Damping.of(damping)
    unit = 1 if damping.absolute else curvature.mean_eigenvalue
    value = positive("damping", damping.value) * unit
    task, sides, names = curvature.task, [], []
    for role, images, side in (("train", train, 0), ("query", query, 1)):
        more = images, ids[side], cond[side], bounds
        names_of_side, examples = _examples(curvature, role, *more)
        names.append(np.array(names_of_side))
        sides.append(examples)
    columns = check_columns(groups, len(names[0]))
    independent = task.per_timestep and task.noise != "cyclic"
    total = PairSum(task.draws if independent else 1, columns)
    size = at_least("batch_size", batch_size, 1)
    for tau in _pairs(curvature, value, *sides, size):
        total.add(tau)
    return summed(
        total,
        train_ids=names[0],
        query_ids=names[1],
        method="ekfac",
        columns=columns,
        damping=damping,
        lambdas=np.array([value]),
    )


def _examples(
    curvature: Curvature, role: Role, images, ids, cond, bounds
) -> tuple[tuple[str, ...], tuple]:
    """Returns the ids of examples, and (x, words, position, cond) of `microbatches`."""
    network = curvature.params, curvature.frozen
    _, ids, x, cond = checked(curvature.task, network, images, ids, cond, bounds)
    words = noise_words(example_hashes(ids, x, cond), role)
    return ids, (x, words, np.arange(len(ids), dtype=np.int32), cond)


def _pairs(
    curvature: Curvature, value: float, train: tuple, query: tuple, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields the scores [q, n] of each pair at lambda = `value`, or of the mean of all."""
    task, (x, *_, cond), mesh = (
        curvature.task,
        train,
        example_mesh(jax.local_devices(), 1),
    )
    network = curvature.params, curvature.frozen
    programs = step_programs(
        task, network[0], x, Projection("none"), mesh, batch_size,
        frozen=network[1], cond=cond,
    )  # fmt: skip
    on_mesh = parallel.put((*network, {}), mesh)
    blocks = parallel.put(list(curvature.blocks.values()), mesh)
    divide, product = divide_function(mesh), product_function(mesh)
    n, q, layout = len(x), len(query[0]), programs.layout
    mine = parallel.share(n)
    train = jax.tree.map(lambda column: column[mine], train)
    chunks = chunks_of(q, max(1, QUERY_BYTES // (4 * layout.dim)))
    pairs = range(layout.pairs) if layout.apart else [None]
    with progress(None, "ekfac", len(pairs) * len(chunks) * n, "image") as bar:
        for pair in pairs:
            rows = []
            for chunk in chunks:
                queries = jax.tree.map(lambda column, c=chunk: column[c], query)
                rounds = _gradients(programs, on_mesh, queries, pair)
                done = [jax.device_get(divide(g, blocks, value)) for g in rounds]
                # What fills up the last round is left out.
                count = chunk.stop - chunk.start
                parts = [
                    np.concatenate(part)[:count] for part in zip(*done, strict=True)
                ]
                divided, columns = parallel.put(parts, mesh), []
                for gradients in _gradients(programs, on_mesh, train, pair):
                    columns.append(product(gradients, divided))
                    jax.block_until_ready(columns[-2:][0])
                    bar.update(layout.size)
                of_process = np.zeros((0, count), np.float32)
                if columns:
                    of_process = np.concatenate(jax.device_get(columns))
                of_process = of_process[: len(train[0])]
                rows.append(parallel.gather(of_process, n).T)
            yield np.concatenate(rows).astype(np.float64)


def _gradients(
    programs: StepPrograms, network: tuple, examples: tuple, pair: int | None
) -> Iterator[list[jax.Array]]:
    """Yields the gradients of the loss of each round, a list of parts [S, p_i]."""
    for gradients, _ in gradient_rounds(programs, network, examples, pair):
        (parts,) = gradients.values()
        yield parts


@functools.cache
def divide_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (gradients, blocks, lambda) -> (F + lambda I)^-1 g, parts [S, p_i]."""

    def divide(gradients, blocks, value):
        pairs = zip(blocks, gradients, strict=True)
        return [block.divide(part, value) for block, part in pairs]

    return sharded(divide, mesh, (EXAMPLES, P(), P()), EXAMPLES)


@functools.cache
def product_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (gradients [S, p_i], divided [Q, p_i]) -> inner products [S, Q]."""

    def product(gradients, divided):
        pairs = zip(gradients, divided, strict=True)
        return sum(jnp.einsum("sp,qp->sq", g, u, precision=HIGHEST) for g, u in pairs)

    return sharded(product, mesh, (EXAMPLES, P()), EXAMPLES)
