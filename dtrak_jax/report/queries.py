"""Queries: their strongest training images, and whether methods agree on them."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.data import Dataset, trained_on
from dtrak_jax.evaluation.statistics import spearman
from dtrak_jax.report.record import Recipe
from dtrak_jax.report.standing import Standing
from dtrak_jax.report.uncertainty import uncertainty

FREQUENT = 12
"""Frequent supporters shown for each method."""


class Entry(NamedTuple):
    """A picture in a list: a training image, or the first of several near-duplicates."""

    rows: Sequence[int]
    """The rows of its training images: one, or all near-duplicates."""
    score: float
    error: float
    """NaN if there is none."""
    above: bool
    """True if it stands out."""
    width: float = 0.0
    """The length of its bar, as a part of the largest score and error of its query."""
    whisker: tuple[float, float] | None = None
    """The beginning and the length of the error, likewise."""


def query_set(
    name: str,
    images: Dataset,
    train: Dataset,
    scores: Mapping[str, Scores],
    shown: tuple[int, int],
    standing: Mapping[str, Standing],
    recipe: Recipe | None,
) -> dict:
    """Returns what methods found for the first queries of a set.

    `shown` says how many queries, and how many images of each.
    """
    count, top = min(shown[0], len(images.ids)), shown[1]
    merged = {m: s.merged() for m, s in scores.items()}
    return {
        "name": name,
        "images": images,
        "count": count,
        "same": trained_on(images, train),
        "strongest": {
            m: strongest(
                *(s, merged[m], uncertainty(merged[m], recipe)[0]),
                *(count, top, standing[m]),
            )
            for m, s in scores.items()
        },
        "uncertainty": {m: uncertainty(s, recipe)[1] for m, s in scores.items()},
        "verdicts": {
            m: verdicts(s, merged[m], count, standing[m]) for m, s in scores.items()
        },
        "agreement": agreement(*merged.values(), top) if len(merged) == 2 else None,
    }


def anchors(sets: Mapping[str, Dataset]) -> dict[str, list[str]]:
    """Returns the place of each query in the page, "query-ID", no two alike.

    Characters that a link cannot hold become hyphens. Where another query has the name
    already, the name of its set is added.
    """
    taken, places = set(), {}
    for name, images in sets.items():
        places[name] = []
        for query_id in images.ids.tolist():
            place = "query-" + _slug(query_id)
            while place in taken:
                place += f"-{_slug(name)}"
            taken.add(place)
            places[name].append(place)
    return places


def _slug(text: str) -> str:
    """Returns text of letters, digits, underscores, dots and hyphens only."""
    return re.sub(r"[^\w.-]", "-", text)


def verdicts(
    scores: Scores, pictures: Scores, count: int, standing: Standing
) -> list[tuple]:
    """Returns (reason why nobody can say, ids that stand out, the strongest first) of
    each of the first `count` queries, of scores and of what they are `merged`."""
    if standing.supporting is None:
        return [(standing.why, [])] * count
    rows, reasons_and_ids = scores.picture_rows, []
    for i in range(count):
        order = np.argsort(-pictures.scores[i], kind="stable")
        order = order[standing.supporting[i, rows[order]]]
        reasons_and_ids.append(("", pictures.train_ids[order].tolist()))
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
    scores: Scores,
    pictures: Scores,
    errors: np.ndarray,
    count: int,
    top: int,
    standing: Standing,
) -> list[dict[str, list[Entry]]]:
    """Returns {side: entries} of each of the first `count` queries.

    Entries are pictures, and so are the errors: near-duplicates are one, as `pictures`,
    the scores merged, have them.
    """
    sides = {
        "supporting": (1, standing.supporting),
        "opposing": (-1, standing.opposing),
    }
    rows, lists = scores.picture_rows, []
    for i in range(count):
        values = pictures.scores[i]
        entries = {
            side: [
                Entry(
                    np.flatnonzero(scores.picture_ids == pictures.train_ids[column]),
                    *(values[column], errors[i, column]),
                    above is not None and bool(above[i, rows[column]]),
                )
                for column in _highest(sign * values, top)
            ]
            for side, (sign, above) in sides.items()
        }
        ends = [
            abs(e.score) + np.nan_to_num(e.error) for of in entries.values() for e in of
        ]
        scale = max(ends, default=1.0)
        lists.append(
            {side: [_drawn(e, scale) for e in of] for side, of in entries.items()}
        )
    return lists


def _highest(values: np.ndarray, top: int) -> np.ndarray:
    """Returns the columns of the highest values above 0: with few training images the
    supporting ones would run into the opposing ones."""
    order = np.argsort(-values, kind="stable")[:top]
    return order[values[order] > 0]


def _drawn(entry: Entry, scale: float) -> Entry:
    """Returns an entry with its bar, and with its whisker if it has an error."""
    size, whisker = abs(float(entry.score)), None
    if not np.isnan(entry.error):
        low = max(0.0, size - entry.error)
        whisker = low / scale, (size + entry.error - low) / scale
    return entry._replace(width=size / scale, whisker=whisker)


def agreement(a: Scores, b: Scores, top: int) -> dict:
    """Returns how far two methods agree on the same queries.

    "rho" is Spearman's correlation of the scores of each query, NaN where those of one
    method are constant; "common" says how many of the top supporters are the same.
    """
    constant = np.minimum(np.ptp(a.scores, axis=1), np.ptp(b.scores, axis=1)) == 0
    rho = np.where(constant, np.nan, spearman(a.scores.T, b.scores.T))
    top = min(top, len(a.train_ids))
    tops = zip(a.top(top).index, b.top(top).index, strict=True)
    common = np.array([len(np.intersect1d(*pair)) for pair in tops])
    return {"rho": rho, "median": np.median(rho), "common": common}


def frequent_supporters(method: str, scores: Sequence[Scores], top: int) -> dict:
    """Returns the pictures most often among a query's `top` supporters, of the method's
    scores for all sets of queries; near-duplicates are one."""
    rows, picture_ids = scores[0].picture_rows, scores[0].picture_ids
    tops = [s.merged().top(min(top, len(rows))) for s in scores]
    supporters = np.concatenate([rows[t.index[t.scores > 0]] for t in tops])
    counts = np.bincount(supporters, minlength=len(scores[0].train_ids))
    order = np.argsort(-counts, kind="stable")[:FREQUENT]
    return {
        "method": method,
        "images": [
            (np.flatnonzero(picture_ids == picture_ids[index]), counts[index])
            for index in order
            if counts[index]
        ],
        "named": np.sum(counts > 0),
        "share": counts[order].sum() / max(1, counts.sum()),
        "queries": sum(len(s.query_ids) for s in scores),
    }
