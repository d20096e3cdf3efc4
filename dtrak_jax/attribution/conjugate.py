"""Influence functions with the Gauss-Newton matrix itself, by conjugate gradients.

The equations (G + Lambda) u = g are solved for every query, G the Gauss-Newton matrix of a
batch of training images, see `products`. Conjugate gradients with the preconditioner M =
F + Lambda, F of EK-FAC, start with u = 0, r = d = g after M^-1, and go on by

  a = r^T M^-1 r / d^T (G + Lambda) d,   u <- u + a d,   r <- r - a (G + Lambda) d,
  d <- M^-1 r + b d,   b the new r^T M^-1 r over the old one

(Hestenes and Stiefel 1952; Nocedal and Wright, "Numerical Optimization", algorithm 5.3).
Each step makes the error least, in the norm of G + Lambda, over one dimension more, so that it
never grows. The first direction is EK-FAC's solution, and the first step the best one along it.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.attribution.damping import Damping
from dtrak_jax.attribution.ekfac import EKFAC_DAMPING, divided
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.attribution.whole import (
    Solve,
    System,
    queries_at_once,
    whole_influence,
)
from dtrak_jax.checks import at_least, between
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.features.curvature import Block, Curvature
from dtrak_jax.features.gradients import EXAMPLES
from dtrak_jax.features.microbatches import Layout
from dtrak_jax.features.passes import HIGHEST
from dtrak_jax.features.products import batch_of, mean_products, product_program
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.progress import counted, progress
from dtrak_jax.switches import standard

VECTORS = 6
"""The vectors of the length of a gradient that a query has: u, r, d, the sum of products with
d, and two products that are added to it."""


class Search(NamedTuple):
    """Conjugate gradients of S queries on their way."""

    solution: list[jax.Array]  # u, parts [S, p_i]
    residual: list[jax.Array]  # r
    direction: list[jax.Array]  # d
    decline: jax.Array  # r^T M^-1 r, [S]
    size: jax.Array  # |g|, [S]
    relative: jax.Array  # |r| / |g|, [S]; 0 without a gradient


@standard()
def gauss_newton_influence(
    curvature: Curvature,
    train: np.ndarray | Dataset,
    query: np.ndarray | Dataset | dict[str, np.ndarray | Dataset],
    *,
    damping: float | Damping = EKFAC_DAMPING,
    iterations: int = 20,
    tolerance: float = 0.01,
    curvature_images: int = 0,
    ids: Sequence[str] | None = None,
    cond: object = None,
    query_ids: Sequence[str] | dict[str, Sequence[str]] | None = None,
    query_cond: object = None,
    bounds: tuple[float, float] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 64,
) -> Scores | dict[str, Scores]:
    """Scores every training image for every query by influence functions,

      tau(q, n) = sum_j g_j(q)^T (G + Lambda)^-1 g_j(n),

    as `ekfac_influence` does, with G in place of EK-FAC's F: the mean of J^T (2/D) J over
    training images, and over all pairs of a task that averages; where pairs are kept apart
    each has its own G_j. J is the derivative by the parameters of the network's prediction
    of D entries. Conjugate gradients solve for each query, and have F
    as their preconditioner; with 0 iterations the scores are those of `ekfac_influence`.
    Influence with this matrix is of Mlodozeniec et al. (arXiv 2410.13850), and EK-FAC as a
    preconditioner for it of Wang et al. ("ASTRA", arXiv 2507.14740).

    An iteration takes a derivative forward and one back for each query and noised image, and
    six vectors of the length of a gradient for each query of a block, which has as many on
    each device as the square root of the batch size, or as fit 1 GiB.

    Args:
      damping: Lambda, the same as that of `ekfac_influence`, in units of F's eigenvalues.
      iterations: at most so many.
      tolerance: a query is done once |g - (G + Lambda) u| is at most this part of |g|.
        A warning tells how many queries had all iterations and are not done. 0 asks for all
        iterations, of which no warning tells.
      curvature_images: of so many noised images G is the mean, spread evenly over training
        images, and in turn over pairs that it is of; 0 takes each image at each of these.
      curvature, train, query, ids, cond, query_ids, query_cond, bounds, groups, batch_size:
        those of `ekfac_influence`.

    Returns:
      The scores; {name: scores} of several sets. All processes must call this together.

    Raises:
      ValueError: what `ekfac_influence` raises; iterations or curvature_images below 0; or a
        tolerance that is not between 0 and 1.
    """
    iterations = at_least("iterations", iterations, 0)
    images = at_least("curvature_images", curvature_images, 0)
    tolerance = between("tolerance", tolerance, 0, 1)
    relative: list[float] = []

    def solver(system: System) -> Solve:
        return _solver(system, iterations, tolerance, images, relative)

    results = whole_influence(
        "gauss-newton-cg",
        solver,
        *(curvature, train, query),
        damping=damping,
        ids=ids,
        cond=cond,
        query_ids=query_ids,
        query_cond=query_cond,
        bounds=bounds,
        groups=groups,
        batch_size=batch_size,
    )
    if iterations and tolerance:
        _warn_of_residuals(relative, iterations, tolerance)
    return results


def _warn_of_residuals(
    of_process: list[float], iterations: int, tolerance: float
) -> None:
    """Warns of queries, or their pairs, whose |r| / |g| are above the tolerance."""
    processes = jax.process_count()
    longest = parallel.gather(np.array([len(of_process)]), processes).max()
    row = np.full((1, longest), np.nan, np.float32)
    row[0, : len(of_process)] = of_process
    relative = parallel.gather(row, processes)
    relative = relative[np.isfinite(relative)]
    if (relative > tolerance).any():
        warnings.warn(
            f"conjugate gradients stopped after {counted(iterations, 'iteration')}, where "
            f"{(relative > tolerance).sum()} of {len(relative)} residuals are above "
            f"{tolerance:g} of their gradients; the median of all is "
            f"{np.median(relative):.2g}. More iterations or a larger damping help.",
            stacklevel=4,
        )


def _solver(
    system: System,
    iterations: int,
    tolerance: float,
    images: int,
    relative: list[float],
) -> Solve:
    """Returns what solves equations by conjugate gradients, and adds each query's |r| / |g|
    to `relative`."""
    (x, *_, cond), mesh, task = system.train, system.mesh, system.curvature.task
    sizes = [block.eigenvalues.size for block in system.blocks]
    layout, program = product_program(
        *(task, system.network, x, cond, mesh, system.batch_size),
        queries_at_once(sum(sizes), VECTORS),
    )
    block = len(program.arguments[2][0])
    begin, advance = begin_function(mesh), advance_function(mesh)
    equations = system.blocks, system.lambdas

    def search(gradients: list[jax.Array], batch: tuple) -> Search:
        found = begin(gradients, *equations)
        work = max(1, iterations) * len(batch[0])
        with progress(None, "conjugate gradients", work, "noised image") as bar:
            for _ in range(iterations):
                if (jax.device_get(found.relative) <= tolerance).all():
                    break
                how = layout, program, system.network, found.direction
                product = mean_products(*how, system.train, batch, bar.update)
                found = advance(found, product, *equations, np.float32(tolerance))
        return found

    def solve(pair, rounds, count):
        batch = batch_of(images, len(x), len(task.pairs), pair)
        gathered = [jax.device_get(gradients) for gradients in rounds]
        rows = [np.concatenate(part)[:count] for part in zip(*gathered, strict=True)]
        for start in range(0, count, block):
            cut = [part[start : start + block] for part in rows]
            padded = [parallel.pad(part, block) for part in cut]
            found = search(parallel.put(padded, mesh, EXAMPLES), batch)
            # Where no step is taken, the first direction is EK-FAC's solution.
            solution = found.solution if iterations else found.direction
            length = len(cut[0])
            relative.extend(jax.device_get(found.relative)[:length])
            yield [part[:length] for part in jax.device_get(solution)]

    return solve


@standard()
def search_calls(
    product: tuple[Layout, Program],
    blocks: list[Block],
    images: int,
    iterations: int,
    searches: int,
) -> list[tuple[Program, int]]:
    """Returns the programs of so many blocks of queries, and how often each is called at
    most. Shapes will do for F's blocks.

    `product` is of `product_program`, and `images` the number of noised images of G.
    """
    layout, program = product
    mesh, vectors = program.mesh, program.arguments[2]
    equations = blocks, jax.ShapeDtypeStruct((len(blocks),), np.float32)
    begin = Program(begin_function(mesh), (vectors, *equations), mesh)
    search = begin.function.eval_shape(*begin.arguments)
    tolerance = jax.ShapeDtypeStruct((), np.float32)
    arguments = search, vectors, *equations, tolerance
    advance = Program(advance_function(mesh), arguments, mesh)
    microbatches = -(-images // layout.size)
    return [
        (begin, searches),
        (program, searches * iterations * microbatches),
        (advance, searches * iterations),
    ]


@functools.cache
def begin_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (gradients [S, p_i], blocks, lambdas) -> `Search` of u = 0."""

    def begin(gradients, blocks, lambdas):
        # A block of rounding errors has no part in u.
        kept = [jnp.isfinite(lambdas[i]) for i in range(len(blocks))]
        pairs = zip(kept, gradients, strict=True)
        residual = [jnp.where(is_kept, g, 0) for is_kept, g in pairs]
        direction = divided(residual, blocks, lambdas)
        solution = jax.tree.map(jnp.zeros_like, residual)
        decline, size = _dot(residual, direction), _norm(residual)
        relative = jnp.where(size > 0, 1.0, 0.0)
        return Search(solution, residual, direction, decline, size, relative)

    return sharded(begin, mesh, (EXAMPLES, P(), P()), EXAMPLES)


@functools.cache
def advance_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (`Search`, G d [S, p_i], blocks, lambdas, tolerance) -> the next `Search`.

    A query whose |r| is at most this part of |g| stays as it is.
    """

    def advance(search, product, blocks, lambdas, tolerance):
        added = enumerate(zip(product, search.direction, strict=True))
        image = [
            jnp.where(jnp.isfinite(lambdas[i]), part + lambdas[i] * d, 0)
            for i, (part, d) in added
        ]
        curve = _dot(search.direction, image)
        # Squares of the smallest residuals are 0 by rounding.
        unfinished = (search.relative > tolerance) & (curve > 0)
        step = jnp.where(unfinished, search.decline / curve, 0)
        solution = _plus(search.solution, step, search.direction)
        residual = _plus(search.residual, -step, image)
        preconditioned = divided(residual, blocks, lambdas)
        decline = _dot(residual, preconditioned)
        turn = jnp.where(unfinished, decline / search.decline, 0)
        direction = _plus(preconditioned, turn, search.direction)
        size = jnp.where(search.size > 0, search.size, 1)
        relative = _norm(residual) / size
        return Search(solution, residual, direction, decline, search.size, relative)

    in_specs = (EXAMPLES, EXAMPLES, P(), P(), P())
    # The vectors take the place of those before.
    return sharded(advance, mesh, in_specs, EXAMPLES, donate_argnums=0)


def _plus(ours: list, step: jax.Array, theirs: list) -> list:
    """Returns a + step b of parts [S, p_i]."""
    return [a + step[:, None] * b for a, b in zip(ours, theirs, strict=True)]


def _dot(ours: list, theirs: list) -> jax.Array:
    """Returns the inner products [S] of parts [S, p_i]."""
    pairs = zip(ours, theirs, strict=True)
    return sum(jnp.einsum("sp,sp->s", a, b, precision=HIGHEST) for a, b in pairs)


def _norm(parts: list) -> jax.Array:
    """Returns the norms [S] of parts [S, p_i]."""
    return jnp.sqrt(_dot(parts, parts))
