"""The scores without an eigendecomposition, by conjugate gradients.

For when min(n, k) is too large for one host to decompose the kernel, and queries are
few: every query pays for its own iterations, and every lambda for new ones.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dtrak_jax import parallel
from dtrak_jax.attribution import solver
from dtrak_jax.attribution.solver import Damping
from dtrak_jax.parallel import P

TOLERANCE = 1e-5
"""Largest error of a query's scores, as a share of their norm."""

ROUNDS, ITERATIONS, REDUCTION = 8, 1000, 1e-4
"""At most so many rounds of so many iterations, each until what is left of the residual
is this share of what it was."""


class Trace(NamedTuple):
    """What is known of a kernel that is not decomposed."""

    mean_eigenvalue: float
    """trace(Phi Phi^T) / min(n, k)."""
    eigenvalues: None = None

    def damping(self, damping: Damping, strict: bool = True) -> float:
        """lambda. Whether it is above rounding errors shows when scores are made."""
        return damping.of(self.mean_eigenvalue)


def trace(phi: np.ndarray) -> Trace:
    """Of the kernel of the features phi [n, k] of the training set.

    Raises:
      ValueError: all features are 0.
    """
    total = sum(float(np.vdot(block, block)) for block in solver.blocks(phi))
    if total == 0:
        raise ValueError(solver.ALL_ZERO)
    return Trace(total / min(phi.shape))


def solve(phi: np.ndarray, query: np.ndarray, damping: float) -> np.ndarray:
    """tau = query (phi^T phi + lambda I)^-1 phi^T, float64 [q, n], for one lambda.

    x A = b, with A = phi phi^T + lambda I, b = query phi^T and tau = x (dual, n <= k),
    or A = phi^T phi + lambda I, b = query and tau = x phi^T (primal). Conjugate
    gradients (Hestenes and Stiefel 1952) for all queries at once, in float32 on all
    devices of all processes, over which phi is spread; refined until the residual
    r = b - x A, in float64 on the host, proves that every query's scores are right:

      |tau - exact| <= |r| / lambda (dual), or |r| / (2 sqrt(lambda)) (primal),

    since no eigenvalue e of phi phi^T makes 1 / (e + lambda), or sqrt(e) / (e + lambda),
    larger. Must be at most `TOLERANCE` |tau|.

    An iteration takes 4 n k operations for each query, and adds up min(n, k) numbers
    for each over the devices. With e the largest eigenvalue, 1 to 6 sqrt(e / lambda) of
    them were needed where eigenvalues fall like i^-1 to i^-2, and lambda below 1e-6 e
    may be out of reach. The Gram and its decomposition take 2 n k m + O(m^3) operations,
    m = min(n, k), and then serve any number of queries and every lambda.

    Args:
      phi: features of the training set [n, k]; they must fit on the devices together.
      query: features of the queries [q, k].
      damping: lambda, absolute.

    Raises:
      ValueError: lambda is too small for that accuracy.
    """
    a = phi if len(phi) <= phi.shape[1] else phi.T
    mesh = parallel.mesh(jax.devices())
    spread = solver.spread_columns(a, mesh)
    size = max(1, solver.BLOCK // len(a))
    parts = (query[start : start + size] for start in range(0, len(query), size))
    return np.concatenate([_solve(mesh, spread, phi, q, damping) for q in parts])


def _solve(mesh, spread: jax.Array, phi, query, damping: float) -> np.ndarray:
    """`solve` for as many queries as are on the devices at one time."""
    correct = _correction_function(mesh)
    dual = len(phi) <= phi.shape[1]
    query = np.asarray(query, np.float64)
    b = solver.inner_products(query, phi) if dual else query
    gain = 1 / damping if dual else 1 / (2 * damping**0.5)
    x, residual, worst = np.zeros_like(b), b, np.inf
    rounds = tqdm(
        range(ROUNDS), "conjugate gradients", unit="round", disable=None, delay=2
    )
    for _ in rounds:
        norms = np.linalg.norm(residual, axis=1, keepdims=True)
        right = np.divide(residual, norms, out=np.zeros_like(b), where=norms > 0)
        # Hosts may round differently, and must not go different ways.
        right = multihost_utils.broadcast_one_to_all(right.T.astype(np.float32))
        x = x + norms * np.asarray(correct(spread, right, np.float32(damping))).T
        if dual:
            tau, applied = x, solver.inner_products(_combine(x, phi), phi)
        else:
            tau = solver.inner_products(x, phi)
            applied = _combine(tau, phi)
        residual = b - applied - damping * x
        error, size = (np.linalg.norm(rows, axis=1) for rows in (gain * residual, tau))
        before, worst = worst, np.max(np.divide(error, size, out=error, where=size > 0))
        worst = float(multihost_utils.broadcast_one_to_all(np.float32(worst)))
        rounds.set_postfix(error=worst)
        if worst <= TOLERANCE:
            return tau
        if not worst < before / 2:
            break
    raise ValueError(
        f"conjugate gradients do not reach lambda = {damping:.3g}: the residual leaves "
        f"scores uncertain by {worst:.1g} times their norm, and {TOLERANCE:g} is "
        "allowed. Take a larger damping, or solver 'eigh' with a smaller projection dim."
    )


def _combine(weights: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """weights [q, n] phi [n, k] in float64; a block of phi at a time has a copy."""
    total, start = 0.0, 0
    for block in solver.blocks(phi):
        total = total + weights[:, start : start + len(block)] @ block
        start += len(block)
    return total


@functools.cache
def _correction_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (a, b, lambda) -> x with (a a^T + lambda I) x = b [m, q], about."""

    def run(a, b, damping):
        def product(p):
            inner = jnp.matmul(a.T, p, precision="highest")
            whole = jax.lax.psum(jnp.matmul(a, inner, precision="highest"), "data")
            return whole + damping * p

        def go_on(state):
            *_, squares, i = state
            return (i < ITERATIONS) & jnp.any(squares > REDUCTION**2)

        def iterate(state):
            x, r, p, squares, i = state
            image = product(p)
            step = _ratio(squares, jnp.sum(p * image, axis=0))
            x, r = x + step * p, r - step * image
            new = jnp.sum(r**2, axis=0)
            return x, r, r + _ratio(new, squares) * p, new, i + 1

        squares = jnp.sum(b**2, axis=0)
        state = jnp.zeros_like(b), b, b, squares, 0
        return jax.lax.while_loop(go_on, iterate, state)[0]

    return parallel.over_mesh(run, mesh, (P(None, "data"), P(), P()), P())


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b [1, q], and 0 for a query that is done to the last bit."""
    return jnp.where(b > 0, a / b, 0).reshape(1, -1)
