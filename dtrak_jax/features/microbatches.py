"""Microbatches: the gradients that devices compute together."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import chunks_of
from dtrak_jax.features.task import Task

CHUNK_ROWS, CHUNK_BYTES = 64, 2**25
"""About how much of a store is written, and lost by a kill, at a time."""

COPIES = 4
"""The copies of a chunk of features at one time: on the devices and on the host, of one
chunk that is computed and one that is written."""


class Microbatch(NamedTuple):
    """The arguments of S gradients, sum_r weight_r grad f(noised image r of an example).

    The sum is of one pair of weight 1 where pairs are kept apart, and of R of all pairs
    where they are averaged.
    """

    x: np.ndarray  # [S, 1, H, W, C], the same for all pairs, or [S, R, H, W, C]
    words: np.ndarray  # hashes of ids, uint32 [S, 2], see `rng.id_words`
    position: np.ndarray  # in the data set, int32 [S]
    pair: np.ndarray  # indices into `Task.pairs`, int32 [S, R]
    weight: np.ndarray  # float32 [S, R]
    cond: object  # a pytree of arrays [S, ...], or None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes and numbers that `featurize` and the planner count with."""

    pairs: int  # J, the pairs of a timestep and a noise draw
    apart: bool  # True where every pair of an example has a gradient of its own
    size: int  # S, gradients in a microbatch of all devices
    copies: int  # R, noised images of a gradient in a microbatch
    dim: int  # k, the length of a feature

    @classmethod
    def of(
        cls, task: Task, projection: Projection, p: int, batch_size: int, devices: int
    ) -> "Layout":
        """Returns the layout of gradients of length p on so many devices.

        An averaged gradient is one ordinary batched gradient of its noised images, so
        each device computes one at a time.
        """
        pairs, dim = len(task.pairs), p if projection.kind == "none" else projection.dim
        if task.per_timestep:
            return cls(pairs, True, batch_size * devices, 1, dim)
        return cls(pairs, False, devices, min(batch_size, pairs), dim)

    @property
    def per_example(self) -> int:
        """The number of gradients of an example."""
        return self.pairs if self.apart else 1

    @property
    def parts(self) -> int:
        """The number of microbatches whose gradients are added up to one of all pairs."""
        return 1 if self.apart else -(-self.pairs // self.copies)

    @property
    def rows_per_chunk(self) -> int:
        """The number of examples that are written at a time, in whole microbatches."""
        unit = -(-self.size // self.per_example)
        rows = min(CHUNK_ROWS, CHUNK_BYTES // (4 * self.per_example * self.dim))
        return unit * max(1, rows // unit)

    def shape(self, n: int) -> tuple[int, ...]:
        """Returns the shape of the features of n examples."""
        return (self.pairs, n, self.dim) if self.apart else (n, self.dim)

    def metadata(self, n: int) -> dict:
        """Returns what a store says of the sizes of the features of n examples."""
        sizes = {"shape": list(self.shape(n)), "pairs": self.pairs}
        return sizes | {"rows_per_chunk": self.rows_per_chunk}

    def rounds(self, n: int, processes: int = 1) -> int:
        """Returns how many rounds the busiest process has, of n examples in all."""
        # Process 0 has the most chunks.
        chunks = chunks_of(n, self.rows_per_chunk)[::processes]
        gradients = [(c.stop - c.start) * self.per_example for c in chunks]
        return sum(-(-count // self.size) for count in gradients)

    def bytes_written(self, n: int, measurements: int) -> int:
        """Returns the bytes of a store of n examples."""
        numbers = measurements * self.per_example * (self.dim + 1) + self.pairs
        return np.dtype(np.float32).itemsize * n * numbers

    def bytes_in_memory(self, n: int, measurements: int) -> int:
        """Returns the bytes of memory that are taken while such a store is written."""
        # A round of gradients is whole, however few examples there are.
        rows = min(self.rows_per_chunk, n)
        gradients = max(rows * self.per_example, self.size)
        numbers = COPIES * gradients * self.dim * measurements
        return np.dtype(np.float32).itemsize * numbers


def microbatches(
    layout: Layout, examples: tuple, pair: int | np.ndarray | None = None
) -> Iterator[list[Microbatch]]:
    """Cuts a chunk of n examples into rounds of `Layout.parts` microbatches.

    Where pairs are kept apart they are of all pairs, or of the one that is given, or of
    one for each example, [n, 1].

    The gradients of a round's microbatches add up to `Layout.size` gradients. The last
    round repeats its last gradient to be as large as the others. Examples are (x, words,
    position, cond); x is [n, H, W, C], or [n, pairs, H, W, C].
    """
    n, pairs, copies = len(examples[0]), layout.pairs, layout.copies
    if layout.apart and pair is not None:
        row, pair, weight = np.arange(n), np.full((n, 1), pair), np.ones((n, 1))
    elif layout.apart:
        row, pair = np.divmod(np.arange(n * pairs), pairs)
        pair, weight = pair[:, None], np.ones((n * pairs, 1))
    else:
        row = np.arange(n)
        filled = np.arange(layout.parts * copies)
        pair = np.tile(np.minimum(filled, pairs - 1), (n, 1))
        weight = np.tile((filled < pairs) / pairs, (n, 1))
    pair, weight = pair.astype(np.int32), weight.astype(np.float32)
    slot = np.arange(layout.size)[:, None]
    for start in range(0, len(row), layout.size):
        at = np.arange(start, start + layout.size).clip(max=len(row) - 1)
        x, words, position, cond = jax.tree.map(lambda a, i=row[at]: a[i], examples)
        parts = []
        for part in range(0, pair.shape[1], copies):
            cut = at, slice(part, part + copies)
            images = x[:, None] if x.ndim == 4 else x[slot, pair[cut]]
            parts.append(
                Microbatch(images, words, position, pair[cut], weight[cut], cond)
            )
        yield parts
