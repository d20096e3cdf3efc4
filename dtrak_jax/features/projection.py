"""Random projections of gradients from p to k dimensions.

All of them keep inner products in expectation, E <phi, phi'> = <g, g'>, are functions
of (seed, row, column) whatever the device or tile, and never hold a p x k matrix.
"""

import dataclasses
import warnings
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from dtrak_jax.checks import at_least, one_of, seed
from dtrak_jax.rng import random_bits, stream, threefry

ProjectionKind = Literal["sketch", "rademacher", "gaussian", "factorized", "none"]

DENSE = {"rademacher": 32, "gaussian": 1}
"""The kinds that have a matrix, and the entries of it that one random word makes."""

TILE_ENTRIES = 2**22
"""The number of a dense projection's entries that exist at one time."""

SKETCH_ROWS = 16
"""The number of rows of a sketch that are added in one pass."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """A random linear map of R^p to R^k.

    Attributes:
      kind: "sketch" (a count sketch that adds up signed slices, O(p) work, the default),
        "rademacher" or "gaussian" (dense, entries +-1/sqrt(k) or N(0, 1/k), O(p k)
        work), "factorized" (a sketch of sketches that are made layer by layer, without
        the gradients of weights; see `features.factorized`), or "none" (the gradient
        itself; small models only).
      dim: k; "none" ignores it.
      seed: of the random numbers.
    """

    kind: ProjectionKind = "sketch"
    dim: int = 4096
    seed: int = 0

    def __post_init__(self):
        one_of("projection kind", self.kind, get_args(ProjectionKind))
        dim = at_least("projection dim", self.dim, 1)
        number = seed("projection seed", self.seed)
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "seed", number)


def warn_of_dim(projection: Projection, p: int) -> None:
    """Warns of features that are longer than the gradients of p numbers."""
    if projection.kind != "none" and projection.dim > p:
        warnings.warn(
            f"dim is {projection.dim}, and a gradient has {p} numbers: the projection "
            "'none' keeps all of them in less space.",
            stacklevel=5,
        )


def check_columns(kind: str, dim: int, devices: int) -> None:
    """Raises a ValueError unless devices can share the columns of a projection."""
    at_least("proj_devices", devices, 1)
    unit = DENSE.get(kind, 1) * devices
    if kind in DENSE and devices > 1 and dim % unit:
        raise ValueError(
            f"proj_devices is {devices}: that many devices share the columns of a "
            f"{kind} projection if dim is a multiple of {unit}; it is {dim}."
        )


def project_all(
    projection: Projection,
    gradients: dict[str, Sequence[jax.Array]],
    axis: str | None = None,
    members: Collection[int] | None = None,
) -> dict[str, jax.Array]:
    """Projects gradients of the same shapes [n, p] to features [n, k], float32.

    Args:
      projection: P.
      gradients: the parts [n, p_i] of each one in order, which saves joining them. A
        sketch depends on the sizes of the parts.
      axis: of the mesh whose D devices share the columns of a dense projection, within
        `shard_map`. Each device hands in its gradients, and gets the features of those
        of all devices in its share of the columns [D n, k / D].
      members: the positions of the parts that count; all others are taken for zeros.
    """
    key = stream(projection.seed, projection.kind)
    count = len(next(iter(gradients.values())))
    skipped = set() if members is None else set(range(count)) - set(members)
    gradients = {
        name: [jnp.zeros_like(g) if i in skipped else g for i, g in enumerate(parts)]
        for name, parts in gradients.items()
    }
    if projection.kind in DENSE:
        return _dense(projection, key, gradients, axis)
    if projection.kind == "none":
        return {name: jnp.concatenate(g, axis=1) for name, g in gradients.items()}
    k = projection.dim
    return {name: _sketch(k, key, g, skipped) for name, g in gradients.items()}


def _sketch(
    k: int, key: jax.Array, parts: Sequence[jax.Array], skipped: Collection[int]
) -> jax.Array:
    """Lays the entries out as rows of length k, flips signs at random, adds rows up.

    Entries that meet have independent signs, and those of one row never meet: this is a
    count sketch (Charikar et al. 2002) that adds up slices where they lie. What is too
    short for a row of each part is joined and laid out in the same way.

    The rows of a part begin an odd number of entries apart. Networks have even numbers
    of channels, and one channel may hold most of a gradient; with rows an even number
    apart it would fall into the same column in every row.
    """
    n, step = len(parts[0]), k + 1 - k % 2
    laid_out, rest = [], []
    for part in parts:
        count = part.shape[1] // step
        end = count * step
        laid_out.append((part, count, step))
        # Gathered: slices with such a stride do not compile for a TPU v5e.
        columns = jnp.arange(k, end, step) if step > k else jnp.arange(0)
        between = jnp.take(part, columns, axis=1, mode="clip")
        rest += [between, part[:, end:]]
    length = sum(piece.shape[1] for piece in rest)
    count = -(-length // k)
    rest = jnp.concatenate([*rest, jnp.zeros((n, count * k - length))], axis=1)
    laid_out.append((rest, count, k))

    # All in one draw: a draw for each part costs more than adding its rows.
    rows = sum(count for _, count, _ in laid_out)
    signs = _signs(key, rows * k).reshape(-1, 1, k)
    total, start = jnp.zeros((n, k)), 0
    for i, (part, count, step) in enumerate(laid_out):
        # Rows of zeros need not be added; the last piece is what is left of all parts.
        if i not in skipped:
            total = _add_rows(total, part, signs[start : start + count], step)
        start += count
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
        row_signs = jax.lax.dynamic_slice_in_dim(signs, b * SKETCH_ROWS, SKETCH_ROWS)
        return add(total, block, row_signs)

    blocks = count // SKETCH_ROWS
    if blocks < 2:
        return add(total, part, signs)
    total = jax.lax.fori_loop(0, blocks, add_block, total)
    done = blocks * SKETCH_ROWS
    return add(total, part[:, done * step :], signs[done:])


def _dense(
    projection: Projection, key: jax.Array, gradients: dict, axis: str | None
) -> dict[str, jax.Array]:
    """Returns G R / sqrt(k) for each gradient G, adding up tiles of R's rows.

    R, most of the work, is made anew for every batch, and once for all gradients.
    Devices that share its columns exchange their gradients, a tile at a time, and each
    makes and returns its columns alone.
    """
    parts = next(iter(gradients.values()))
    n, p, k = len(parts[0]), sum(part.shape[1] for part in parts), projection.dim
    devices, device = 1, 0
    if axis is not None:
        devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    width = k // devices
    rows = max(1, min(p, TILE_ENTRIES // width))
    tiles = -(-p // rows)
    filling = jnp.zeros((n, tiles * rows - p), jnp.float32)
    laid_out = [jnp.concatenate([*g, filling], axis=1) for g in gradients.values()]
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
    return {m: features[:, i].reshape(-1, width) for i, m in enumerate(gradients)}


def _random_words(key: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns a random uint32 for each pair of a row and a column.

    It is Threefry itself, with the two as its counter. A key for each would cost as
    much again.
    """
    rows, columns = rows.astype(jnp.uint32), columns.astype(jnp.uint32)
    counter = jnp.meshgrid(rows, columns, indexing="ij")
    return threefry(key, *counter)[0]


def _signs(key: jax.Array, k: int) -> jax.Array:
    """Returns k signs, float32 +-1, from one random bit each."""
    return _signs_of(random_bits(key, (1, -(-k // 32))))[0, :k]


def _signs_of(words: jax.Array) -> jax.Array:
    """Returns the bits of words [n, m] as signs, float32 +-1 [n, 32 m]."""
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32)
    bits = (words[:, :, None] >> shifts) & 1
    return 1.0 - 2.0 * bits.astype(jnp.float32).reshape(len(words), -1)


def _normals_of(words: jax.Array) -> jax.Array:
    """Returns a standard normal number for each word.

    It is sqrt(2) erf^-1(u), u the middle of one of 2^23 intervals of [-1, 1].
    """
    odd = 2 * (words >> 9).astype(jnp.int32) + (1 - 2**23)
    return jnp.sqrt(2.0) * jax.lax.erf_inv(odd.astype(jnp.float32) * 2.0**-23)
