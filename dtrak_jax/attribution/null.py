"""The floor: the least score with which a training image stands out for a query.

Whatever is scored, some image comes first. Where no image is special, the highest scores
x_1 >= x_2 >= ... of a query lie as far apart as those of any long tail: the gaps
i (x_i - x_(i+1)) are alike and exponential (Renyi 1953, "On the theory of order
statistics"). That held for models that were trained, not trained, and trained on noise;
see `floor`.
"""

from collections.abc import Sequence

import numpy as np

from dtrak_jax.attribution.groups import group_scores

LEAST_QUERIES = 8
"""The fewest queries of which anything is said."""

LEAST_IMAGES = 12
"""The fewest training images of which anything is said."""

GAPS = 10
"""Gaps behind the first ones of each query, from which their size is learnt."""

LEVELS = (0.04, 0.01)
"""Chances, 0.05 together, that the first gap and the second one are taken for special by
mistake: so one or two images stand out, or none."""

SAME = 1e-4
"""Scores that differ by less, as a part of the highest, are those of copies."""

COPIES = 4
"""Copies of a picture, on average, among the highest scores."""

SPREADS = 3
"""An image that many queries score high, or low, must exceed its own median spread by this
factor."""

PERMUTATIONS = 200
"""Random groupings of a query's scores."""

BLOCK = 64
"""Queries that are grouped at random together."""


def floor(scores: np.ndarray, unrelated: np.ndarray | None = None) -> np.ndarray | None:
    """Returns what a score must exceed to stand out, float64 [q, n].

    The floor is about the 95% quantile of the highest score under a null without a special
    image. Of each query's scores, less the median of their image over all queries and then
    their own median, the unit is the root mean square of the `GAPS` scores behind the
    first two. In this unit g is the mean, over all queries, of i (x_i - x_(i+1)) over
    those ranks; equal scores, such as of copies, are one. The first image stands out if
    x_1 - x_2 > g ln(1/.04), and both of the first two do if 2 (x_2 - x_3) > g ln(1/.01).
    Nothing of that is learnt from the gaps that are judged, so that every query may have
    its special image.

    On scikit-learn's digits 0% to 7% of queries stood out, with D-TRAK and TRAK, of
    models that were trained, not trained, and trained on noise, and where queries were
    noise; of queries that are training images themselves it was 73% (D-TRAK) to 95%
    (TRAK) of those of a trained model, and 98% to 100% of the others.

    Args:
      scores: [q, n], of n training images (or groups) for q queries, or `Scores`.
      unrelated: [r, n], of further queries to learn from, such as validation images.

    Returns:
      None if there are fewer than `LEAST_QUERIES` queries, the unrelated ones included,
      or `LEAST_IMAGES` images: too few to judge. inf for a query whose scores are all the
      same.
    """
    judged = _rows(scores)
    rows = judged if unrelated is None else np.concatenate([judged, _rows(unrelated)])
    if len(rows) < LEAST_QUERIES or rows.shape[1] < LEAST_IMAGES:
        return None
    shared = np.median(rows, axis=0)
    middle = np.median(rows - shared, axis=1, keepdims=True)
    first = len(LEVELS)
    behind = min(GAPS, rows.shape[1] // 2 - first)
    tops = _highest(rows - shared - middle, first + behind + 1)
    units = np.sqrt((tops[:, first:-1] ** 2).mean(axis=1, keepdims=True))
    varies = units > 1e-12 * np.abs(rows).max(initial=1e-300)
    units = np.where(varies, units, np.inf)
    tops = tops / units
    ranks = np.arange(1, first + behind + 1)
    gaps = ranks * (tops[:, :-1] - tops[:, 1:])
    usual = gaps[varies[:, 0], first:]
    allowed = -np.log(LEVELS) * (usual.mean() if usual.size else 0)
    limits = tops[:, 1 : first + 1] + allowed / ranks[:first]
    exceeded = gaps[:, :first] > allowed
    # The lowest that is exceeded; the first, if none is.
    lowest = np.where(
        exceeded.any(axis=1), first - 1 - exceeded[:, ::-1].argmax(axis=1), 0
    )
    limit = np.take_along_axis(limits, lowest[:, None], axis=1)
    spread = np.median(np.abs(rows - shared - middle) / units, axis=0)
    limit = np.where(varies, np.maximum(limit, SPREADS * spread), np.inf)
    with np.errstate(invalid="ignore"):
        result = shared + middle + np.where(varies, limit * units, np.inf)
    return result[: len(judged)]


def _highest(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns the highest different scores of each query, falling [q, count].

    Copies of a picture have the same scores, and count once. Where there are not so many
    different ones, all are 0.
    """
    most = min(rows.shape[1], COPIES * count)
    tops = -np.sort(np.partition(-rows, most - 1, axis=1)[:, :most], axis=1)
    different = np.diff(tops, prepend=np.inf, axis=1) < -SAME * np.abs(tops[:, :1])
    highest = np.zeros((len(rows), count))
    for row, top, new in zip(highest, tops, different, strict=True):
        if new.sum() >= count:
            row[:] = top[new][:count]
    return highest


def group_floor(
    scores: np.ndarray,
    column: Sequence[str] | np.ndarray,
    unrelated: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray | None:
    """Returns what a group's score must exceed to stand out, float64 [q, G].

    The groups are those of `group_scores`, sorted. The null gives the same scores to the
    images at random, `PERMUTATIONS` times, in groups of the same sizes; a score that
    stands out by itself counts as its `floor` there, so that one such image may make its
    group stand out. The floor is the 95% quantile of the highest sum, where sums are
    compared after their size: (sum - n_g mean) / sqrt(n_g).

    None means too few queries or images to judge, see `floor`, or less than two groups.
    """
    rows = _rows(scores)
    limit = floor(scores, unrelated)
    names, sizes = np.unique(np.asarray(column), return_counts=True)
    if limit is None or len(names) < 2:
        return None
    shared = np.median(
        rows if unrelated is None else np.concatenate([rows, _rows(unrelated)]), axis=0
    )
    null = np.minimum(rows, limit) - shared
    mean = null.mean(axis=1, keepdims=True)
    highest = [
        _highest_sums(block - of_block, column, sizes, seed)
        for block, of_block in zip(_blocks(null), _blocks(mean), strict=True)
    ]
    quantile = np.concatenate(highest)[:, None]
    _, of_all = group_scores(shared[None], column)
    return of_all + sizes * mean + np.sqrt(sizes) * quantile


def _highest_sums(
    rows: np.ndarray, column: np.ndarray, sizes: np.ndarray, seed: int
) -> np.ndarray:
    """Returns the 95% quantile of each query's highest sum over the root of its size [q]."""
    rng = np.random.default_rng(seed)
    highest = []
    for _ in range(PERMUTATIONS):
        _, sums = group_scores(rows[:, rng.permutation(rows.shape[1])], column)
        highest.append((sums / np.sqrt(sizes)).max(axis=1))
    return np.quantile(highest, 0.95, axis=0)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    """Returns the rows `BLOCK` at a time: they are copied."""
    return [rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)]


def _rows(scores: np.ndarray) -> np.ndarray:
    """Returns scores as float64 [q, n], or raises a ValueError."""
    rows = np.asarray(getattr(scores, "scores", scores), np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(
            f"scores have shape {rows.shape}; they must be finite numbers [q, n]."
        )
    return rows
