"""Phi_q (Phi^T Phi + lambda I)^-1 Phi^T, for every lambda from one factorisation.

The Gram matrix of the smaller side is added up on the devices in float32, which is the
precision of the features; its eigendecomposition and all that divides by small numbers
is done in float64 on the host. A float32 inverse is wrong for small lambda.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from dtrak_jax import parallel
from dtrak_jax.config import positive
from dtrak_jax.parallel import P

GRID = tuple(10.0**e for e in np.arange(-4, 1.01, 0.25))
"""Values of lambda worth trying, in units of the mean eigenvalue."""

BLOCK = 2**26
"""Entries of the features that are on the devices at one time."""

ALL_ZERO = "all features of the training set are 0; nothing to attribute."


class Damping(NamedTuple):
    """lambda: `value` times the kernel's mean eigenvalue, or `value` itself."""

    value: float
    absolute: bool = False

    def of(self, mean_eigenvalue: float) -> float:
        """lambda; a ValueError unless the value is above 0."""
        positive("damping", self.value)
        return self.value * (1 if self.absolute else mean_eigenvalue)


def absolute(value: float) -> Damping:
    """lambda itself, in the units of Phi^T Phi, as the paper gives it."""
    return Damping(value, absolute=True)


class Kernel(NamedTuple):
    """The eigendecomposition of Phi Phi^T (dual, n <= k) or Phi^T Phi (primal)."""

    eigenvalues: np.ndarray
    """float64 [m], ascending; m = min(n, k)."""
    eigenvectors: np.ndarray
    """float64 [m, m], in columns."""
    dual: bool

    @property
    def mean_eigenvalue(self) -> float:
        """trace(Phi Phi^T) / min(n, k)."""
        return float(self.eigenvalues.mean())

    @property
    def floor(self) -> float:
        """Below this, eigenvalues are rounding errors of float32 features."""
        return float(np.finfo(np.float32).eps * self.eigenvalues[-1])

    def damping(self, damping: Damping, strict: bool = True) -> float:
        """lambda, for this kernel; NaN instead of the second error unless `strict`.

        Raises:
          ValueError: it is not above 0; or so small that rounding errors would decide
            the scores.
        """
        value = damping.of(self.mean_eigenvalue)
        if value < self.floor and self.eigenvalues[0] < self.floor:
            if not strict:
                return float("nan")
            raise ValueError(
                f"damping is {damping.value}, lambda = {value:.3g}; the kernel has "
                f"eigenvalues below {self.floor:.3g}, which are rounding errors of "
                "float32 features, and lambda must be at least that: damping >= "
                f"{self.floor / (value / damping.value):.3g}."
            )
        return value


def factorize(phi: np.ndarray) -> Kernel:
    """Decomposes the kernel of the features phi [n, k] of the training set.

    Raises:
      MemoryError: min(n, k) is too large for this host; says what would fit.
      ValueError: all features are 0.
    """
    n, k = phi.shape
    _check_memory(min(n, k))
    dual = n <= k
    gram = gram_matrix(phi if dual else phi.T)
    eigenvalues, eigenvectors = scipy.linalg.eigh(
        gram.astype(np.float64), overwrite_a=True, driver="evd"
    )
    if not eigenvalues[-1] > 0:
        raise ValueError(ALL_ZERO)
    # What is below 0 is a rounding error of the Gram matrix.
    return Kernel(np.maximum(eigenvalues, 0), eigenvectors, dual)


def solve(
    kernel: Kernel,
    phi: np.ndarray,
    query: np.ndarray,
    rows: slice = slice(None),
    subsets: np.ndarray | None = None,
) -> Callable[[float], np.ndarray]:
    """tau(lambda) = query (phi^T phi + lambda I)^-1 phi[rows]^T, float64 [q, rows].

    In the dual form the same as (query phi^T) (phi phi^T + lambda I)^-1 [:, rows].

    Args:
      kernel: `factorize(phi)`.
      phi: features of the training set [n, k].
      query: features of the queries [q, k].
      rows: the training examples to score.
      subsets: of these, bool [M, rows]: the sums of tau over each, [q, M], instead.

    Returns:
      A function of lambda, absolute; each further value costs one product.
    """
    query, vectors = np.asarray(query, np.float64), kernel.eigenvectors
    if kernel.dual:
        left = inner_products(query, phi) @ vectors
        right = vectors[rows]
    else:
        left = query @ vectors
        right = inner_products(vectors.T, phi[rows]).T
    if subsets is not None:
        right = subsets.astype(np.float64) @ right

    def tau(damping: float) -> np.ndarray:
        return (left / (kernel.eigenvalues + damping)) @ right.T

    return tau


def inverse_norms(kernel: Kernel, phi: np.ndarray) -> Callable[[float], np.ndarray]:
    """||(phi^T phi + lambda I)^-1 phi_n||_2 of every training example, float64 [n].

    With eigenvalues e and eigenvectors V in columns, its square is
    sum_j (phi_n . V_j)^2 / (e_j + lambda)^2 in the primal form and
    sum_j V_nj^2 e_j / (e_j + lambda)^2 in the dual one.

    Args:
      kernel: `factorize(phi)`.
      phi: features of the training set [n, k].

    Returns:
      A function of lambda, absolute. The norm of a row of zeros is exactly 0.
    """
    if kernel.dual:
        # The eigenvectors give a row of zeros its rounding errors.
        there = np.any(phi, axis=1, keepdims=True)
        squares = kernel.eigenvectors**2 * kernel.eigenvalues * there
    else:
        squares = inner_products(kernel.eigenvectors.T, phi).T ** 2

    def norms(damping: float) -> np.ndarray:
        return np.sqrt(squares @ (kernel.eigenvalues + damping) ** -2)

    return norms


def inner_products(a: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """a phi^T in float64 [m, n]; a block of phi at a time has a copy in float64."""
    return np.concatenate([a @ block.T for block in blocks(phi)], axis=1)


def blocks(phi: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of phi [n, k] in float64, some at a time."""
    rows = max(1, BLOCK // phi.shape[1])
    for start in range(0, len(phi), rows):
        yield phi[start : start + rows].astype(np.float64)


def gram_matrix(a: np.ndarray) -> np.ndarray:
    """a a^T, float32 [m, m], of a [m, c]; blocks of columns, spread over all devices.

    With several processes all must call it, with the same a, and all get the result.
    """
    mesh = parallel.mesh(jax.devices())
    width = max(1, BLOCK // len(a))
    width += -width % mesh.size
    add_block = _gram_function(mesh)
    total = np.zeros((len(a), len(a)), np.float32)
    for start in range(0, a.shape[1], width):
        total = add_block(total, spread_columns(a[:, start : start + width], mesh))
    return np.asarray(total)


def spread_columns(a: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Puts a [m, c] on the devices in float32, columns over "data", zeros at the end.

    A process copies the columns of its own devices alone.
    """
    width = -(-a.shape[1] // mesh.shape["data"])

    def of_device(index: tuple[slice, slice]) -> np.ndarray:
        start = index[1].start or 0
        columns = np.asarray(a[:, start : start + width], np.float32)
        return np.pad(columns, ((0, 0), (0, width - columns.shape[1])))

    return jax.make_array_from_callback(
        (len(a), width * mesh.shape["data"]),
        jax.sharding.NamedSharding(mesh, P(None, "data")),
        of_device,
    )


@functools.cache
def _gram_function(mesh: jax.sharding.Mesh) -> Callable:
    def add_block(total, block):
        part = jnp.matmul(block, block.T, precision="highest")
        return total + jax.lax.psum(part, "data")

    return parallel.over_mesh(add_block, mesh, (P(), P(None, "data")), P())


def _check_memory(m: int) -> None:
    """Raises a MemoryError if an m x m eigendecomposition does not fit this host."""
    need = 4 * 8 * m**2
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise MemoryError(
            f"an eigendecomposition of {m} x {m} needs about {need / 2**30:.0f} GiB, "
            f"this host has {have / 2**30:.0f}. min(n, k) must be at most "
            f"{int((have / 32) ** 0.5)}: take a smaller projection dim, or solver 'cg', "
            "which decomposes nothing."
        )
