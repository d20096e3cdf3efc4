"""Which examples a training step sees."""

import functools

import numpy as np


def batch(
    n: int, batch_size: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one step, a function of (seed, step).

    Every epoch is a new permutation of the n examples; its last batch is smaller where
    batch_size does not divide n, and is filled up with examples of weight 0 so that
    all steps share one compiled program.

    Returns:
      Positions [batch_size] of the examples, and their weights, 0 or 1.
    """
    epoch, position = divmod(step, -(-n // batch_size))
    rows = _permutation(n, seed, epoch)[position * batch_size :][:batch_size]
    weights = np.zeros(batch_size, np.float32)
    weights[: len(rows)] = 1
    return np.resize(rows, batch_size), weights


@functools.lru_cache(maxsize=64)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)
