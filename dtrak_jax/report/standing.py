"""Standing: which training images and groups are above the floor, and which are not."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dtrak_jax.attribution.groups import group_scores
from dtrak_jax.attribution.null import (
    LEAST_IMAGES,
    LEAST_QUERIES,
    floor,
    group_floor,
)
from dtrak_jax.attribution.scores import Scores

UNTRAINED = "the model has learnt next to nothing"
"""The reason why nothing stands out where the scores are of such a model."""


class Standing(NamedTuple):
    """The images and groups above the floor; None where that cannot be judged."""

    supporting: np.ndarray | None
    """bool [queries, train]."""
    opposing: np.ndarray | None = None
    why: str = ""
    """The reason, if there is no judgement."""
    groups: Mapping[str, np.ndarray | None] = {}
    """bool [queries, groups] for every column, groups in their order."""


def standings(
    scores: Mapping[str, Mapping[str, Scores]],
    columns: Mapping[str, np.ndarray],
    untrained: bool = False,
) -> dict[str, dict[str, Standing]]:
    """Returns what stands out, of {set: {method: scores}}.

    The queries of all other sets count as unrelated ones. Nothing is judged where the
    model is untrained.
    """
    return {
        name: {
            method: Standing(None, why=UNTRAINED)
            if untrained
            else standing(s, _elsewhere(scores, name, method), columns)
            for method, s in of_set.items()
        }
        for name, of_set in scores.items()
    }


def _elsewhere(
    scores: Mapping[str, Mapping[str, Scores]], name: str, method: str
) -> np.ndarray | None:
    """Returns a method's scores for all sets of queries but one."""
    sets = [of[method].scores for n, of in scores.items() if n != name and method in of]
    return np.concatenate(sets) if sets else None


def standing(
    scores: Scores, unrelated: np.ndarray | None, columns: Mapping[str, np.ndarray]
) -> Standing:
    """Returns what stands out, of one method's scores for one set of queries."""
    values = scores.scores
    support = floor(values, unrelated)
    if support is None:
        return Standing(
            None,
            why=f"that takes {LEAST_QUERIES} queries and {LEAST_IMAGES} training images",
        )
    oppose = floor(-values, None if unrelated is None else -unrelated)
    groups = {}
    for column, members in columns.items():
        limit = group_floor(values, members, unrelated)
        groups[column] = (
            None if limit is None else group_scores(values, members)[1] > limit
        )
    return Standing(values > support, -values > oppose, "", groups)
