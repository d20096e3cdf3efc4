"""Methods that compare gradients one by one, or divide by the size of an influence.

Features are [T, n, k], kept apart for each pair of a timestep and a noise draw, or
[n, k], averaged; g_j(q) and phi_j(n) are those of a query and of a training example at
pair j. For the methods as published, the features are gradients of the loss.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dtrak_jax.attribution.methods import (
    DEFAULT_DAMPING,
    check_features,
    example_ids,
    kernels,
)
from dtrak_jax.attribution.similarity import unit_rows
from dtrak_jax.attribution.solver import Damping, factorize, inverse_norms, solve
from dtrak_jax.features.store import Features

Array = Features | np.ndarray


def gradient_dot(train: Array, query: Array) -> np.ndarray:
    """(1/T) sum_j g_j(q) . phi_j(n), float64 [q, n].

    TracIn (arXiv 2002.08484) with one checkpoint; with averaged features the D-TRAK
    paper's "gradient (dot)".

    Args:
      train: features of the training set, [T, n, k] or [n, k].
      query: of the queries, [T, q, k] or [q, k], computed with the same task,
        parameters and projection.

    Raises:
      ValueError: the features do not belong together.
    """
    return _mean_over_pairs(lambda g, phi: g @ phi.T, train, query)


def gradient_cosine(train: Array, query: Array) -> np.ndarray:
    """(1/T) sum_j g_j(q) . phi_j(n) / (||g_j(q)|| ||phi_j(n)||), float64 [q, n].

    With features kept apart and common noise the score of DMin (arXiv 2412.08637) and
    of MOTIVE (arXiv 2601.08828), of projected gradients; with averaged features the
    D-TRAK paper's "gradient (cos)". A gradient of zeros has similarity 0. Arguments
    and errors as in `gradient_dot`.
    """
    return _mean_over_pairs(
        lambda g, phi: unit_rows(g) @ unit_rows(phi).T, train, query
    )


def tracin(trains: Sequence[Array], queries: Sequence[Array]) -> np.ndarray:
    """(1/C) sum_c gradient_dot at checkpoint c, float64 [q, n].

    TracInCP of Pruthi et al., "Estimating Training Data Influence by Tracing Gradient
    Descent" (arXiv 2002.08484), with every checkpoint at the same weight; with the
    learning rates that their equation has, this is the case of a constant one.

    Args:
      trains: features of the training set, one for each checkpoint.
      queries: of the queries, at the same checkpoints.

    Raises:
      ValueError: there are none, not equally many of both, or they are of different
        examples; or features of a checkpoint that do not belong together.
    """
    return _mean_over_checkpoints(gradient_dot, trains, queries)


def gas(trains: Sequence[Array], queries: Sequence[Array]) -> np.ndarray:
    """(1/C) sum_c gradient_cosine at checkpoint c, float64 [q, n].

    GAS of Hammoudeh and Lowd, "Identifying a Training-Set Attack's Target Using
    Renormalized Influence Estimation" (arXiv 2201.10055), with every checkpoint at the
    same weight. Arguments and errors as in `tracin`.
    """
    return _mean_over_checkpoints(gradient_cosine, trains, queries)


def relative_influence(
    train: Array, query: Array, damping: float | Damping = DEFAULT_DAMPING
) -> np.ndarray:
    """sum_j g_j(q)^T H_j^-1 phi_j(n) / ||H_j^-1 phi_j(n)||_2, float64 [q, n].

    H_j = Phi_j^T Phi_j + lambda_j I. Barshan et al., "RelatIF: Identifying Explanatory
    Training Examples via Relative Influence" (arXiv 2003.11630), theta-relative; a
    training example whose gradient is 0 has influence 0.

    Args:
      train: features of the training set, [T, n, k] or [n, k].
      query: of the queries, [T, q, k] or [q, k].
      damping: lambda_j, in the units of `attribute`.

    Raises:
      ValueError: the features do not belong together; or a damping that is not above
        rounding errors.
      MemoryError: min(n, k) is too large for this host.
    """
    return _influence_over(inverse_norms, train, query, damping)


def renormalised_influence(
    train: Array, query: Array, damping: float | Damping = DEFAULT_DAMPING
) -> np.ndarray:
    """sum_j g_j(q)^T H_j^-1 phi_j(n) / ||phi_j(n)||_2, float64 [q, n].

    Hammoudeh and Lowd (arXiv 2201.10055). All else is as in `relative_influence`.
    """

    def norms(kernel, phi):
        return lambda value: np.linalg.norm(phi, axis=1)

    return _influence_over(norms, train, query, damping)


def _mean_over_pairs(score: Callable, train: Array, query: Array) -> np.ndarray:
    """The mean of score(g [q, k], phi [n, k]); one pair is in memory at a time."""
    check_features(train, query)
    total, count = 0.0, 0
    for g, phi in zip(kernels(query), kernels(train), strict=True):
        total = total + score(g.astype(np.float64), phi.astype(np.float64))
        count += 1
    return total / count


def _mean_over_checkpoints(
    score: Callable, trains: Sequence[Array], queries: Sequence[Array]
) -> np.ndarray:
    if len(trains) != len(queries) or not len(trains):
        raise ValueError(
            f"trains has {len(trains)} checkpoints and queries has {len(queries)}; they "
            "must have the same number, one or more."
        )
    for name, sets in (("trains", trains), ("queries", queries)):
        for index, one in enumerate(sets):
            if not np.array_equal(example_ids(one), example_ids(sets[0])):
                raise ValueError(
                    f"{name}[{index}] and {name}[0] have different ids; all checkpoints "
                    "must have features of the same examples, in the same order."
                )
    return sum(map(score, trains, queries)) / len(trains)


def _influence_over(
    norms: Callable, train: Array, query: Array, damping: float | Damping
) -> np.ndarray:
    """Adds up tau_j(q, n) / norms(kernel_j, Phi_j)(lambda_j)[n]; 0 for a norm of 0."""
    check_features(train, query)
    if not isinstance(damping, Damping):
        damping = Damping(damping)
    total = 0.0
    for g, phi in zip(kernels(query), kernels(train), strict=True):
        kernel = factorize(phi)
        value = kernel.damping(damping)
        size = norms(kernel, phi)(value)
        weight = np.divide(1, size, out=np.zeros(len(phi)), where=size > 0)
        total = total + solve(kernel, phi, g)(value) * weight
    return total
