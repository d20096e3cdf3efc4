"""The linear datamodeling score of predictions, with its intervals and its ceiling."""

import itertools
from collections.abc import Callable

import numpy as np
import scipy.stats

from dtrak_jax import attribution
from dtrak_jax.attribution import Kernels
from dtrak_jax.attribution.inputs import Array
from dtrak_jax.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    correlation_interval,
    interval,
    resamples,
    spearman,
)
from dtrak_jax.evaluation.truth import MIN_SUBSETS, RetrainedLosses


def lds(predictions: np.ndarray, truth: RetrainedLosses) -> float:
    """Returns the mean over queries of Spearman's correlation over subsets.

    Park et al., "TRAK" (arXiv 2303.14186), section 3. The predictions [subsets,
    queries] are those of `RetrainedLosses.predict`.
    """
    return float(spearman(predictions, truth.target).mean())


def bootstrap(
    predictions: np.ndarray, truth: RetrainedLosses
) -> tuple[Estimate, np.ndarray]:
    """Returns the score with its interval, and the samples behind the interval.

    Subsets and queries are drawn anew together: the interval is that of other subsets
    and of other queries. The samples [RESAMPLES] of two scores under one truth belong
    to the same draws, so their differences are those of a paired comparison.
    """
    samples = _resampled(predictions, truth.target)
    return correlation_interval(lds(predictions, truth), samples), samples


def _resampled(a: np.ndarray, b: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the mean correlation of a and b [subsets, queries] in every resample.

    The seed decides the subsets of the resamples; their queries are always the same.
    """
    subsets, queries = a.shape
    shares = resamples(queries, RESAMPLES, 1) / queries
    correlations = spearman(a, b, resamples(subsets, RESAMPLES, seed))
    return (correlations * shares).sum(axis=1)


def ceiling(truth: RetrainedLosses) -> Estimate | None:
    """Returns the LDS that each subset's true mean loss would have; None with one seed.

    Two halves of h seeds each agree with correlation r (mean over queries and over
    all ways to halve); S seeds then have the reliability R = c r / (1 + (c - 1) r),
    c = S / h (Spearman and Brown), and their mean loss correlates with the truth by
    sqrt(R). This is correct for Pearson correlations and close for ranks.
    """
    seeds = truth.outputs.shape[1]
    if seeds == 1:
        return None
    size = seeds // 2
    choices = itertools.combinations(range(seeds), size)
    halves = [p for p in itertools.combinations(choices, 2) if not {*p[0]} & {*p[1]}]
    values, samples = [], []
    for pair in halves:
        a, b = (truth.outputs[:, list(half)].mean(axis=1) for half in pair)
        values.append(spearman(a, b).mean())
        samples.append(_resampled(a, b))
    agreement = interval(np.mean(values), np.mean(samples, axis=0))
    r, c = np.maximum(agreement, 0), seeds / size
    return Estimate(*np.sqrt(c * r / (1 + (c - 1) * r)).tolist())


def reference_interval(
    predictions: np.ndarray, truth: RetrainedLosses
) -> dict[str, float]:
    """Returns the interval of the D-TRAK paper's notebooks, to compare with its numbers.

    `scipy.stats.bootstrap` over subsets alone, 64 samples, BCa, seed 42; and the mean
    and standard deviation of the samples, which its tables print. It holds the
    queries fixed, and 64 samples are few: the interval is too narrow.
    """

    def statistic(subsets):
        return spearman(predictions[subsets], truth.target[subsets]).mean()

    subsets = (np.arange(len(truth.masks)),)
    result = scipy.stats.bootstrap(
        subsets, statistic, vectorized=False, n_resamples=64, random_state=42
    )
    ends, samples = result.confidence_interval, result.bootstrap_distribution
    values = (ends.low, ends.high, samples.mean(), samples.std())
    return dict(zip(("low", "high", "mean", "std"), map(float, values), strict=True))


# The score with a lambda, or a method, that learns from the ensemble


def damping_path(
    kernels: Kernels, query: Array, masks: np.ndarray, pooled: bool = False
) -> tuple[list[float], np.ndarray]:
    """Returns every damping of `attribution.GRID` that is above rounding errors, and the
    predictions with each of them [dampings, subsets, queries]."""
    path = attribution.damping_path(kernels, query, pooled=pooled, subsets=masks)
    sound = np.isfinite(path).all(axis=(1, 2))
    grid = [d for d, ok in zip(attribution.GRID, sound, strict=True) if ok]
    return grid, path[sound].swapaxes(1, 2)


def cross_fitted(
    path: np.ndarray, truth: RetrainedLosses
) -> tuple[Estimate, list[int]]:
    """Returns the score with its damping chosen on the subsets that it is not scored on.

    The path has the predictions at every value of a grid [grid, subsets, queries]. The
    best value on one half of the subsets (even and odd ones) is scored on the other,
    and the two scores are averaged; the two positions in the grid come with it.
    """
    chosen = []

    def fit(half: np.ndarray) -> np.ndarray:
        values = [spearman(p[half], truth.target[half]).mean() for p in path]
        chosen.append(int(np.argmax(values)))
        return path[chosen[-1]]

    return _over_halves(fit, truth), chosen


def has_halves(truth: RetrainedLosses) -> bool:
    """Returns whether one half of the subsets may choose what is scored on the other."""
    return len(truth.masks) >= 2 * MIN_SUBSETS


def from_halves(function: Callable, truth: RetrainedLosses) -> Estimate:
    """Returns the score of a method that learns from the ensemble itself.

    The method, (masks [M, n], losses [M, q]) -> scores [q, n], learns from one half of
    the subsets and is scored on the other, and the other way round; on the subsets that
    it has seen it would be scored for remembering them.
    """

    def fit(half: np.ndarray) -> np.ndarray:
        return truth.predict(function(truth.masks[half], -truth.target[half]))

    return _over_halves(fit, truth)


def _over_halves(
    fit: Callable[[np.ndarray], np.ndarray], truth: RetrainedLosses
) -> Estimate:
    """Returns the mean score of predictions fitted on one half of the subsets, on the other.

    `fit` makes predictions for all subsets from those that it may see, bool [subsets].
    """
    count = len(truth.masks)
    if not has_halves(truth):
        raise ValueError(
            f"the ensemble has {count} subsets; choosing on one half and reporting on "
            f"the other needs {2 * MIN_SUBSETS} or more: set ensemble.subsets and run "
            "`dtrak-jax retrain`."
        )
    even = np.arange(count) % 2 == 0
    values, samples = [], 0.0
    # The halves hold different subsets, which are drawn independently.
    for half, seed in ((even, 2), (~even, 3)):
        predicted, target = fit(half)[~half], truth.target[~half]
        values.append(spearman(predicted, target).mean())
        samples = samples + _resampled(predicted, target, seed) / 2
    return correlation_interval(np.mean(values), samples)
