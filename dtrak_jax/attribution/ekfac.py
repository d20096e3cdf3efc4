"""Influence functions with EK-FAC's curvature, of whole gradients."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dtrak_jax.attribution.damping import Damping
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.attribution.whole import Solve, System, solve_calls, whole_influence
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.features.curvature import Block, Curvature
from dtrak_jax.features.featurize import StepPrograms
from dtrak_jax.features.gradients import EXAMPLES
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.switches import standard

EKFAC_DAMPING = 0.001
"""lambda in these units. It was chosen by the LDS on digits, where anything from 3e-5 to .01
is within .01 of the best, and .1 loses .03."""


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
    return whole_influence(
        "ekfac",
        _divider,
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


def _divider(system: System) -> Solve:
    """Returns what solves equations by EK-FAC's F in place of G."""
    divide = divide_function(system.mesh)

    def solve(pair, rounds, count):
        for gradients in rounds:
            solved = jax.device_get(divide(gradients, system.blocks, system.lambdas))
            yield [part[:count] for part in solved]
            count -= len(solved[0])

    return solve


def divide_calls(
    programs: StepPrograms, blocks: list[Block], queries: int, processes: int
) -> tuple[Program, int]:
    """Returns the program of `divide_function`, and how often it is called. Shapes will do
    for F's blocks."""
    layout, mesh = programs.layout, programs.gradients.mesh
    (gradients,) = programs.project.arguments[0].values()
    lambdas = jax.ShapeDtypeStruct((len(blocks),), np.float32)
    program = Program(divide_function(mesh), (gradients, blocks, lambdas), mesh)
    return program, solve_calls(layout, layout.size, queries, processes)


@functools.cache
def divide_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (gradients, blocks, lambdas) -> (F + lambda I)^-1 g, parts [S, p_i]."""
    return sharded(divided, mesh, (EXAMPLES, P(), P()), EXAMPLES)


def divided(gradients: list, blocks: list[Block], lambdas: jax.Array) -> list:
    """Returns (F + lambda I)^-1 g of parts [S, p_i]."""
    parts = enumerate(zip(blocks, gradients, strict=True))
    return [block.divide(part, lambdas[i]) for i, (block, part) in parts]
