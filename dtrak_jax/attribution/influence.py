"""Methods with a kernel: TRAK and D-TRAK, and influence over its own size.

At pair j the features of a training example are phi_j(n), in rows Phi_j [n, k], and
those of a query, computed with the same task, parameters and projection, g_j(q). A
damping is lambda_j in units of that kernel's mean eigenvalue,
trace(Phi_j Phi_j^T) / min(n, k), or `absolute(lambda)`, or `effective(share)`. The
functions take the features of a training set, [T, n, k] or [n, k], or `Kernels`, which
share what is decomposed.
With several processes all must call them, and all get the scores.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dtrak_jax.attribution import iterative, linalg
from dtrak_jax.attribution.damping import DEFAULT_DAMPING, GRID, Damping
from dtrak_jax.attribution.errors import PairSum
from dtrak_jax.attribution.inputs import Array, by_pair, check_features
from dtrak_jax.attribution.kernel import Kernel, Kernels
from dtrak_jax.checks import instance, items, shown
from dtrak_jax.features.store import chunks_of
from dtrak_jax.switches import standard


class Solution(NamedTuple):
    """The scores of one pair, of which every further lambda costs one product.

    With eigenvalues e and eigenvectors v_j of the kernel,

      tau(q, n) = sum_j left_qj right_jn / (e_j + lambda),

    left = Phi_q Phi^T V [q, m] and right = V^T [m, n] in the dual form, where the kernel
    is Phi Phi^T = V diag(e) V^T; left = Phi_q V and right = V^T Phi^T in the primal one.
    """

    left: linalg.HostArray
    right: linalg.HostArray
    kernel: Kernel

    def scores(self, damping: float) -> np.ndarray:
        """Returns tau, float64 [q, n], for lambda itself."""
        divisors = self.kernel.eigenvalues + damping
        return np.asarray(linalg.divided_product(self.left, divisors, self.right))

    def inverse_norms(self, damping: float) -> np.ndarray:
        """Returns ||(Phi^T Phi + lambda I)^-1 phi_n||_2 of every n, float64 [n].

        Its square is the sum over j of right_jn^2 / (e_j + lambda)^2, times e_j if dual.
        """
        values = self.kernel.eigenvalues
        factors = (values if self.kernel.dual else 1) / (values + damping) ** 2
        return np.sqrt(factors @ np.asarray(self.right) ** 2)


def solution(
    kernel: Kernel,
    phi: np.ndarray,
    query: np.ndarray,
    rows: slice | None = None,
    subsets: np.ndarray | None = None,
) -> Solution:
    """Returns query (phi^T phi + lambda I)^-1 phi^T as a function of lambda.

    The kernel is that of phi [n, k], and query [q, k]. Of phi^T some rows may be enough;
    with subsets of these, bool [M, rows], the scores are their sums over each, [q, M].
    """
    vectors = linalg.put(kernel.eigenvectors)
    if kernel.dual:
        left = linalg.times_transposed(linalg.inner_products(query, phi), vectors)
        right = linalg.put(kernel.eigenvectors[:, rows]) if rows else vectors
    else:
        left = linalg.times_transposed(query, vectors)
        right = linalg.inner_products(vectors, phi[rows] if rows else phi)
    if subsets is not None:
        right = linalg.times_transposed(right, subsets)
    return Solution(left, right, kernel)


@standard()
def influence(
    train: Array | Kernels,
    query: Array,
    damping: float | Damping = DEFAULT_DAMPING,
    total: PairSum | None = None,
) -> np.ndarray:
    """Returns sum_j g_j(q)^T (Phi_j^T Phi_j + lambda_j I)^-1 phi_j(n), float64 [q, n].

    TRAK (Park et al., arXiv 2303.14186) with gradients of the loss, and D-TRAK (Zheng et
    al., "Intriguing Properties of Data Attribution on Diffusion Models",
    arXiv 2311.00500) with those of the squared output. A `total` that is given is what
    adds up the pairs, and knows the standard errors then; see `PairSum`.

    Raises:
      ValueError: the features do not belong together; or a damping that is not above
        rounding errors.
      MemoryError: min(n, k) is too large to be decomposed on this host.
    """
    total = total or PairSum()
    for tau in pair_scores(train, query, damping):
        total.add(tau)
    return total.total


@standard()
def relative_influence(
    train: Array | Kernels,
    query: Array,
    damping: float | Damping = DEFAULT_DAMPING,
    total: PairSum | None = None,
) -> np.ndarray:
    """Returns sum_j g_j(q)^T H_j^-1 phi_j(n) / ||H_j^-1 phi_j(n)||_2, float64 [q, n].

    H_j = Phi_j^T Phi_j + lambda_j I. Barshan et al., "RelatIF: Identifying Explanatory
    Training Examples via Relative Influence" (arXiv 2003.11630), theta-relative; a
    training example whose gradient is 0 has influence 0. All else is as in `influence`,
    and kernels must be decomposed.
    """
    total = total or PairSum()
    for phi, kernel, g in query_pairs(train, query, needed_by="relative influence"):
        value, tau = kernel.lambda_of(Damping.of(damping)), solution(kernel, phi, g)
        # Eigenvectors give the size of a row of zeros their rounding errors.
        sizes = tau.inverse_norms(value) * phi.any(axis=1)
        total.add(tau.scores(value) * _inverses(sizes))
    return total.total


@standard()
def renormalised_influence(
    train: Array | Kernels,
    query: Array,
    damping: float | Damping = DEFAULT_DAMPING,
    total: PairSum | None = None,
) -> np.ndarray:
    """Returns sum_j g_j(q)^T H_j^-1 phi_j(n) / ||phi_j(n)||_2, float64 [q, n].

    Hammoudeh and Lowd, "Identifying a Training-Set Attack's Target Using Renormalized
    Influence Estimation" (arXiv 2201.10055). All else is as in `relative_influence`.
    """
    total = total or PairSum()
    for phi, kernel, g in query_pairs(train, query, needed_by="renormalised influence"):
        value = kernel.lambda_of(Damping.of(damping))
        sizes = np.linalg.norm(phi.astype(np.float64), axis=1)
        total.add(solution(kernel, phi, g).scores(value) * _inverses(sizes))
    return total.total


def pair_scores(
    train: Array | Kernels, query: Array, damping: float | Damping
) -> Iterator[np.ndarray]:
    """Yields the scores of each pair, g (Phi^T Phi + lambda I)^-1 Phi^T [q, n], by the
    solver of the kernels."""
    for phi, kernel, g in query_pairs(train, query):
        value = kernel.lambda_of(Damping.of(damping))
        if kernel.eigenvalues is None:
            yield iterative.solve(phi, g, value)
        else:
            yield solution(kernel, phi, g).scores(value)


def query_pairs(
    train: Array | Kernels, query: Array, needed_by: str = ""
) -> Iterator[tuple[np.ndarray, Kernel, np.ndarray]]:
    """Yields each pair's training features, their kernel, and the queries' features.

    A name of what needs kernels decomposed makes sure that they are.
    """
    kernels = Kernels.of(train)
    _, query = check_features(kernels.train, query)
    if needed_by:
        kernels.require_decomposed(needed_by)
    for (phi, kernel), g in zip(kernels, by_pair(query), strict=True):
        yield phi, kernel, g


def check_subsets(subsets: np.ndarray, n: int) -> np.ndarray:
    """Returns subsets as an array, or raises a ValueError unless they are bool [M, n]."""
    subsets = np.asarray(subsets)
    if subsets.dtype != bool or subsets.ndim != 2 or subsets.shape[1] != n:
        raise ValueError(
            f"subsets are {shown(subsets)}; they must be bool [M, {n}], a row for each "
            "subset and a column for each training image."
        )
    return subsets


def _inverses(sizes: np.ndarray) -> np.ndarray:
    """Returns 1 / size, and 0 where a size is 0."""
    return np.divide(1, sizes, out=np.zeros(len(sizes)), where=sizes > 0)


@standard()
def damping_path(
    train: Array | Kernels,
    query: Array,
    dampings: Sequence[float | Damping] = GRID,
    *,
    pooled: bool = False,
    subsets: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the scores of `influence` at every damping, float64 [len(dampings), q, n].

    One eigendecomposition of each kernel serves all of them. A damping so small, or a
    share so large, that rounding errors would decide the scores gives NaN. There are no
    standard errors. What is raised is as in `influence`, and kernels must be decomposed.

    Args:
      train, query, dampings: as in `influence`.
      pooled: take one kernel, that of all pairs,
        tau(q, n) = sum_j g_j(q)^T (sum_i Phi_i^T Phi_i + lambda I)^-1 phi_j(n),
        instead of one for each pair. All T n training features are in memory.
      subsets: of the training set, bool [M, n]: give the sums of the scores over each,
        [len(dampings), q, M], which is what the scores predict for models trained on
        them, at a fraction of the cost.
    """
    kernels = Kernels.of(train)
    dampings = list(map(Damping.of, items("dampings", dampings)))
    instance("pooled", pooled, bool, np.bool_)
    subsets = (
        None if subsets is None else check_subsets(subsets, kernels.train.shape[-2])
    )
    _, query = check_features(kernels.train, query)
    kernels.require_decomposed("a path over dampings")
    if pooled:
        (phi, kernel), n = kernels.pooled, kernels.train.shape[-2]
        dampings = [kernels.of_pooled(damping, strict=False) for damping in dampings]
        pairs = ((phi, kernel, rows) for rows in chunks_of(len(phi), n))
    else:
        pairs = ((phi, kernel, None) for phi, kernel in kernels)
    total = [0.0] * len(dampings)
    for (phi, kernel, rows), g in zip(pairs, by_pair(query), strict=True):
        tau = solution(kernel, phi, g, rows, subsets)
        for i, damping in enumerate(dampings):
            total[i] += tau.scores(kernel.lambda_of(damping, strict=False))
    return np.stack(total)
