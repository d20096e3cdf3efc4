"""Products of features: a kernel on all devices, all others on the host's CPU.

A kernel is added up in float32, the precision of the features. All that divides by small
numbers is in float64, which accelerators are slow in or do not have.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.features.store import chunks_of
from dtrak_jax.parallel import P, Program

BLOCK = 2**26
"""Entries of the features that are on the devices, or in float64, at one time."""

HostArray = np.ndarray | jax.Array


def gram_matrix(a: np.ndarray) -> np.ndarray:
    """Returns a a^T, float32 [m, m], of a [m, c], added up over blocks of columns.

    All devices share the columns of a block, and all processes must call this together.
    """
    mesh = parallel.mesh(jax.devices())
    width, add_block = block_width(len(a), mesh), gram_function(mesh)
    total = np.zeros((len(a), len(a)), np.float32)
    for start in range(0, a.shape[1], width):
        total = add_block(total, spread_columns(a[:, start : start + width], mesh))
    return np.asarray(total)


@functools.cache
def gram_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (total [m, m], block [m, c]) -> total + block block^T over a mesh."""

    def add_block(total, block):
        part = jnp.matmul(block, block.T, precision="highest")
        return total + jax.lax.psum(part, "data")

    return parallel.sharded(add_block, mesh, (P(), P(None, "data")), P())


def gram_program(n: int, k: int, devices: Sequence[jax.Device]) -> tuple[Program, int]:
    """Returns the program that makes a kernel of n x k features, and its number of calls.

    Where the last block of columns is narrower, its program is a smaller one.
    """
    rows, columns, mesh = min(n, k), max(n, k), parallel.mesh(devices)
    width = block_width(rows, mesh)
    block = rows, min(width, columns + -columns % mesh.size)
    arguments = tuple(
        jax.ShapeDtypeStruct(shape, np.float32) for shape in ((rows, rows), block)
    )
    return Program(gram_function(mesh), arguments, mesh), -(-columns // width)


def block_width(rows: int, mesh: jax.sharding.Mesh) -> int:
    """Returns how many columns of features with so many rows are a block."""
    width = max(1, BLOCK // rows)
    return width + -width % mesh.size


def spread_columns(a: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Puts a [m, c] on the devices in float32, columns over "data", zeros at the end."""
    width = -(-a.shape[1] // mesh.size)

    def columns_of_device(index: tuple[slice, slice]) -> np.ndarray:
        columns = np.asarray(a[:, index[1]], np.float32)
        return np.pad(columns, ((0, 0), (0, width - columns.shape[1])))

    return jax.make_array_from_callback(
        (len(a), width * mesh.size),
        jax.NamedSharding(mesh, P(None, "data")),
        columns_of_device,
    )


def on_host(function: Callable) -> Callable:
    """Compiles a function in float64 for the host's CPU; without one NumPy runs it.

    The function may use what arrays of NumPy and of JAX share, operators and methods.
    """
    compiled = jax.jit(function)

    @functools.wraps(function)
    def run(*arrays):
        if not has_cpu():
            return function(*arrays)
        with jax.enable_x64(True), jax.default_device("cpu"):
            return compiled(*arrays)

    return run


@functools.cache
def has_cpu() -> bool:
    """Returns False, with a warning, where JAX_PLATFORMS names only a TPU or GPU."""
    try:
        jax.local_device_count("cpu")
    except RuntimeError:
        warnings.warn(
            "JAX has no CPU device here, so NumPy solves for the scores, to the same "
            "accuracy. For compiled programs add cpu to JAX_PLATFORMS.",
            stacklevel=2,
        )
        return False
    return True


def put(array: np.ndarray) -> HostArray:
    """Returns a float64 array where functions of `on_host` take it without a copy."""
    if not has_cpu():
        return array
    with jax.enable_x64(True), jax.default_device("cpu"):
        return jax.device_put(array)


@on_host
def times(a, b):
    return a @ b.astype("float64")


@on_host
def times_transposed(a, b):
    return a.astype("float64") @ b.astype("float64").T


@on_host
def divided_product(a, divisors, b):
    """Returns the sum over j of a_qj b_jn / divisors_j [q, n]."""
    return (a / divisors[None]) @ b


def inner_products(a: HostArray, phi: np.ndarray) -> HostArray:
    """Returns a phi^T, float64 [m, n], of a [m, k] and float32 phi [n, k]."""
    parts = [times_transposed(a, phi[rows]) for rows in row_blocks(phi)]
    return parts[0] if len(parts) == 1 else put(np.concatenate(parts, axis=1))


def weighted_sum(weights: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Returns weights phi, float64 [q, k], of weights [q, n] and float32 phi [n, k]."""
    blocks = row_blocks(phi)
    return sum(np.asarray(times(weights[:, rows], phi[rows])) for rows in blocks)


def row_blocks(phi: np.ndarray) -> list[slice]:
    """Returns so many rows of phi [n, k] at a time that a float64 copy is small."""
    return chunks_of(len(phi), max(1, BLOCK // phi.shape[1]))
