"""Random projections of gradients from p to k dimensions.

All of them keep inner products in expectation, E <phi, phi'> = <g, g'>, are functions
of (seed, row, column) whatever the device or tile, and never hold a p x k matrix.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dtrak_jax.config import PROJECTIONS, at_least, one_of
from dtrak_jax.streams import fold_in, stream

TILE_ENTRIES = 2**22
"""Entries of a dense projection that exist at one time."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """A random linear map of R^p to R^k.

    Attributes:
      kind: "sketch" (a count sketch by signed cyclic shifts, O(p) work, the default),
        "rademacher" or "gaussian" (dense, entries +-1/sqrt(k) or N(0, 1/k), O(p k)
        work), "factorized" (a sketch of sketches that are made layer by layer, without
        the gradients of kernels; see `features.factorized`), or "none" (the gradient
        itself; small models only).
      dim: k; "none" ignores it.
      seed: of the random numbers.
    """

    kind: str = "sketch"
    dim: int = 4096
    seed: int = 0

    def __post_init__(self):
        one_of("projection kind", self.kind, PROJECTIONS)
        at_least("projection dim", self.dim, 1)
        at_least("projection seed", self.seed, 0)

    def output_dim(self, p: int) -> int:
        """k for gradients of p entries."""
        return p if self.kind == "none" else self.dim


def project(projection: Projection, gradients: jax.Array) -> jax.Array:
    """Projects gradients [n, p] to features [n, k], float32."""
    if projection.kind == "none":
        return gradients
    key = stream(projection.seed, projection.kind)
    dense = projection.kind in ("rademacher", "gaussian")
    return (_dense if dense else _sketch)(projection, key, gradients)


def _sketch(projection: Projection, key: jax.Array, gradients: jax.Array) -> jax.Array:
    """Lays p entries out as rows of length k; flips, shifts and adds the rows.

    Entries of one row never meet; two of different rows meet with probability 1/k,
    with independent signs: a count sketch (Charikar et al. 2002) without scatter.
    """
    n, p = gradients.shape
    k = projection.dim
    rows = -(-p // k)
    laid_out = jnp.pad(gradients, ((0, 0), (0, rows * k - p))).reshape(n, rows, k)

    def add_row(total, r):
        row_key = fold_in(key, r)
        row = jax.lax.dynamic_index_in_dim(laid_out, r, axis=1, keepdims=False)
        shift = jax.random.randint(fold_in(row_key, 1), (), 0, k)
        flipped = row * _signs(fold_in(row_key, 0), k).reshape(1, k)
        return total + jnp.roll(flipped, shift, axis=1), None

    return jax.lax.scan(add_row, jnp.zeros((n, k)), jnp.arange(rows))[0]


def _dense(projection: Projection, key: jax.Array, gradients: jax.Array) -> jax.Array:
    """G R / sqrt(k), a tile of R's rows at a time."""
    n, p = gradients.shape
    k = projection.dim
    entries = {"rademacher": _signs, "gaussian": _normals}[projection.kind]
    rows = max(1, min(p, TILE_ENTRIES // k))
    tiles = -(-p // rows)
    laid_out = jnp.pad(gradients, ((0, 0), (0, tiles * rows - p)))

    def add_tile(total, tile):
        start = tile * rows
        keys = jax.vmap(lambda row: fold_in(key, row))(start + jnp.arange(rows))
        matrix = jax.vmap(lambda row_key: entries(row_key, k))(keys)
        part = jax.lax.dynamic_slice_in_dim(laid_out, start, rows, axis=1)
        return total + jnp.matmul(part, matrix, precision="highest"), None

    total = jax.lax.scan(add_tile, jnp.zeros((n, k)), jnp.arange(tiles))[0]
    return total / jnp.sqrt(jnp.float32(k))


def _signs(key: jax.Array, k: int) -> jax.Array:
    """k signs, float32 +-1, from one random bit each."""
    words = jax.random.bits(key, (-(-k // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32).reshape(1, 32)) & 1
    return 1.0 - 2.0 * bits.astype(jnp.float32).reshape(-1)[:k]


def _normals(key: jax.Array, k: int) -> jax.Array:
    """k standard normal numbers."""
    return jax.random.normal(key, (k,))
