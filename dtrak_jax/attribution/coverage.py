"""Coverage: how much of what a query needs do the training images hold?

In a linear model of features phi, trained on the images of a set S with the penalty lambda,
the prediction for a query varies from one training to the next, with its noise, by

  v_S(q) = sum_j g_j(q)^T (Phi_Sj^T Phi_Sj + lambda_j I)^-1 g_j(q)

times the variance of the noise (Rasmussen and Williams, "Gaussian Processes for Machine
Learning", 2006, equation 2.8), where Phi_Sj are the rows of S at pair j and g_j(q) the
query's features. The less S holds of what the query needs, the larger it is, and with it
the expected loss: its other part, the bias, is what signed scores estimate. No label and no
residual takes part, and any readout of the network will do. Coverage is minus v.

It answers another question than signed scores: these ask in which direction an image pulls
the query's loss, coverage how much the image tells of it.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import scipy.linalg

from dtrak_jax.attribution.damping import DEFAULT_DAMPING, Damping, effective
from dtrak_jax.attribution.errors import PairSum
from dtrak_jax.attribution.influence import (
    check_subsets,
    damping_path,
    pair_scores,
    query_pairs,
)
from dtrak_jax.attribution.inputs import Array, by_pair, check_features, example_ids
from dtrak_jax.attribution.kernel import Kernels
from dtrak_jax.checks import instance, one_of
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard

COVERAGE_SHARE = 0.05
"""The share of min(n, k) for `effective` that coverage takes where none is given: the best
on digits; on MNIST a fiftieth was."""

By = Literal["influence", "coverage"]

DAMPINGS = {
    "influence": Damping(DEFAULT_DAMPING),
    "coverage": effective(COVERAGE_SHARE),
}
"""The damping by each of these, where none is given."""


@standard()
def coverage(
    train: Array | Kernels,
    query: Array,
    damping: float | Damping = DAMPINGS["coverage"],
    total: PairSum | None = None,
) -> np.ndarray:
    """Returns sum_j (g_j(q)^T (Phi_j^T Phi_j + lambda_j I)^-1 phi_j(n))^2, float64 [q, n].

    It is the derivative of coverage, -v(q) of the whole training set, with respect to the
    weight of example n, by which phi_j(n) phi_j(n)^T counts in Phi_j^T Phi_j. It has no
    sign. Squared scores of this kind are those of DAS (Lin et al., arXiv 2410.18639). Its
    lambda is by a share unless told otherwise; all else is as in `influence`.
    """
    kernels = Kernels.of(train)
    kernels.require_own("coverage")
    total = total or PairSum()
    for tau in pair_scores(kernels, query, damping):
        total.add(tau**2)
    return total.total


class Predictions(NamedTuple):
    """Predictions of models that are trained on subsets: minus the queries' losses, up to
    a constant and a factor for each query."""

    values: np.ndarray  # float64 [subsets, queries]
    subsets: np.ndarray  # bool [subsets, train]
    train_ids: np.ndarray  # str [train]
    query_ids: np.ndarray  # str [queries]


@standard()
def predict(
    train: Array | Kernels,
    query: Array,
    subsets: np.ndarray,
    *,
    by: By = "coverage",
    damping: float | Damping | None = None,
    pooled: bool = False,
) -> Predictions:
    """Predicts minus the loss of every query after training on each subset.

    By "influence" it is the sum of the subset's scores. By "coverage" it is -v_S(q), see
    the module: exactly, with a kernel of each subset S, and so beyond sums of scores.
    `lds(predict(train, query, truth.masks), truth)` tells how right it is.

    By coverage it takes a Cholesky decomposition of min(n_S, k) rows for each subset of
    n_S images and each pair; with `pooled`, of min(J n_S, k) rows for each subset. Kernels
    of the whole training set are decomposed too, for lambda, but by solver "cg" apart.

    Args:
      train: features of the training set, [T, n, k] or [n, k]; or `Kernels`.
      query: of the queries, [T, q, k] or [q, k].
      subsets: of the training set, bool [M, n]; none of them empty.
      by: "influence" or "coverage".
      damping: lambda_j in units of the mean eigenvalue of the kernel of the whole training
        set, for all subsets; or `absolute(lambda)`, or `effective(share)` of that kernel;
        None is `effective(COVERAGE_SHARE)` by coverage, and DEFAULT_DAMPING by influence.
      pooled: take one kernel, that of all pairs, instead of one for each pair.

    Raises:
      ValueError: the features do not belong together; subsets of another shape or an empty
        one; an unknown `by`; or a damping that is not above rounding errors.
    """
    kernels, damping = Kernels.of(train), damping_by("by", by, damping)
    instance("pooled", pooled, bool, np.bool_)
    if by == "coverage":
        kernels.require_own("coverage")
    _, query = check_features(kernels.train, query)
    subsets = check_subsets(subsets, kernels.train.shape[-2]).copy()
    if not subsets.any(axis=1).all():
        raise ValueError(f"subsets[{subsets.any(axis=1).argmin()}] is empty.")
    if by == "influence":
        (sums,) = damping_path(
            kernels, query, [damping], pooled=pooled, subsets=subsets
        )
        if np.isnan(sums).any():
            raise ValueError(
                f"{damping.words} makes lambda less than the rounding errors of float32 "
                "features; take a larger damping, or a smaller share."
            )
        values = sums.T
    else:
        (values,) = coverage_path(kernels, query, [damping], subsets, pooled)
    return Predictions(values, subsets, example_ids(kernels.train), example_ids(query))


def damping_by(name: str, by: By, damping: float | Damping | None) -> Damping:
    """Returns a damping that is given, or the one of `DAMPINGS` where it is None.

    Raises a ValueError of an unknown `by`, which it calls by its name.
    """
    one_of(name, by, get_args(By))
    return DAMPINGS[by] if damping is None else Damping.of(damping)


def coverage_path(
    kernels: Kernels,
    query: Array,
    dampings: Sequence[float | Damping],
    subsets: np.ndarray,
    pooled: bool = False,
    strict: bool = True,
) -> np.ndarray:
    """Returns -v_S(q) at every damping, float64 [len(dampings), M, q]; see `predict`.

    A damping that rounding errors would decide is a ValueError, or else gives NaN.
    """
    dampings = list(map(Damping.of, dampings))
    total = np.zeros((len(dampings), len(subsets), query.shape[-2]))
    if pooled:
        dampings = [kernels.of_pooled(damping, strict) for damping in dampings]
        joined = np.concatenate(list(by_pair(query)))
        parts, count = [(*kernels.pooled, joined)], 1
    else:
        parts, count = query_pairs(kernels, query), math.prod(query.shape[:-2])
    with progress(None, "coverage", count * len(subsets), "kernel", delay=2) as bar:
        for phi, kernel, g in parts:
            lambdas = [kernel.lambda_of(damping, strict) for damping in dampings]
            by_pair_rows = phi.reshape(-1, subsets.shape[1], phi.shape[-1])
            for row, subset in enumerate(subsets):
                kept = by_pair_rows[:, subset].reshape(-1, phi.shape[-1])
                found = variances(kept, g, lambdas)
                by_query = found.reshape(len(found), -1, total.shape[2])
                total[:, row] -= by_query.sum(axis=1)
                bar.update()
    return total


def variances(phi: np.ndarray, g: np.ndarray, lambdas: Sequence[float]) -> np.ndarray:
    """Returns g (phi^T phi + lambda I)^-1 g^T for each lambda and row of g [q, k], float64
    [len(lambdas), q].

    Of rows phi [n, k] it decomposes the smaller of phi phi^T and phi^T phi.
    """
    n, k = phi.shape
    g, dual = g.astype(np.float64), n <= k
    # In float64 throughout: where a subset holds the query, what is left is a difference.
    rows = (phi if dual else phi.T).astype(np.float64)
    gram, right = rows @ rows.T, rows @ g.T if dual else g.T
    diagonal, found = np.diagonal(gram).copy(), []
    whole = np.einsum("qk,qk->q", g, g)
    for value in lambdas:
        if math.isnan(value):
            found.append(np.full(len(g), math.nan))
            continue
        np.fill_diagonal(gram, diagonal + value)
        lower = _cholesky(gram, value)
        solved = scipy.linalg.solve_triangular(lower, right, lower=True)
        squares = np.einsum("mq,mq->q", solved, solved)
        found.append((whole - squares) / value if dual else squares)
    return np.stack(found)


def _cholesky(gram: np.ndarray, value: float) -> np.ndarray:
    """Returns the lower factor of a subset's kernel with lambda on its diagonal."""
    try:
        return scipy.linalg.cholesky(gram, lower=True)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"lambda is {value:.3g}, which is less than the rounding errors of the kernel "
            "of a subset, whose features are too much alike; take a larger damping."
        ) from None
