"""Queries: their strongest training images, and whether methods agree on them."""

from collections.abc import Mapping, Sequence

import numpy as np

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.evaluation.statistics import spearman
from dtrak_jax.report.standing import Standing

FREQUENT = 12
"""Frequent supporters shown for each method."""


def query_set(
    name: str,
    images: Dataset,
    scores: Mapping[str, Scores],
    shown: tuple[int, int],
    standing: Mapping[str, Standing],
) -> dict:
    """Returns what methods found for the first queries of a set.

    `shown` says how many queries, and how many images of each.
    """
    count, top = min(shown[0], len(images.ids)), shown[1]
    return {
        "name": name,
        "images": images,
        "count": count,
        "strongest": {
            m: strongest(s, count, top, standing[m]) for m, s in scores.items()
        },
        "verdicts": {m: verdicts(s, count, standing[m]) for m, s in scores.items()},
        "agreement": agreement(*scores.values(), top) if len(scores) == 2 else None,
    }


def verdicts(scores: Scores, count: int, standing: Standing) -> list[tuple]:
    """Returns (reason why nobody can say, ids that stand out, the strongest first) of
    each of the first `count` queries."""
    if standing.supporting is None:
        return [(standing.why, [])] * count
    reasons_and_ids = []
    for row, above in zip(scores.scores[:count], standing.supporting, strict=False):
        order = np.argsort(-row, kind="stable")
        reasons_and_ids.append(("", scores.train_ids[order[above[order]]].tolist()))
    return reasons_and_ids


def most_alike(
    pixels: Scores | None, standing: Mapping[str, Standing] | None
) -> list[tuple] | None:
    """Returns (id of the training image most alike in pixels, whether it stands out) of
    each query; None if nobody compared pixels."""
    if pixels is None:
        return None
    first, above = pixels.scores.argmax(axis=1), standing[""].supporting
    return [
        (str(pixels.train_ids[image]), above is not None and bool(above[i, image]))
        for i, image in enumerate(first)
    ]


def strongest(
    scores: Scores, count: int, top: int, standing: Standing
) -> list[dict[str, list[tuple]]]:
    """Returns {side: images} of each of the first `count` queries.

    An image is (index, score, share of the largest score of the query, whether it stands
    out).
    """
    above = {"supporting": standing.supporting, "opposing": standing.opposing}
    sides = {"supporting": scores.top(top), "opposing": scores.top(top, opposing=True)}
    largest = np.abs(scores.scores).max(axis=1)
    return [
        {
            side: [
                (
                    *(index, score, abs(score) / largest[i]),
                    above[side] is not None and bool(above[side][i, index]),
                )
                for index, score in zip(images.index[i], images.scores[i], strict=True)
                # With few training images one list would run into the other.
                if (score < 0 if side == "opposing" else score > 0)
            ]
            for side, images in sides.items()
        }
        for i in range(count)
    ]


def agreement(a: Scores, b: Scores, top: int) -> dict:
    """Returns how far two methods agree on the same queries.

    "rho" is Spearman's correlation of the scores of each query, NaN where those of one
    method are constant; "common" says how many of the top supporters are the same.
    """
    constant = np.minimum(np.ptp(a.scores, axis=1), np.ptp(b.scores, axis=1)) == 0
    rho = np.where(constant, np.nan, spearman(a.scores.T, b.scores.T))
    tops = zip(a.top(top).index, b.top(top).index, strict=True)
    common = np.array([len(np.intersect1d(*pair)) for pair in tops])
    return {"rho": rho, "median": np.median(rho), "common": common}


def frequent_supporters(method: str, scores: Sequence[Scores], top: int) -> dict:
    """Returns the training images most often among a query's `top` supporters, of the
    method's scores for all sets of queries."""
    tops = [s.top(top) for s in scores]
    supporters = np.concatenate([t.index[t.scores > 0] for t in tops])
    counts = np.bincount(supporters, minlength=len(scores[0].train_ids))
    order = np.argsort(-counts, kind="stable")[:FREQUENT]
    return {
        "method": method,
        "images": [(index, counts[index]) for index in order if counts[index]],
        "named": np.sum(counts > 0),
        "share": counts[order].sum() / max(1, counts.sum()),
        "queries": sum(len(s.query_ids) for s in scores),
    }
