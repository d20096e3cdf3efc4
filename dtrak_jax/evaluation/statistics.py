"""Rank correlations and intervals, for many queries and resamples at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

RESAMPLES = 1000
"""Bootstrap samples behind every interval."""

BLOCK = 2**25
"""Ranks, of all subsets and resamples, that are in memory at one time."""


class Estimate(NamedTuple):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


def spearman(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Returns Spearman's rank correlation of every column of a with that column of b.

    Equal values share the mean of their ranks; a constant column correlates with
    nothing, 0. a and b are [M, q], and the result [q]; with weights w [B, M] it is
    [B, q], of B samples in which row i stands w_i times, without making them: the mean
    rank of row i there is sum_j w_j ([a_j < a_i] + [a_j = a_i] / 2) + 1/2, one matrix
    product for all resamples.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if weights is None:
        return _pearson(*(scipy.stats.rankdata(x, axis=0) for x in (a, b)))
    w = np.asarray(weights, np.float32)
    result = np.empty((len(w), a.shape[1]))
    step = max(1, BLOCK // (len(w) * len(a)))
    for start in range(0, a.shape[1], step):
        columns = slice(start, start + step)
        order_a, order_b = (_order(x[:, columns].T) for x in (a, b))
        result[:, columns] = _correlations(order_a, order_b, w)
    return result


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the correlations of the columns of a and b [M, q]; 0 for a constant one."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    product = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.divide(
        (a * b).sum(axis=0), product, out=np.zeros(a.shape[1]), where=product > 0
    )


def _order(x: np.ndarray) -> np.ndarray:
    """Returns [x_j < x_i] + [x_j = x_i] / 2, float32 [q, i, j], of x [q, M].

    The host makes it, since it compares in float64.
    """
    i, j = x[:, :, None], x[:, None, :]
    return (j < i).astype(np.float32) + np.float32(0.5) * (j == i)


@jax.jit
def _correlations(order_a: jax.Array, order_b: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the correlations [B, q] of `_order`s [q, M, M] and weights [B, M]."""
    count = w.sum(axis=1)[None, :, None]

    def ranks(order):
        # In [-1/2, 1/2], around their mean [q, B, M].
        mean = jnp.einsum("qij,bj->qbi", order, w, precision="highest")
        return mean / count - 0.5

    def moment(x, y):
        return jnp.sum(x * y * w[None], axis=2).T

    a, b = ranks(order_a), ranks(order_b)
    cross, square_a, square_b = moment(a, b), moment(a, a), moment(b, b)
    # float32 leaves about 1e-7 of a variance of 0.
    varies = jnp.minimum(square_a, square_b) > 1e-5
    return jnp.where(
        varies, cross / jnp.sqrt(jnp.where(varies, square_a * square_b, 1)), 0
    )


@functools.cache
def resamples(n: int, count: int, seed: int) -> np.ndarray:
    """Returns how often each of n items is in each bootstrap sample, [count, n]."""
    draws = np.random.default_rng(seed).integers(0, n, (count, n))
    counts = np.zeros((count, n), np.int64)
    np.add.at(counts, (np.arange(count)[:, None], draws), 1)
    return counts


def interval(value: float, samples: np.ndarray) -> Estimate:
    """Returns the value and the central 95% of its bootstrap samples, moved onto it.

    A bootstrap sample of rank correlations is biased low, since repeated rows are
    ties; without moving, the interval of a good score can lie below the score itself.
    """
    low, high = np.quantile(samples, [0.025, 0.975]) - samples.mean()
    return Estimate(float(value), float(value + low), float(value + high))


def correlation_interval(value: float, samples: np.ndarray) -> Estimate:
    """Returns `interval` of a correlation, which is not moved beyond -1 or 1."""
    value, low, high = interval(value, samples)
    return Estimate(value, max(low, -1.0), min(high, 1.0))


def summarize(values: np.ndarray) -> dict[str, float]:
    """Returns the median and mean over queries [Q], each with a 95% interval.

    The interval is that of percentiles over `RESAMPLES` bootstrap samples of the
    queries, the same samples whatever the values.
    """
    n = len(values)
    samples = values[np.random.default_rng(0).integers(0, n, (RESAMPLES, n))]
    summary = {}
    for name, statistic in (("median", np.median), ("mean", np.mean)):
        low, high = np.quantile(statistic(samples, axis=1), [0.025, 0.975])
        summary[name] = float(statistic(values))
        summary |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return summary
