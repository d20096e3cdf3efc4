"""Standing: which training images and groups are above the floor, and which are not."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
    """bool [queries, train]; of near-duplicates all or none, as one picture. Nothing
    opposes by scores without a sign."""
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
) -> list[Scores]:
    """Returns a method's scores for all sets of queries but one."""
    return [of[method] for n, of in scores.items() if n != name and method in of]


def standing(
    scores: Scores, unrelated: Sequence[Scores], columns: Mapping[str, np.ndarray]
) -> Standing:
    """Returns what stands out, of one method's scores for one set of queries.

    Pictures are judged by their `merged` scores, and so are all their copies.
    """
    pictures = scores.merged()
    values, others = pictures.scores, _rows([s.merged().scores for s in unrelated])
    support = floor(values, others)
    if support is None:
        return Standing(
            None,
            why=f"that takes {LEAST_QUERIES} queries and {LEAST_IMAGES} training images",
        )
    oppose = floor(-values, None if others is None else -others)
    position = {name: i for i, name in enumerate(pictures.train_ids.tolist())}
    picture_of = np.array([position[name] for name in scores.picture_ids.tolist()])
    groups = {}
    for column, members in columns.items():
        elsewhere = _rows([s.counted(members) for s in unrelated])
        limit = group_floor(scores.counted(members), members, elsewhere)
        above = None if limit is None else scores.group(members).scores > limit
        groups[column] = above
    supporting, opposing = values > support, (-values > oppose) & scores.signed
    return Standing(supporting[:, picture_of], opposing[:, picture_of], "", groups)


def _rows(sets: Sequence[np.ndarray]) -> np.ndarray | None:
    """Returns the scores of all sets of queries [r, n]; None if there are none."""
    return np.concatenate(sets) if sets else None
