"""Groups: whose training images score highest for a query, and for all of them?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dtrak_jax.attribution.scores import Groups, Scores
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.report.record import Recipe
from dtrak_jax.report.standing import Standing
from dtrak_jax.report.text import grouped
from dtrak_jax.report.uncertainty import group_uncertainty

LISTED = 8
"""Groups listed for a query, if there are more: the first, the last two, its own."""

LISTED_IN_SHORT = 6
"""Groups listed for all queries where the page begins, likewise."""

LISTED_FOR_ALL = 20
"""Groups listed for all queries of a set, if there are more."""

MATRIX = 10
"""Groups with a row and a column of a matrix, those that occur most; the rest share one."""


class Place(NamedTuple):
    """A group in a ranking; its bar and its error are parts of the width from the lowest to
    the highest end of a value or an error, 0 among them."""

    rank: int
    name: str
    value: float
    images: int
    own: bool
    left: float
    width: float
    error: float
    """NaN if there is none."""
    whisker: tuple[float, float] | None
    """The beginning and the length of the error."""
    above: bool
    """True if it stands out."""


def groupings(
    train: Dataset,
    sets: Mapping[str, Dataset],
    scores: Mapping[str, Mapping[str, Scores]],
    count: int,
    standing: Mapping[str, Mapping[str, Standing]],
    recipe: Recipe | None = None,
) -> list[dict]:
    """Returns a view of every column of groups: its rankings for each set of queries.

    The scores are {set: {method: scores}}, and so is what stands out; the first `count`
    queries have a ranking.
    """
    return [
        {
            "column": column,
            "total": len(np.unique(train.groups[column])),
            "sets": {
                name: _of_set(column, train, sets[name], of_set, count, standing[name])
                | {"uncertainty": _uncertainty(column, train, of_set, recipe)}
                for name, of_set in scores.items()
            },
        }
        for column in train.groups
    ]


def own_groups(
    column: str, train: Dataset, queries: Dataset
) -> tuple[list[str | None], bool]:
    """Returns the group of each query, None if nobody knows, and if prompts told them.

    The data tell them, or the prompt does: if it is the caption of training images, all
    of one group.
    """
    if column in queries.groups:
        return queries.groups[column].tolist(), False
    if train.captions is None or queries.captions is None:
        return [None] * len(queries.ids), False
    pairs = zip(train.captions.tolist(), train.groups[column].tolist(), strict=True)
    of_caption = {
        caption: {group for _, group in members}
        for caption, members in grouped(pairs, lambda pair: pair[0]).items()
    }
    groups = [of_caption.get(prompt, ()) for prompt in queries.captions.tolist()]
    return [min(names) if len(names) == 1 else None for names in groups], True


def _of_set(
    column: str,
    train: Dataset,
    queries: Dataset,
    scores: Mapping[str, Scores],
    count: int,
    standing: Mapping[str, Standing],
) -> dict:
    """Returns the queries' groups, and what each method says of the training images'."""
    own, by_prompt = own_groups(column, train, queries)
    of_train = set(train.groups[column].tolist())
    return {
        "own": own,
        "by_prompt": by_prompt,
        "known": sum(name in of_train for name in own),
        "foreign": sum(name is not None and name not in of_train for name in own),
        "methods": {
            method: _of_method(
                *(s.group(train.groups[column]), own, count),
                standing[method].groups.get(column),
            )
            for method, s in scores.items()
        },
    }


def _uncertainty(
    column: str, train: Dataset, scores: Mapping[str, Scores], recipe: Recipe | None
) -> dict[str, str]:
    """Returns what the errors of each method's groups are, or why there are none."""
    names = train.groups[column]
    return {
        method: group_uncertainty(s, s.group(names), recipe)
        for method, s in scores.items()
    }


def _of_method(
    groups: Groups, own: Sequence[str | None], count: int, above: np.ndarray | None
) -> dict:
    """Returns the rankings of the groups, and how often each is first for whose queries."""
    names, sums, errors, sizes, _ = groups
    mean, none = groups.overall(), np.full(len(names), np.nan)
    first = names[sums.argmax(axis=1)].tolist()
    standing = np.zeros(sums.shape, bool) if above is None else above
    return {
        "queries": [
            ranking(names, row, error, sizes, LISTED, name, stands)
            for row, error, name, stands in zip(
                *(sums[:count], errors, own, standing), strict=False
            )
        ],
        "above": None if above is None else int(above.any(axis=1).sum()),
        "short": ranking(names, mean, none, sizes, LISTED_IN_SHORT),
        "all": ranking(names, mean, none, sizes, LISTED_FOR_ALL),
        "first": Counter(first),
        "matrix": matrix(own, first),
        "right": right(own, first, names.tolist()),
    }


def ranking(
    names: np.ndarray,
    values: np.ndarray,
    errors: np.ndarray,
    sizes: np.ndarray,
    listed: int,
    own: str | None = None,
    above: Sequence[bool] | None = None,
) -> dict:
    """Returns the groups from the highest value to the lowest, and where 0 is.

    Of more than `listed` groups only the first, the last two and the own one are there.
    """
    reach = np.nan_to_num(errors)
    low = min(0.0, (values - reach).min())
    span = (max(0.0, (values + reach).max()) - low) or 1.0
    order = np.argsort(-values, kind="stable")
    places = [
        Place(
            *(rank, str(names[i]), float(values[i]), int(sizes[i]), names[i] == own),
            *((min(values[i], 0) - low) / span, abs(values[i]) / span, errors[i]),
            None
            if np.isnan(errors[i])
            else ((values[i] - errors[i] - low) / span, 2 * errors[i] / span),
            above is not None and bool(above[i]),
        )
        for rank, i in enumerate(order, 1)
    ]
    total = len(places)
    if total > listed:
        ends = (*range(1, listed - 1), total - 1, total)
        places = [place for place in places if place.rank in ends or place.own]
    best = [place.name for place in places if place.above]
    return {"places": places, "total": total, "zero": -low / span, "above": best}


def matrix(own: Sequence[str | None], first: Sequence[str]) -> dict | None:
    """Returns how often each group is first for the queries of each; None if no query
    has a group.

    A row is (group of the queries, cells), and a cell (count, share of the row, whether
    it is right); a group None stands for all that have no row or column.
    """
    pairs = [pair for pair in zip(own, first, strict=True) if pair[0] is not None]
    if not pairs:
        return None
    frequent = Counter(name for pair in pairs for name in pair).most_common(MATRIX)
    order = {name: place for place, name in enumerate(sorted(dict(frequent)))}

    def label(name: str) -> str | None:
        return name if name in order else None

    counts = Counter((label(a), label(b)) for a, b in pairs)
    totals = Counter(label(a) for a, _ in pairs)
    rows, columns = (
        sorted(found, key=lambda name: order.get(name, len(order)))
        for found in (totals, {label(name) for pair in pairs for name in pair})
    )

    def cell(row: str | None, column: str | None) -> tuple[int, float, bool]:
        count = counts[row, column]
        return count, count / totals[row], row is not None and row == column

    cells = [(row, [cell(row, column) for column in columns]) for row in rows]
    return {"columns": columns, "rows": cells}


def right(
    own: Sequence[str | None], first: Sequence[str], names: Sequence[str]
) -> dict | None:
    """Returns how often the first group is the query's own, among the known ones.

    "chance" is the share that a group named at random gets, and "shuffled" the one that
    the same first groups get in a random order, sum_g own_g first_g / q^2, which naming
    one group for every query does not beat. None if no query has a group
    of training images.
    """
    pairs = [pair for pair in zip(own, first, strict=True) if pair[0] in names]
    if not pairs:
        return None
    hits = sum(a == b for a, b in pairs)
    of_own, of_first = (Counter(side) for side in zip(*pairs, strict=True))
    shuffled = sum(of_own[name] * of_first[name] for name in of_own)
    return {
        "queries": len(pairs),
        "hits": hits,
        "share": hits / len(pairs),
        "chance": 1 / len(names),
        "shuffled": shuffled / len(pairs) ** 2,
    }
