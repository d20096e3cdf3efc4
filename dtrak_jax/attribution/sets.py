"""Sets: which training images, taken away together, would change a query most?

Scores add up, and so they miss what copies and kin of an image make up for. With the
features Phi [n, k] of a kernel, H = Phi^T Phi + lambda I, M = Phi H^-1 Phi^T and
m = Phi H^-1 phi(q), the Newton step that takes a set S away, with the empirical Fisher
matrix of these rows as the curvature, changes the query's measurement by

  s(S) = m_S^T (I - M_SS)^-1 1 = phi(q)^T (Phi_K^T Phi_K + lambda I)^-1 Phi_S^T 1

where K are the rows that are kept. Additive scores, the sum of m_S, are its first term
(Koh et al., "On the Accuracy of Influence Functions for Measuring Group Effects",
arXiv 1905.13289, compare both). With m_S in place of the ones,

  c(S) = m_S^T (I - M_SS)^-1 m_S
       = phi(q)^T (Phi_K^T Phi_K + lambda I)^-1 phi(q) - phi(q)^T H^-1 phi(q),

it is the coverage of the query that S alone has, see `attribution.coverage`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

from dtrak_jax import host
from dtrak_jax.attribution.coverage import By, damping_by
from dtrak_jax.attribution.damping import Damping
from dtrak_jax.attribution.groups import check_column
from dtrak_jax.attribution.influence import solution
from dtrak_jax.attribution.inputs import Array, by_pair, check_features, example_ids
from dtrak_jax.attribution.kernel import Kernel, Kernels
from dtrak_jax.checks import at_least, real_numbers
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard

LEAST = float(np.finfo(np.float32).eps)
"""The least 1 - M_ii that is more than the rounding errors of float32 features."""


class RemovalSet(NamedTuple):
    """The images, or groups, that are taken away one after the other."""

    names: np.ndarray
    """The ids of the images, or the names of the groups, in the order of choice [count]."""
    rows: np.ndarray
    """The positions of all removed images in the training set, in this order."""
    predicted: np.ndarray
    """The objective s or c, added up over kernels and queries, after each choice [count]."""


class Candidates(NamedTuple):
    """Candidates with equally many rows of a kernel."""

    names: np.ndarray  # int [c]: their positions among all candidates
    rows: np.ndarray  # int [c, b]
    leverages: np.ndarray  # M of these rows with each other [c, b, b]


class Removable:
    """One kernel from which rows are taken away: M, m and the ones (or of coverage a second
    m) as they then are.

    Of M there are the factor of the whole kernel, M = factor^T factor, the blocks of the
    candidates, and what each removal has added, in rows of `added`: M + added^T added.
    """

    def __init__(
        self,
        factor: np.ndarray,
        m: np.ndarray,
        ones: np.ndarray,
        candidates: Sequence[np.ndarray],
    ):
        """Begins with nothing removed; `candidates` are the rows of each, int [b]."""
        self.factor = factor  # [min(n, k), R]
        self.m, self.ones = m, ones  # [P, R], of P queries with the same kernel
        self.added = np.empty((0, factor.shape[1]))
        sizes = np.array(list(map(len, candidates)))
        self.candidates = []
        for size in np.unique(sizes):
            names = np.flatnonzero(sizes == size)
            rows = np.stack([candidates[name] for name in names])
            blocks = [factor[:, block].T @ factor[:, block] for block in rows]
            self.candidates.append(Candidates(names, rows, np.stack(blocks)))

    def gains(self, count: int) -> np.ndarray:
        """Returns by how much s grows with each candidate [count], -inf if it is gone.

        It is m_I^T (I - M_II)^-1 o_I, where I are the candidate's rows and o the ones.
        """
        gains = np.full(count, -np.inf)
        for names, rows, leverages in self.candidates:
            lower = _cholesky(leverages)
            both = np.stack([self.m[:, rows], self.ones[:, rows]])
            left, right = np.linalg.solve(lower, both[..., None])[..., 0]
            gains[names] = np.einsum("pcb,pcb->c", left, right)
        return gains

    def remove(self, name: int) -> None:
        """Takes a candidate's rows away."""
        index, place = next(
            (i, int(np.flatnonzero(of_size.names == name)[0]))
            for i, of_size in enumerate(self.candidates)
            if name in of_size.names
        )
        chosen = self.candidates[index]
        rows, lower = chosen.rows[place], _cholesky(chosen.leverages[[place]])[0]
        left = (np.delete(part, place, axis=0) for part in chosen)
        self.candidates[index] = Candidates(*left)
        columns = self.factor[:, rows].T @ self.factor
        columns += self.added[:, rows].T @ self.added
        step = scipy.linalg.solve_triangular(lower, columns, lower=True)
        for vector in (self.m, self.ones):
            at_rows = scipy.linalg.solve_triangular(
                lower, vector[:, rows].T, lower=True
            )
            vector += at_rows.T @ step
        for of_size in self.candidates:
            blocks = step[:, of_size.rows]
            of_size.leverages[:] += np.einsum("rcb,rcd->cbd", blocks, blocks)
        self.added = np.concatenate([self.added, step])


def _cholesky(leverages: np.ndarray) -> np.ndarray:
    """Returns the Cholesky factors of I - M_II [c, b, b], or raises a ValueError."""
    try:
        lower = np.linalg.cholesky(np.eye(leverages.shape[-1]) - leverages)
        least = (np.diagonal(lower, axis1=1, axis2=2) ** 2).min(initial=1)
    except np.linalg.LinAlgError:
        least = 0
    if least < LEAST:
        raise ValueError(
            f"1 - M_ii of a training image is {least:.1g}, which is less than the "
            f"rounding errors of features ({LEAST:.1g}): without it the others tell "
            "nothing of it. Take a larger damping, or a smaller count."
        )
    return lower


@standard()
def removal_set(
    train: Array | Kernels,
    query: Array,
    count: int,
    *,
    objective: By = "influence",
    damping: float | Damping | None = None,
    pooled: bool = False,
    groups: Sequence[str] | np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> RemovalSet:
    """Chooses the training images whose removal together raises a measurement most, or
    leaves most of what the query needs uncovered.

    Greedily: each choice is the one that makes the sum over kernels and queries of

      s(S) = m_S^T (I - M_SS)^-1 1 = phi(q)^T (Phi_K^T Phi_K + lambda I)^-1 Phi_S^T 1

    (objective "influence") or c(S) = m_S^T (I - M_SS)^-1 m_S ("coverage") largest,
    exactly, with all earlier ones gone; see the module. A choice raises s by
    m_i o_i / (1 - M_ii), where m, M and o, the ones, are those of the kernel without the
    earlier ones; and c by m_i^2 / (1 - M_ii). With features of the loss s is a prediction
    of the loss's increase, up to a factor: where k is above n leverages M_ii are near 1,
    and s is too large. Without one copy of a picture the others make up for it, so that
    none may be chosen; as `groups` copies go together.

    It takes O(n (min(n, k) + count)) operations a choice and kernel, and
    8 n (min(n, k) + count) bytes a kernel beside the decomposed ones; with `pooled`, of
    J pairs, J n for n and J count for count. No n x n array is made but eigenvectors and,
    of groups, the blocks of M of their own images: 8 sum_g n_g^2 bytes a kernel and twice
    more, of groups of n_g images (J n_g with `pooled`).

    Args:
      train: features of the training set, [T, n, k] or [n, k]; or `Kernels`.
      query: of one query or several, [T, q, k] or [q, k], over which s is added up.
      count: how many images, or groups, to choose; at least one is left.
      objective: "influence", s; or "coverage", c.
      damping: as of `predict` by the objective.
      pooled: take one kernel, that of all pairs, instead of one for each pair; an image
        is then J rows; by influence a query's pair meets its own row alone, as in
        `damping_path`, and by coverage all rows.
      groups: the name of each image's group [n], to choose among groups.
      weights: [n], or [T, n], in place of the ones. With the residuals of a ridge
        regression on the features, -s is exactly the change of its prediction.

    Raises:
      ValueError: features, count, groups or weights do not fit, or weights are given by
        coverage, which has none; a damping that is not above rounding errors; or
        1 - M_ii is below them.
      MemoryError: what is kept does not fit this host.
    """
    kernels, damping = Kernels.of(train), damping_by("objective", objective, damping)
    _, query = check_features(kernels.train, query)
    kernels.require_decomposed("a removal set")
    kernels.require_own("a removal set")
    names, members = _members(example_ids(kernels.train), groups)
    what = "images" if groups is None else "groups"
    if not 1 <= at_least("count", count, 1) < len(names):
        raise ValueError(
            f"count is {count}; of {len(names)} {what} 1 to {len(names) - 1} can be "
            "removed, and one must be left."
        )
    *pairs, n, k = kernels.train.shape
    ones = _weights(objective, weights, pairs, n)
    rows_of_m = query.shape[-2] if ones is None else 1
    host.check_fits(
        f"kernels from which {count} {what} among {n} images are removed (count, "
        "timesteps, draws, dim)",
        _bytes(math.prod(pairs), k, list(map(len, members)), count, rows_of_m, pooled),
    )
    removables = list(_removables(kernels, query, damping, ones, members, pooled))
    chosen, predicted = [], []
    for _ in progress(range(count), "removal set", unit=what[:-1], delay=2):
        gains = sum(removable.gains(len(names)) for removable in removables)
        chosen.append(int(gains.argmax()))
        predicted.append(gains[chosen[-1]])
        for removable in removables:
            removable.remove(chosen[-1])
    rows = np.concatenate([members[name] for name in chosen])
    return RemovalSet(names[chosen], rows, np.cumsum(predicted))


def _bytes(
    pairs: int, k: int, sizes: Sequence[int], count: int, rows_of_m: int, pooled: bool
) -> int:
    """Returns the bytes of what is kept while `count` candidates of these sizes, in images,
    are removed: the factors, m and the ones, what removals add, and the blocks of M."""
    n, joined = sum(sizes), pairs if pooled else 1
    largest = sum(sorted(sizes)[-count:])
    kept = min(n * joined, k) + joined * (largest + 2 * rows_of_m)
    # A kernel's blocks of M are factorised beside those of all kernels.
    blocks = sum(size**2 for size in sizes) * joined**2
    return 8 * pairs * n * kept + 8 * blocks * (pairs // joined + 2)


def _members(ids: np.ndarray, groups) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the names of candidates, and the training images of each."""
    if groups is None:
        return ids, list(np.arange(len(ids))[:, None])
    groups = check_column("groups", groups, len(ids))
    names, index = np.unique(groups, return_inverse=True)
    return names, [np.flatnonzero(index == group) for group in range(len(names))]


def _weights(
    objective: By, weights: np.ndarray | None, pairs: list[int], n: int
) -> np.ndarray | None:
    """Returns the weights of each pair's images, ones if None are given, [T, n]; None by
    coverage."""
    if objective == "coverage":
        if weights is not None:
            raise ValueError("weights are of objective 'influence'; leave them out.")
        return None
    weights = np.ones(n) if weights is None else real_numbers("weights", weights)
    if weights.shape not in ((n,), (*pairs, n)) or not np.isfinite(weights).all():
        raise ValueError(
            f"weights have shape {weights.shape}; they must be finite, of shape {(n,)} "
            f"or {(*pairs, n)}."
        )
    return np.broadcast_to(weights, (*pairs, n)).reshape(-1, n)


def _removables(
    kernels: Kernels,
    query: Array,
    damping: Damping,
    weights: np.ndarray | None,
    members: Sequence[np.ndarray],
    pooled: bool,
) -> Iterator[Removable]:
    """Yields each pair's kernel, in which an image is one row; or if pooled the kernel of
    all pairs, in which an image is a row of each.

    Influence, with weights, is linear in the queries and takes their sum; coverage,
    without, takes them one by one.
    """
    queries = [
        np.asarray(g, np.float64)
        if weights is None
        else g.sum(axis=0, keepdims=True, dtype=np.float64)
        for g in by_pair(query)
    ]
    if not pooled:
        for pair, ((phi, kernel), g) in enumerate(zip(kernels, queries, strict=True)):
            factor, m = _factor(kernel, phi, g, damping)
            ones = m.copy() if weights is None else weights[[pair]]
            yield Removable(factor, m, ones, members)
        return
    (phi, kernel), damping = kernels.pooled, kernels.of_pooled(damping)
    factor, m = _factor(kernel, phi, np.concatenate(queries), damping)
    ones = m.copy() if weights is None else scipy.linalg.block_diag(*weights)
    pairs, n = len(queries), kernels.train.shape[-2]
    starts = n * np.arange(pairs)[:, None]
    yield Removable(factor, m, ones, [(starts + rows).ravel() for rows in members])


def _factor(
    kernel: Kernel, phi: np.ndarray, g: np.ndarray, damping: Damping
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factor of M = factor^T factor, and m of some queries."""
    value, tau = kernel.lambda_of(damping), solution(kernel, phi, g)
    factors = (kernel.eigenvalues if kernel.dual else 1) / (kernel.eigenvalues + value)
    factor = np.asarray(tau.right) * np.sqrt(factors)[:, None]
    return factor, np.array(tau.scores(value))
