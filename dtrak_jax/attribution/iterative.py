"""The scores without an eigendecomposition, by conjugate gradients.

They serve where min(n, k) is too large for one host to decompose the kernel, and queries
are few: every query pays for its own iterations, and every lambda for new ones.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.attribution import linalg
from dtrak_jax.parallel import P
from dtrak_jax.progress import progress

TOLERANCE = 1e-5
"""The largest error of a query's scores, as a fraction of their norm."""

ROUNDS, ITERATIONS, REDUCTION = 8, 1000, 1e-4
"""The largest number of rounds, and of iterations in each. A round ends when the residual
of its float32 system has shrunk to this fraction."""


def solve(phi: np.ndarray, query: np.ndarray, damping: float) -> np.ndarray:
    """Returns tau = query (phi^T phi + lambda I)^-1 phi^T, float64 [q, n], for one lambda.

    It solves x A = b, with A = phi phi^T + lambda I, b = query phi^T and tau = x (dual,
    n <= k), or A = phi^T phi + lambda I, b = query and tau = x phi^T (primal). Conjugate
    gradients (Hestenes and Stiefel 1952) solve for all queries at once, in float32 on
    all devices of all processes, over which phi is spread; rounds of them refine x until
    the residual r = b - x A, in float64 on the host, proves that every query's scores
    are right:

      |tau - exact| <= |r| / lambda (dual), or |r| / (2 sqrt(lambda)) (primal),

    since no eigenvalue e of phi phi^T makes 1 / (e + lambda), or sqrt(e) / (e + lambda),
    larger. This bound must be at most `TOLERANCE` |tau|.

    An iteration takes 4 n k operations for each query, and adds up min(n, k) numbers
    for each over the devices. With e the largest eigenvalue, 1 to 6 sqrt(e / lambda)
    iterations were needed where eigenvalues fall like i^-1 to i^-2, and lambda below
    1e-6 e may be out of reach. Features phi [n, k] must fit on the devices together.

    Raises:
      ValueError: lambda is too small for that accuracy.
    """
    dual, mesh = len(phi) <= phi.shape[1], parallel.mesh(jax.devices())
    correct = correction_function(mesh)
    spread = linalg.spread_columns(phi if dual else phi.T, mesh)
    query = np.asarray(query, np.float64)
    b = np.asarray(linalg.inner_products(query, phi)) if dual else query
    gain = 1 / damping if dual else 1 / (2 * damping**0.5)
    x, residual, worst = np.zeros_like(b), b, np.inf
    rounds = progress(range(ROUNDS), "conjugate gradients", unit="round", delay=2)
    for _ in rounds:
        norms = np.linalg.norm(residual, axis=1, keepdims=True)
        right = np.divide(residual, norms, out=np.zeros_like(b), where=norms > 0)
        right = parallel.of_main_process(right.T.astype(np.float32))
        x = x + norms * np.asarray(correct(spread, right, np.float32(damping))).T
        if dual:
            tau = x
            image = np.asarray(linalg.inner_products(linalg.weighted_sum(x, phi), phi))
        else:
            tau = np.asarray(linalg.inner_products(x, phi))
            image = linalg.weighted_sum(tau, phi)
        residual = b - image - damping * x
        error, size = (np.linalg.norm(rows, axis=1) for rows in (gain * residual, tau))
        previous, worst = worst, np.divide(error, size, out=error, where=size > 0).max()
        worst = float(parallel.of_main_process(np.float32(worst)))
        rounds.set_postfix(error=worst)
        if worst <= TOLERANCE:
            return tau
        if not worst < previous / 2:
            break
    raise ValueError(
        f"conjugate gradients do not reach lambda = {damping:.3g}: the residual leaves "
        f"scores uncertain by {worst:.1g} times their norm, and {TOLERANCE:g} is "
        "allowed. Take a larger damping, or solver 'eigh' with a smaller projection dim."
    )


@functools.cache
def correction_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (a [m, c], b [m, q], lambda) -> x, where (a a^T + lambda I) x is about b."""

    def correct(a, b, damping):
        def product(p):
            inner = jnp.matmul(a.T, p, precision="highest")
            outer = jax.lax.psum(jnp.matmul(a, inner, precision="highest"), "data")
            return outer + damping * p

        def is_unfinished(state):
            *_, squares, i = state
            return (i < ITERATIONS) & jnp.any(squares > REDUCTION**2)

        def iterate(state):
            x, r, p, squares, i = state
            image = product(p)
            step = _ratio(squares, jnp.sum(p * image, axis=0))
            x, r = x + step * p, r - step * image
            new_squares = jnp.sum(r**2, axis=0)
            return x, r, r + _ratio(new_squares, squares) * p, new_squares, i + 1

        squares = jnp.sum(b**2, axis=0)
        state = jnp.zeros_like(b), b, b, squares, 0
        return jax.lax.while_loop(is_unfinished, iterate, state)[0]

    return parallel.sharded(correct, mesh, (P(None, "data"), P(), P()), P())


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a / b [1, q], and 0 for a query that is solved to the last bit."""
    return jnp.where(b > 0, a / b, 0).reshape(1, -1)
