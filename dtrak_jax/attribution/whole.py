"""Influence by whole gradients, which are not projected.

The solutions of queries, u = (G + Lambda)^-1 g, stay on the devices, and the gradients of
training images pass by, a microbatch at a time, and are never kept.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.attribution.damping import Damping
from dtrak_jax.attribution.errors import PairSum, summed
from dtrak_jax.attribution.groups import check_columns
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
from dtrak_jax.features.microbatches import Layout
from dtrak_jax.features.passes import HIGHEST
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import chunks_of
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.progress import progress

QUERY_BYTES = 2**30
"""The bytes of the solutions of queries on each device. Where all queries have more, the
training images pass by several times."""

Parts = list[np.ndarray]
"""Vectors of the length of a gradient, an array [S, p_i] for each leaf."""


class System(NamedTuple):
    """The parts of the equations (G + Lambda) u = g of queries."""

    curvature: Curvature
    mesh: jax.sharding.Mesh
    network: tuple  # (params, frozen), on the mesh
    blocks: list[Block]  # of the curvature, on the mesh
    lambdas: np.ndarray  # of the blocks, float32; infinite where u is 0
    train: tuple  # (x, words, position, cond) of all training images
    batch_size: int


Solve = Callable[[int | None, Iterator[list[jax.Array]], int], Iterator[Parts]]
"""Makes the solutions u of a pair, or of the mean of all (None): of the first so many rows of
rounds of gradients g; rows that follow them are left out."""


def whole_influence(
    method: str,
    solver: Callable[[System], Solve],
    curvature: Curvature,
    train: np.ndarray | Dataset,
    query: np.ndarray | Dataset | dict[str, np.ndarray | Dataset],
    *,
    damping: float | Damping,
    ids: Sequence[str] | None,
    cond: object,
    query_ids: Sequence[str] | dict[str, Sequence[str]] | None,
    query_cond: object,
    bounds: tuple[float, float] | None,
    groups: Mapping[str, Sequence[str]] | None,
    batch_size: int,
) -> Scores | dict[str, Scores]:
    """Returns sum_j u_j(q)^T g_j(n), u of a solver; all else is that of `ekfac_influence`."""
    instance("curvature", curvature, Curvature)
    damping = Damping.of(damping)
    if damping.share:
        raise ValueError(
            f"damping is by a share of min(n, k), which is of kernels; {method} takes a "
            "number of mean eigenvalues, or absolute(lambda)."
        )
    units = curvature.mean_eigenvalues
    if damping.absolute:
        units = np.where(np.isfinite(units), 1, np.inf)
    lambdas = positive("damping", damping.value) * units
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
    mesh = example_mesh(jax.local_devices(), 1)
    system = System(
        curvature,
        mesh,
        parallel.put((curvature.params, curvature.frozen), mesh),
        parallel.put(list(curvature.blocks.values()), mesh),
        lambdas.astype(np.float32),
        train,
        at_least("batch_size", batch_size, 1),
    )
    for tau in _pairs(method, system, solver(system), joined):
        total.add(tau)
    fields = {"train_ids": np.array(train_ids), "method": method, "columns": columns}
    fields |= {"damping": damping, "lambdas": lambdas}
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
    method: str, system: System, solve: Solve, query: tuple
) -> Iterator[np.ndarray]:
    """Yields the scores [q, n] of each pair, or of the mean of all."""
    x, *_, cond = system.train
    params, frozen = system.curvature.params, system.curvature.frozen
    how = x, Projection("none"), system.mesh, system.batch_size
    task = system.curvature.task
    programs = step_programs(task, params, *how, frozen=frozen, cond=cond)
    layout, n, q = programs.layout, len(x), len(query[0])
    train = _rows(system.train, parallel.share(n))
    chunks = chunks_of(q, queries_at_once(layout.dim))
    pairs = range(layout.pairs) if layout.apart else [None]
    with progress(None, method, len(pairs) * len(chunks) * n, "image") as bar:
        for pair in pairs:
            gradients = functools.partial(_gradients, programs, system, pair)
            rows = []
            for chunk in chunks:
                of_pair = functools.partial(solve, pair)
                solutions = _solutions(
                    programs, of_pair, gradients, _rows(query, chunk)
                )
                solutions = parallel.put(solutions, system.mesh)
                columns = _products(programs, gradients(train), solutions)
                of_process = [np.zeros((0, chunk.stop - chunk.start), np.float32)]
                left = len(train[0])
                for column in columns:
                    of_process.append(column[:left])
                    bar.update(len(of_process[-1]))
                    left -= len(of_process[-1])
                rows.append(parallel.gather(np.concatenate(of_process), n).T)
            yield np.concatenate(rows).astype(np.float64)


def _solutions(
    programs: StepPrograms, solve: Callable, gradients: Callable, query: tuple
) -> Parts:
    """Returns the solutions of queries, of which each process makes a share."""
    count = len(query[0])
    of_process = _rows(query, parallel.share(count))
    (shapes,) = programs.project.arguments[0].values()
    blocks = [[np.zeros((0, part.shape[1]), np.float32) for part in shapes]]
    blocks += solve(gradients(of_process), len(of_process[0]))
    parts = map(np.concatenate, zip(*blocks, strict=True))
    return [parallel.gather(part, count) for part in parts]


def _products(
    programs: StepPrograms, rounds: Iterator[list[jax.Array]], solutions: list
) -> Iterator[np.ndarray]:
    """Yields the inner products of rounds of gradients with solutions [S, q]."""
    product = product_function(programs.gradients.mesh)
    started = (product(gradients, solutions) for gradients in rounds)
    # Two rounds under way keep the devices busy; more would take memory.
    for columns, _ in itertools.pairwise(itertools.chain(started, [None])):
        yield jax.device_get(columns)


def _gradients(
    programs: StepPrograms, system: System, pair: int | None, examples: tuple
) -> Iterator[list[jax.Array]]:
    """Yields the gradients of the loss of each round, a list of parts [S, p_i]."""
    network = (*system.network, {})
    for gradients, _ in gradient_rounds(programs, network, examples, pair):
        (parts,) = gradients.values()
        yield parts


def _rows(examples: tuple, rows: slice) -> tuple:
    """Returns some rows of (x, words, position, cond)."""
    return jax.tree.map(lambda column: column[rows], examples)


def queries_at_once(p: int, vectors: int = 1) -> int:
    """Returns how many queries are on a device at one time, of so many vectors of length
    p each."""
    return max(1, QUERY_BYTES // (4 * p * vectors))


def solve_calls(layout: Layout, size: int, queries: int, processes: int) -> int:
    """Returns how many blocks of `size` queries the busiest process solves."""
    chunks = chunks_of(queries, queries_at_once(layout.dim))
    of_process = [-(-(c.stop - c.start) // processes) for c in chunks]
    return sum(-(-count // size) for count in of_process) * layout.per_example


def score_calls(
    programs: StepPrograms, n: int, queries: int, processes: int
) -> list[tuple[Program, int]]:
    """Returns the programs that score n training images, a process's share, by solutions,
    and how often each is called."""
    layout, mesh = programs.layout, programs.gradients.mesh
    (gradients,) = programs.project.arguments[0].values()
    chunks = chunks_of(queries, queries_at_once(layout.dim))
    largest = chunks[0].stop
    solutions = [
        jax.ShapeDtypeStruct((largest, part.shape[1]), part.dtype) for part in gradients
    ]
    of_queries = solve_calls(layout, layout.size, queries, processes)
    of_train = len(chunks) * -(-n // layout.size) * layout.per_example
    return [
        (programs.gradients, (of_queries + of_train) * layout.parts),
        (Program(product_function(mesh), (gradients, solutions), mesh), of_train),
    ]


@functools.cache
def product_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (gradients [S, p_i], solutions [Q, p_i]) -> inner products [S, Q]."""

    def product(gradients, solutions):
        pairs = zip(gradients, solutions, strict=True)
        return sum(jnp.einsum("sp,qp->sq", g, u, precision=HIGHEST) for g, u in pairs)

    return sharded(product, mesh, (EXAMPLES, P()), EXAMPLES)
