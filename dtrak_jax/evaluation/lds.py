"""The linear datamodeling score: do scores predict what retraining does?"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
import scipy.stats

from dtrak_jax import attribution
from dtrak_jax.attribution import Kernels
from dtrak_jax.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    interval,
    resamples,
    spearman,
)
from dtrak_jax.features import Features

MIN_SUBSETS = 8
"""The fewest subsets of which an interval says anything."""


@dataclasses.dataclass(frozen=True, eq=False)
class RetrainedLosses:
    """The losses of queries under models that were retrained on subsets.

    Attributes:
      outputs: losses [subsets, seeds, queries].
      masks: whether a training image is in a subset, bool [subsets, train].
      query_ids: str [queries].
      train_ids: str [train].

    Raises:
      ValueError: arrays that do not fit together, or too few subsets.
    """

    outputs: np.ndarray
    masks: np.ndarray
    query_ids: np.ndarray
    train_ids: np.ndarray

    def __post_init__(self):
        expected = (len(self.masks), len(self.train_ids), len(self.query_ids))
        shape = (len(self.outputs), self.masks.shape[1], self.outputs.shape[2])
        if expected != shape:
            raise ValueError(
                f"outputs {self.outputs.shape} and masks {self.masks.shape} do not fit "
                f"{len(self.train_ids)} training images and {len(self.query_ids)} "
                "queries."
            )
        if len(self.masks) < MIN_SUBSETS:
            raise ValueError(
                f"the ensemble has {len(self.masks)} subsets; an interval needs at "
                f"least {MIN_SUBSETS}: set ensemble.subsets and run `dtrak-jax "
                "retrain`."
            )
        if not np.isfinite(self.outputs).all():
            raise ValueError("the ensemble's outputs are not all finite.")

    @functools.cached_property
    def target(self) -> np.ndarray:
        """The target of a score: minus the mean loss over seeds [subsets, queries].

        The sign is minus, as a positive score means that the example lowers the loss.
        """
        return -self.outputs.mean(axis=1)

    @functools.cached_property
    def subset_weights(self) -> np.ndarray:
        """The resamples of subsets that all intervals share [RESAMPLES, subsets]."""
        return resamples(len(self.masks), RESAMPLES, 0)

    @functools.cached_property
    def query_weights(self) -> np.ndarray:
        """The resamples of queries, as shares [RESAMPLES, queries]."""
        counts = resamples(len(self.query_ids), RESAMPLES, 1)
        return counts / len(self.query_ids)

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Returns what additive scores [queries, train] predict, [subsets, queries].

        g(q, S) = sum of tau(q, n) over n in S.
        """
        return self.masks.astype(np.float64) @ np.asarray(scores, np.float64).T


def lds(predictions: np.ndarray, truth: RetrainedLosses) -> float:
    """Returns the mean over queries of Spearman's correlation over subsets.

    Park et al., "TRAK" (arXiv 2303.14186), section 3.

    Args:
      predictions: [subsets, queries], see `RetrainedLosses.predict`.
      truth: the ensemble.
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
    samples = _resampled(predictions, truth.target, truth.subset_weights, truth)
    return interval(lds(predictions, truth), samples), samples


def _resampled(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, truth: RetrainedLosses
) -> np.ndarray:
    """Returns the mean correlation of a and b [subsets, queries] in every resample."""
    return (spearman(a, b, weights) * truth.query_weights).sum(axis=1)


def row(
    estimate: Estimate, rule: str | None = None, damping=None, transform: str = "linear"
) -> dict:
    """Returns what a row of the results says of a score, beside whose it is."""
    return {
        "damping_rule": rule,
        "damping": damping,
        "transform": transform,
        "lds": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
    }


def ceiling(truth: RetrainedLosses) -> Estimate | None:
    """Returns the LDS that each subset's true mean loss would have; None with one seed.

    Two halves of h seeds each agree with correlation r (mean over queries and over
    all ways to halve); S seeds then have the reliability R = c r / (1 + (c - 1) r),
    c = S / h (Spearman and Brown), and their mean loss correlates with the truth by
    sqrt(R). This is correct for Pearson correlations and close for ranks.
    """
    seeds = truth.outputs.shape[1]
    size = seeds // 2
    if size == 0:
        return None
    choices = itertools.combinations(range(seeds), size)
    halves = [p for p in itertools.combinations(choices, 2) if not {*p[0]} & {*p[1]}]
    values, samples = [], []
    for pair in halves:
        a, b = (truth.outputs[:, list(half)].mean(axis=1) for half in pair)
        values.append(spearman(a, b).mean())
        samples.append(_resampled(a, b, truth.subset_weights, truth))
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

    result = scipy.stats.bootstrap(
        (np.arange(len(truth.masks)),),
        statistic,
        vectorized=False,
        n_resamples=64,
        confidence_level=0.95,
        random_state=42,
    )
    samples = result.bootstrap_distribution
    return {
        "low": float(result.confidence_interval.low),
        "high": float(result.confidence_interval.high),
        "mean": float(samples.mean()),
        "std": float(samples.std()),
    }


def damping_path(
    train: Kernels | Features | np.ndarray,
    query: Features | np.ndarray,
    masks: np.ndarray,
    *,
    pooled: bool = False,
) -> tuple[list[float], np.ndarray]:
    """Predicts at every damping of `GRID` that is above rounding errors.

    Args:
      train: kernels or features, as `attribution.damping_path` takes them.
      query: features of the queries.
      masks: subsets of the training set, bool [subsets, train].
      pooled: whether all pairs share one kernel.

    Returns:
      The dampings, and the predictions [dampings, subsets, queries].
    """
    path = attribution.damping_path(train, query, pooled=pooled, subsets=masks)
    sound = np.isfinite(path).all(axis=(1, 2))
    grid = [d for d, ok in zip(attribution.GRID, sound, strict=True) if ok]
    return grid, path[sound].swapaxes(1, 2)


def cross_fitted(
    path: np.ndarray, truth: RetrainedLosses
) -> tuple[Estimate, list[int]]:
    """Returns the score with its damping chosen on the subsets that it is not scored on.

    The best value of the grid on one half of the subsets (even and odd ones) is scored
    on the other, and the two scores are averaged.

    Args:
      path: predictions at every value of a grid [grid, subsets, queries].
      truth: the ensemble; at least 2 * `MIN_SUBSETS` subsets.

    Returns:
      The score with its interval, given the choices; and the two positions in the grid.

    Raises:
      ValueError: too few subsets.
    """
    chosen = []

    def fit(half: np.ndarray) -> np.ndarray:
        values = [spearman(p[half], truth.target[half]).mean() for p in path]
        chosen.append(int(np.argmax(values)))
        return path[chosen[-1]]

    return _over_halves(fit, truth), chosen


def from_halves(function: Callable, truth: RetrainedLosses) -> Estimate:
    """Returns the score of a method that learns from the ensemble itself.

    It learns from one half of the subsets and is scored on the other, and the other
    way round; on the subsets that it has seen it would be scored for remembering them.

    Args:
      function: (masks [M, n], losses [M, q]) -> scores [q, n].
      truth: the ensemble; at least 2 * `MIN_SUBSETS` subsets.
    """

    def fit(half: np.ndarray) -> np.ndarray:
        return truth.predict(function(truth.masks[half], -truth.target[half]))

    return _over_halves(fit, truth)


def _over_halves(
    fit: Callable[[np.ndarray], np.ndarray], truth: RetrainedLosses
) -> Estimate:
    """Returns the mean score of predictions fitted on one half of the subsets, on the other.

    Args:
      fit: maps the subsets to learn from, bool [subsets], to predictions for all
        [subsets, queries].
      truth: the ensemble.
    """
    count = len(truth.masks)
    if count < 2 * MIN_SUBSETS:
        raise ValueError(
            f"the ensemble has {count} subsets; choosing on one half and reporting on "
            f"the other needs {2 * MIN_SUBSETS} or more: set ensemble.subsets and run "
            "`dtrak-jax retrain`."
        )
    even = np.arange(count) % 2 == 0
    values, samples = [], 0.0
    for half in (even, ~even):
        predicted, target = fit(half)[~half], truth.target[~half]
        values.append(spearman(predicted, target).mean())
        # The halves hold different subsets, which are drawn independently; their
        # queries are the same.
        weights = resamples(len(target), RESAMPLES, 1 + len(values))
        samples = samples + _resampled(predicted, target, weights, truth) / 2
    return interval(np.mean(values), samples)
