"""Rows of arrays that are computed a batch at a time."""

from collections.abc import Callable

import jax
import numpy as np

from dtrak_jax.parallel import pad
from dtrak_jax.progress import progress


def in_batches(function: Callable, array: np.ndarray, size: int, desc: str = "compute"):
    """Returns what a function makes of the rows of an array, `size` of them at a time.

    The last batch is filled up, so that one compiled program serves all. The results, a
    pytree of arrays with a row for each of the batch, are joined on the host. `desc` names
    the work in its progress.
    """
    parts = []
    starts = range(0, len(array), size)
    for start in progress(starts, desc, unit="batch", delay=2):
        batch = pad(array[start : start + size], size)
        parts.append(jax.device_get(function(batch)))
    # Only the last batch is filled up.
    return jax.tree.map(lambda *rows: np.concatenate(rows)[: len(array)], *parts)
