"""Random projections of gradients from p to k dimensions.

All of them keep inner products in expectation, E <phi, phi'> = <g, g'>, are functions
of (seed, row, column) whatever the device or tile, and never hold a p x k matrix.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from dtrak_jax.config import DENSE, PROJECTIONS, at_least, one_of
from dtrak_jax.streams import stream

TILE_ENTRIES = 2**22
"""Entries of a dense projection that exist at one time."""

SKETCH_ROWS = 16
"""Rows of a sketch that are added in one pass."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """A random linear map of R^p to R^k.

    Attributes:
      kind: "sketch" (a count sketch that adds up signed slices, O(p) work, the default),
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
    projection: Projection,
    gradients: jax.Array | Sequence[jax.Array],
    axis: str | None = None,
) -> jax.Array:
    """Projects gradients [n, p] to features [n, k], float32.

    Args:
      projection: P.
      gradients: [n, p], or their parts [n, p_i] in order, which saves joining them. A
        sketch depends on the sizes of the parts.
      axis: of the mesh whose D devices share the columns of a dense projection, within
        `shard_map`. Each gives its own gradients, and gets the features of those of all
        at its own columns [D n, k / D].
    """
    parts = [gradients] if hasattr(gradients, "shape") else list(gradients)
    return project_each(projection, [parts], axis)[0]


def project_each(
    projection: Projection, gradients: Sequence[list], axis: str | None = None
) -> list[jax.Array]:
    """`project` for the parts of several gradients of the same shapes.

    A dense projection, most of whose work are its random numbers, is drawn once for all.
    """
    key = stream(projection.seed, projection.kind)
    if projection.kind in DENSE:
        return _dense(projection, key, gradients, axis)
    if projection.kind == "none":
        return [jnp.concatenate(parts, axis=1) for parts in gradients]
    return [_sketch(projection, key, parts) for parts in gradients]


def _sketch(projection: Projection, key: jax.Array, parts: list) -> jax.Array:
    """Lays the entries out as rows of length k, flips signs at random, adds rows up.

    Entries that meet have independent signs; a row's never meet: a count sketch
    (Charikar et al. 2002) that adds up slices where they lie. What is left of each
    part is joined, and laid out in the same way.

    The rows of a part begin an odd number of entries apart. Networks have even numbers
    of channels, one of which may hold most of a gradient; else it would be in the same
    column in every row.
    """
    n, k = len(parts[0]), projection.dim
    step = k + 1 - k % 2
    counts = [part.shape[1] // step for part in parts]
    rest = []
    for part, count in zip(parts, counts, strict=True):
        end = count * step
        # Gathered: slices with such a stride do not compile for a TPU v5e.
        columns = jnp.arange(k, end, step) if step > k else jnp.arange(0)
        between = jnp.take(part, columns, axis=1, mode="clip")
        rest += [between, part[:, end:]]
    left = sum(piece.shape[1] for piece in rest)
    last = -(-left // k)
    rest = jnp.concatenate([*rest, jnp.zeros((n, last * k - left))], axis=1)

    # All in one draw: a draw for each part costs more than adding its rows.
    signs = _signs(key, (sum(counts) + last) * k).reshape(-1, 1, k)
    total, before = jnp.zeros((n, k)), 0
    laid_out = [(part, count, step) for part, count in zip(parts, counts, strict=True)]
    for part, count, step in [*laid_out, (rest, last, k)]:
        total = _add_rows(total, part, signs[before : before + count], step)
        before += count
    return total


def _add_rows(
    total: jax.Array, part: jax.Array, signs: jax.Array, step: int
) -> jax.Array:
    """Adds the rows of [n, m] that begin `step` apart, times signs [r, 1, k]."""
    k, count = total.shape[1], len(signs)

    def add(total, part, signs):
        for r, sign in enumerate(signs):
            total = total + part[:, r * step : r * step + k] * sign
        return total

    def add_block(b, total):
        size = SKETCH_ROWS * step
        block = jax.lax.dynamic_slice_in_dim(part, b * size, size, axis=1)
        own = jax.lax.dynamic_slice_in_dim(signs, b * SKETCH_ROWS, SKETCH_ROWS)
        return add(total, block, own)

    blocks = count // SKETCH_ROWS
    if blocks < 2:
        return add(total, part, signs)
    total = jax.lax.fori_loop(0, blocks, add_block, total)
    done = blocks * SKETCH_ROWS
    return add(total, part[:, done * step :], signs[done:])


def _dense(
    projection: Projection, key: jax.Array, gradients: Sequence[list], axis: str | None
) -> list[jax.Array]:
    """G R / sqrt(k) of each G, a tile of R's rows at a time; own columns if shared.

    R is made anew for every batch. So devices that share its columns exchange their
    gradients, a tile at a time, and each makes its own columns alone.
    """
    n, k = len(gradients[0][0]), projection.dim
    p = sum(part.shape[1] for part in gradients[0])
    devices, device = 1, 0
    if axis is not None:
        devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    width = k // devices
    rows = max(1, min(p, TILE_ENTRIES // width))
    tiles = -(-p // rows)
    filling = jnp.zeros((n, tiles * rows - p), jnp.float32)
    laid_out = [jnp.concatenate([*parts, filling], axis=1) for parts in gradients]
    entries = {"rademacher": _signs_of, "gaussian": _normals_of}[projection.kind]
    per_word = DENSE[projection.kind]
    words = device * (width // per_word) + jnp.arange(-(-width // per_word))

    def add_tile(total, tile):
        start = tile * rows
        matrix = entries(_random_words(key, start + jnp.arange(rows), words))
        part = jnp.concatenate(
            [jax.lax.dynamic_slice_in_dim(g, start, rows, axis=1) for g in laid_out]
        )
        if axis is not None:
            part = jax.lax.all_gather(part, axis, tiled=True)
        product = jnp.matmul(part, matrix[:, :width], precision="highest")
        return total + product, None

    total = jnp.zeros((devices * len(gradients) * n, width))
    total = jax.lax.scan(add_tile, total, jnp.arange(tiles))[0]
    features = (total / jnp.sqrt(jnp.float32(k))).reshape(devices, -1, n, width)
    return [features[:, i].reshape(-1, width) for i in range(len(gradients))]


def _random_words(key: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """A random uint32 for each pair of a row and a column, whatever the others are.

    Threefry itself, with the pair as its counter: a key for each would cost as much.
    """
    counter = jnp.meshgrid(
        rows.astype(jnp.uint32), columns.astype(jnp.uint32), indexing="ij"
    )
    first, _ = threefry2x32_p.bind(*jax.random.key_data(key), *counter)
    return first


def _signs(key: jax.Array, k: int) -> jax.Array:
    """k signs, float32 +-1, from one random bit each."""
    return _signs_of(jax.random.bits(key, (1, -(-k // 32)), jnp.uint32))[0, :k]


def _signs_of(words: jax.Array) -> jax.Array:
    """Signs, float32 +-1 [n, 32 m], of the bits of words [n, m]."""
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32)
    bits = (words[:, :, None] >> shifts) & 1
    return 1.0 - 2.0 * bits.astype(jnp.float32).reshape(len(words), -1)


def _normals_of(words: jax.Array) -> jax.Array:
    """Standard normal numbers, one for each word.

    sqrt(2) erf^-1(u), u the middle of one of 2^23 intervals of [-1, 1].
    """
    odd = 2 * (words >> 9).astype(jnp.int32) + (1 - 2**23)
    return jnp.sqrt(2.0) * jax.lax.erf_inv(odd.astype(jnp.float32) * 2.0**-23)
