"""LDS of one score matrix, and its interval, against loops over scipy's spearmanr.

The reference: for each of 1,000 queries one call of `scipy.stats.spearmanr` over 64
subsets; for the interval `scipy.stats.bootstrap` over subsets with 64 resamples of
that. Ours resample subsets and queries, 1,000 times.

With so many queries all 64 resamples lie below the score itself, as repeated rows are
ties, and the reference's BCa interval is NaN: on both sides, as it must be.
"""

import numpy as np
import scipy.stats

from dtrak_jax.evaluation import datamodeling, lds
from dtrak_jax.evaluation.statistics import resamples
from dtrak_jax.evaluation.truth import RetrainedLosses
from tests.benchmarks.rows import Row, in_turn


def measure(small: bool, repetitions: int) -> list[Row]:
    """64 subsets of 1,000 training images, 1,000 queries, 3 seeds."""
    subsets, queries, n = (16, 20, 50) if small else (64, 1000, 1000)
    scores, truth = ensemble(subsets, queries, n)
    settings = {"subsets": subsets, "queries": queries, "training images": n}

    def our_lds():
        return datamodeling.lds(truth.predict(scores), truth)

    def their_lds():
        return spearman_loop(predict(scores, truth), truth.target)

    def our_interval():
        # What is drawn once for all scores counts here.
        resamples.cache_clear()
        return datamodeling.bootstrap(truth.predict(scores), truth)[0]

    def their_interval():
        return bootstrap_loop(predict(scores, truth), truth.target)

    def difference(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        return float(np.nan_to_num(np.abs(np.subtract(ours, theirs))).max())

    ours = datamodeling.reference_interval(truth.predict(scores), truth)
    return [
        Row(
            name="LDS",
            ours="from scores to the LDS",
            theirs="the same with scipy.stats.spearmanr for every query",
            goal=("at least", 20),
            settings=settings,
            agreement={"difference": difference(our_lds(), their_lds())},
            **in_turn(our_lds, their_lds, repetitions),
        ),
        Row(
            name="LDS interval",
            ours=f"{lds.RESAMPLES} resamples of subsets and queries",
            theirs="scipy.stats.bootstrap: 64 resamples of subsets, and BCa's jackknife",
            goal=("at most", 1),
            settings=settings,
            agreement={
                "difference of our own version of theirs": difference(
                    [ours["low"], ours["high"]], their_interval()
                )
            },
            **in_turn(our_interval, their_interval, repetitions),
        ),
    ]


def ensemble(subsets: int, queries: int, n: int) -> tuple[np.ndarray, RetrainedLosses]:
    """Scores [queries, n], and losses that they partly predict."""
    rng = np.random.default_rng(0)
    masks = rng.permuted(np.tile(np.arange(n) % 2 == 0, (subsets, 1)), axis=1)
    scores = rng.standard_normal((queries, n))
    signal = -(masks - 0.5) @ scores.T
    noise = rng.standard_normal((subsets, 3, queries)) * 2 * signal.std()
    truth = RetrainedLosses(
        signal[:, None] + noise,
        masks,
        np.array([f"q{i}" for i in range(queries)]),
        np.array([f"n{i}" for i in range(n)]),
    )
    return scores, truth


def predict(scores: np.ndarray, truth: RetrainedLosses) -> np.ndarray:
    """Sums of scores over subsets [subsets, queries], in NumPy."""
    return truth.masks.astype(np.float64) @ scores.T


def spearman_loop(predictions: np.ndarray, target: np.ndarray) -> float:
    """The reference's LDS."""
    found = [
        scipy.stats.spearmanr(predictions[:, q], target[:, q]).statistic
        for q in range(target.shape[1])
    ]
    return float(np.mean(found))


def bootstrap_loop(predictions: np.ndarray, target: np.ndarray) -> list[float]:
    """The reference's interval of the LDS."""
    result = scipy.stats.bootstrap(
        (np.arange(len(target)),),
        lambda rows: spearman_loop(predictions[rows], target[rows]),
        vectorized=False,
        n_resamples=64,
        confidence_level=0.95,
        random_state=42,
    )
    return [result.confidence_interval.low, result.confidence_interval.high]
