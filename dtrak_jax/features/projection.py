"""Random projections of gradients from p to k dimensions.

All of them keep inner products in expectation, E <phi, phi'> = <g, g'>, are functions
of (seed, row, column) whatever the device or tile, and never hold a p x k matrix.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dtrak_jax.config import PROJECTIONS, at_least, one_of
from dtrak_jax.streams import fold_in, stream

TILE_ENTRIES = 2**22
"""Entries of a dense projection that exist at one time."""

SKETCH_ROWS = 16
"""Rows of a sketch that are added in one pass."""


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


def project(
    projection: Projection, gradients: jax.Array | Sequence[jax.Array]
) -> jax.Array:
    """Projects gradients [n, p] to features [n, k], float32.

    Args:
      projection: P.
      gradients: [n, p], or their parts [n, p_i] in order, which saves joining them. A
        sketch depends on the sizes of the parts.
    """
    parts = [gradients] if hasattr(gradients, "shape") else list(gradients)
    key = stream(projection.seed, projection.kind)
    if projection.kind in ("sketch", "factorized"):
        return _sketch(projection, key, parts)
    if projection.kind == "none":
        return jnp.concatenate(parts, axis=1)
    return _dense(projection, key, parts)


def _sketch(projection: Projection, key: jax.Array, parts: list) -> jax.Array:
    """Lays the entries out as rows of length k, flips signs at random, adds rows up.

    Entries that meet have independent signs; a row's never meet: a count sketch
    (Charikar et al. 2002) that adds up slices where they lie. What is left of each
    part after its last whole row is joined, and laid out in the same way.
    """
    n, k = len(parts[0]), projection.dim
    whole = [part.shape[1] // k * k for part in parts]
    laid_out = [part[:, :end] for part, end in zip(parts, whole, strict=True) if end]
    rest = [part[:, end:] for part, end in zip(parts, whole, strict=True)]
    filling = -sum(piece.shape[1] for piece in rest) % k
    laid_out.append(jnp.concatenate([*rest, jnp.zeros((n, filling))], axis=1))

    counts = [rows.shape[1] // k for rows in laid_out]
    # All in one draw: a draw for each part costs more than adding its rows.
    signs = _signs(key, sum(counts) * k).reshape(1, -1)
    total, before = jnp.zeros((n, k)), 0
    for rows, count in zip(laid_out, counts, strict=True):
        own = signs[:, before * k : (before + count) * k]
        total = _add_rows(total, rows, own)
        before += count
    return total


def _add_rows(total: jax.Array, rows: jax.Array, signs: jax.Array) -> jax.Array:
    """Adds [n, r k] times signs [1, r k] to the total [n, k]."""
    k = total.shape[1]

    def add(total, rows, signs):
        for at in range(0, rows.shape[1], k):
            total = total + rows[:, at : at + k] * signs[:, at : at + k]
        return total

    size = SKETCH_ROWS * k
    blocks = rows.shape[1] // size

    def add_block(b, total):
        block = [
            jax.lax.dynamic_slice_in_dim(x, b * size, size, 1) for x in (rows, signs)
        ]
        return add(total, *block)

    if blocks > 1:
        total = jax.lax.fori_loop(0, blocks, add_block, total)
        rows, signs = rows[:, blocks * size :], signs[:, blocks * size :]
    return add(total, rows, signs)


def _dense(projection: Projection, key: jax.Array, parts: list) -> jax.Array:
    """G R / sqrt(k), a tile of R's rows at a time."""
    n, k = len(parts[0]), projection.dim
    p = sum(part.shape[1] for part in parts)
    entries = {"rademacher": _signs, "gaussian": _normals}[projection.kind]
    rows = max(1, min(p, TILE_ENTRIES // k))
    tiles = -(-p // rows)
    filling = jnp.zeros((n, tiles * rows - p), jnp.float32)
    laid_out = jnp.concatenate([*parts, filling], axis=1)

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
