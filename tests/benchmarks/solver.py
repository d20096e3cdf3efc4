"""27 values of lambda: one factorisation, against a float32 inversion for each.

The reference inverts (Phi^T Phi + lambda I), k x k in float32, for every lambda of
{1, 2, 5} x 10^-2 ... 10^6. Ours is all there is from features to scores; of theirs only
the inversions count, by NumPy or PyTorch, whichever is faster here. One is timed.
"""

import time
from collections.abc import Callable

import numpy as np
import scipy.linalg

from dtrak_jax.attribution.influence import solution
from dtrak_jax.attribution.kernel import factorize
from tests.benchmarks import missing_peers
from tests.benchmarks.rows import Row, in_turn

GRID = np.array([d * 10.0**e for e in range(-6, 3) for d in (1, 2, 5)])
"""27 values as far apart as the reference's, in units of the mean eigenvalue: from far
below to far above what is of use."""

QUERIES = 100
LARGEST = 8192
"""k of the largest inversion that is timed; a larger one is extrapolated by (k/k')^3."""


def measure(small: bool, repetitions: int) -> list[Row]:
    """n = 1,000, k = 4,096; and n = 5,000, k = 32,768."""
    sizes = [(50, 200), (100, 800)] if small else [(1000, 4096), (5000, 32768)]
    largest = 400 if small else LARGEST
    return [path_of(n, k, min(k, largest), repetitions) for n, k in sizes]


def path_of(n: int, k: int, inverted: int, repetitions: int) -> Row:
    """One size; `inverted` is the size of the inversion that is timed."""
    phi, query = features(n, k)
    exact, mean_eigenvalue = exact_path(phi, query)
    lambdas = GRID * mean_eigenvalue
    path = our_path(phi, query, lambdas)
    errors = [
        relative_error(tau, exact(damping))
        for tau, damping in zip(path, lambdas, strict=True)
    ]
    assert max(errors) < 0.01, f"scores are wrong: {errors}"
    gram = phi[:, :inverted].T @ phi[:, :inverted]
    gram[np.diag_indices(inverted)] += np.float32(lambdas[len(GRID) // 2])
    method, inverse = fastest_inverse(gram)
    agreement = {"largest error of ours": max(errors)}
    if inverted == k:
        agreement |= inverted_errors(phi, query, lambdas, exact, inverse)
    stands_for = len(GRID) * (k / inverted) ** 3
    return Row(
        name=f"lambda path, n={n}, k={k}",
        ours="Gram matrix, eigendecomposition and the scores of 27 lambdas",
        theirs=f"one float32 inversion of {inverted} x {inverted} by {method}; "
        f"27 of {k} x {k} are taken as {stands_for:g} of them",
        goal=("at least", 200),
        settings={"n": n, "k": k, "queries": QUERIES, "lambdas": len(GRID)},
        agreement=agreement,
        stands_for=stands_for,
        **in_turn(
            lambda: our_path(phi, query, lambdas), lambda: inverse(gram), repetitions
        ),
    )


def features(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Training features [n, k] and queries, whose Gram has eigenvalues about 1/i^1.5.

    Real ones fall off like that.
    """
    rng = np.random.default_rng(0)
    scales = (np.arange(1, k + 1) ** -0.75).astype(np.float32)
    phi = rng.standard_normal((n, k), np.float32) * scales
    return phi, rng.standard_normal((QUERIES, k), np.float32) * scales


def our_path(
    phi: np.ndarray, query: np.ndarray, lambdas: np.ndarray
) -> list[np.ndarray]:
    """The scores [q, n] at every lambda."""
    tau = solution(factorize(phi), phi, query)
    return [tau.scores(damping) for damping in lambdas]


def exact_path(phi: np.ndarray, query: np.ndarray) -> tuple[Callable, float]:
    """(tau(lambda), mean eigenvalue); each tau is a float64 solution of the dual."""
    phi, query = phi.astype(np.float64), query.astype(np.float64)
    gram, cross = phi @ phi.T, query @ phi.T

    def tau(damping: float) -> np.ndarray:
        matrix = gram + damping * np.eye(len(gram))
        return scipy.linalg.solve(matrix, cross.T, assume_a="pos").T

    return tau, float(np.trace(gram) / min(phi.shape))


def fastest_inverse(matrix: np.ndarray) -> tuple[str, Callable]:
    """NumPy's or PyTorch's inversion, whichever is faster on this matrix."""
    known = {"NumPy": np.linalg.inv}
    if not missing_peers():
        from tests.benchmarks import peers

        known["PyTorch"] = peers.inverse
    times = {}
    for name, inverse in known.items():
        start = time.perf_counter()
        inverse(matrix)
        times[name] = time.perf_counter() - start
    name = min(times, key=times.get)
    return name, known[name]


def inverted_errors(phi, query, lambdas, exact, inverse) -> dict[str, float]:
    """The same error of the reference's scores, at the ends and middle of the grid."""
    gram, found = phi.T @ phi, {}
    for i in (0, len(lambdas) // 2, -1):
        matrix = gram.copy()
        matrix[np.diag_indices(len(matrix))] += np.float32(lambdas[i])
        tau = query @ inverse(matrix) @ phi.T
        name = f"error of float32 inversion at damping {GRID[i]:g}"
        found[name] = relative_error(tau, exact(lambdas[i]))
    return found


def relative_error(tau: np.ndarray, right: np.ndarray) -> float:
    """|tau - right| / |right| over all scores."""
    return float(np.linalg.norm(tau - right) / np.linalg.norm(right))
