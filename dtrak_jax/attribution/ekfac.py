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
from dtrak_jax.attribution.kernel import Damping
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.checks import at_least, instance, positive
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.features.curvature import Block, Curvature
from dtrak_jax.features.featurize import (
    StepPrograms,
    checked,
    example_mesh,
    gradient_rounds,
    step_programs,
)
from dtrak_jax.features.fingerprint import Role, example_hashes, noise_words
from dtrak_jax.features.gradients import EXAMPLES
from dtrak_jax.features.passes import HIGHEST
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import chunks_of
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard

EKFAC_DAMPING = 0.001
"""lambda in these units. It was chosen by the LDS on digits, where anything from 3e-5 to .01
is within .01 of the best, and .1 loses .03."""

QUERY_BYTES = 2**30
"""The bytes of preconditioned gradients on each device. Where all queries have more, the
training images pass by several times."""


@standard()
def ekfac_influence(
    curvature: Curvature,
    train: np.ndarray | Dataset,
    query: np.ndarray | Dataset | dict[str, np.ndarray | Dataset],
    *,
    damping: float | Damping = EKFAC_DAMPING,
    ids: Sequence[str] | None = None,
    cond: object = None,
    query_ids: Sequence[str] | dict[str, Sequence[str]] | None = None,
    query_cond: object = None,
    bounds: tuple[float, float] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 64,
) -> Scores | dict[str, Scores]:
    """Scores every training image for every query by influence functions,

      tau(q, n) = sum_j g_j(q)^T (F + Lambda)^-1 g_j(n),

    over the pairs j of a timestep and a noise draw of the curvature's task, g_j the
    gradient of the loss; or with the single g, the mean over pairs, where the task
    averages, as Mlodozeniec et al. (arXiv 2410.13850) do. F, a mean over images, is the
    same for all pairs. Lambda is lambda_l I in the block of each leaf l of the parameters.
    On digits (LDS, 5 pairs, 4 cotangents) the mean is the better one.

    Args:
      curvature: F, the network, and the task: its timesteps, noise and whether it
        averages; `dataclasses.replace(curvature, task=...)` gives it another one.
      train, query: images as `featurize` takes them; or several sets of queries by name,
        whose `query_ids` and `query_cond`, if there are any, have the same names.
      damping: lambda_l in units of the mean eigenvalue of its own block, without those that
        are of rounding errors; or `absolute(lambda)`, the same for all.
      ids, cond, query_ids, query_cond, bounds, batch_size: those of `featurize`.
      groups: as of `attribute`.

    Returns:
      The scores; {name: scores} of several sets. All processes must call this together.
      With 2 independent draws or more, kept apart, they have standard errors as those of
      `attribute`.

    Raises:
      ValueError: what `featurize` raises; a damping of 0; noise that is cyclic, which
        training images do not have; or groups of other examples.
    """
    instance("curvature", curvature, Curvature)
    damping = Damping.of(damping)
    if damping.share:
        raise ValueError(
            "damping is by a share of min(n, k), which is of kernels; EK-FAC takes a "
            "number of mean eigenvalues, or absolute(lambda)."
        )
    units = curvature.mean_eigenvalues
    if damping.absolute:
        units = np.where(np.isfinite(units), 1, np.inf)
    values = positive("damping", damping.value) * units
    if curvature.task.noise == "cyclic":
        raise ValueError(
            "noise is 'cyclic', a control by features of queries; the curvature's task "
            "must have other noise."
        )
    one_of_many = functools.partial(_examples, curvature, bounds)
    train_ids, train = one_of_many("train", train, ids, cond)
    several, many = isinstance(query, dict), []
    if several:
        _check_sets(query, query_ids=query_ids, query_cond=query_cond)
    for name, images in query.items() if several else [("", query)]:
        given = [c[name] if several and c else c for c in (query_ids, query_cond)]
        many.append((name, *one_of_many("query", images, *given)))
    columns = check_columns(groups, len(train_ids))
    total = PairSum(curvature.task.draws if curvature.task.per_timestep else 1, columns)
    joined = jax.tree.map(lambda *sets: np.concatenate(sets), *(e for *_, e in many))
    size = at_least("batch_size", batch_size, 1)
    for tau in _pairs(curvature, values, train, joined, size):
        total.add(tau)
    fields = {"train_ids": np.array(train_ids), "method": "ekfac", "columns": columns}
    fields |= {"damping": damping, "lambdas": values}
    results, start = {}, 0
    for name, names, _ in many:
        rows = slice(start, start + len(names))
        results[name] = summed(total, rows, query_ids=np.array(names), **fields)
        start = rows.stop
    return results if several else results[""]


def _check_sets(query: dict, **given) -> None:
    """Raises a ValueError unless there are sets of queries, and what is given by set is of
    the same."""
    if not query:
        raise ValueError("query is {}; it must have one set of queries or more.")
    for name, by_set in given.items():
        if by_set and (not isinstance(by_set, dict) or by_set.keys() != query.keys()):
            raise ValueError(
                f"{name} must be a dict with the sets of query, {sorted(query)}."
            )


def _examples(
    curvature: Curvature, bounds, role: Role, images, ids, cond
) -> tuple[tuple[str, ...], tuple]:
    """Returns the ids of examples, and (x, words, position, cond) of `microbatches`."""
    network = curvature.params, curvature.frozen
    _, ids, x, cond = checked(curvature.task, network, images, ids, cond, bounds)
    words = noise_words(example_hashes(ids, x, cond), role)
    return ids, (x, words, np.arange(len(ids), dtype=np.int32), cond)


def _pairs(
    curvature: Curvature,
    values: np.ndarray,
    train: tuple,
    query: tuple,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Yields the scores [q, n] of each pair, or of the mean of all, at these lambdas."""
    (x, *_, cond), mesh = train, example_mesh(jax.local_devices(), 1)
    task, params, frozen = curvature.task, curvature.params, curvature.frozen
    how = x, Projection("none"), mesh, batch_size
    programs = step_programs(task, params, *how, frozen=frozen, cond=cond)
    on_mesh = parallel.put((params, frozen, {}), mesh)
    blocks = parallel.put(list(curvature.blocks.values()), mesh)
    divide, product = divide_function(mesh), product_function(mesh)
    values = values.astype(np.float32)
    n, q, layout = len(x), len(query[0]), programs.layout
    mine = parallel.share(n)
    train = jax.tree.map(lambda column: column[mine], train)
    chunks = chunks_of(q, queries_at_once(layout.dim))
    pairs = range(layout.pairs) if layout.apart else [None]
    with progress(None, "ekfac", len(pairs) * len(chunks) * n, "image") as bar:
        for pair in pairs:
            rows = []
            for chunk in chunks:
                queries = jax.tree.map(lambda column, c=chunk: column[c], query)
                rounds = _gradients(programs, on_mesh, queries, pair)
                done = [jax.device_get(divide(g, blocks, values)) for g in rounds]
                # What fills up the last round is left out.
                count = chunk.stop - chunk.start
                parts = [
                    np.concatenate(part)[:count] for part in zip(*done, strict=True)
                ]
                divided, columns = parallel.put(parts, mesh), []
                left = len(train[0])
                for gradients in _gradients(programs, on_mesh, train, pair):
                    columns.append(product(gradients, divided))
                    jax.block_until_ready(columns[-2:][0])
                    bar.update(min(layout.size, left))
                    left = max(0, left - layout.size)
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


def queries_at_once(p: int) -> int:
    """Returns how many queries' gradients of length p are on a device at one time."""
    return max(1, QUERY_BYTES // (4 * p))


def score_calls(
    programs: StepPrograms, blocks: list[Block], n: int, queries: int
) -> list[tuple[Program, int]]:
    """Returns the programs that score n training images, a process's share, and how often
    each is called. Shapes will do for F's blocks.
    """
    layout, mesh = programs.layout, programs.gradients.mesh
    shape = jax.ShapeDtypeStruct
    (gradients,) = programs.project.arguments[0].values()
    chunks = chunks_of(queries, queries_at_once(layout.dim))
    largest = chunks[0].stop
    divided = [shape((largest, part.shape[1]), part.dtype) for part in gradients]
    of_queries = sum(-(-(c.stop - c.start) // layout.size) for c in chunks)
    of_train = len(chunks) * -(-n // layout.size)
    divide = gradients, blocks, shape((len(blocks),), np.float32)
    calls = [
        (programs.gradients, (of_queries + of_train) * layout.parts),
        (Program(divide_function(mesh), divide, mesh), of_queries),
        (Program(product_function(mesh), (gradients, divided), mesh), of_train),
    ]
    return [(program, count * layout.per_example) for program, count in calls]


@functools.cache
def divide_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (gradients, blocks, lambdas) -> (F + lambda I)^-1 g, parts [S, p_i]."""

    def divide(gradients, blocks, values):
        parts = enumerate(zip(blocks, gradients, strict=True))
        return [block.divide(part, values[i]) for i, (block, part) in parts]

    return sharded(divide, mesh, (EXAMPLES, P(), P()), EXAMPLES)


@functools.cache
def product_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (gradients [S, p_i], divided [Q, p_i]) -> inner products [S, Q]."""

    def product(gradients, divided):
        pairs = zip(gradients, divided, strict=True)
        return sum(jnp.einsum("sp,qp->sq", g, u, precision=HIGHEST) for g, u in pairs)

    return sharded(product, mesh, (EXAMPLES, P()), EXAMPLES)
