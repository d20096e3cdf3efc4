"""The mean of the scores of several models."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.checks import instance, items

COMPARED = {
    "method": "method",
    "damping": "damping",
    "train_ids": "training images",
    "query_ids": "queries",
}
"""The fields that all models' scores have in common, and the words for them."""


def ensemble_mean(scores: Sequence[Scores]) -> Scores:
    """Returns the mean of the scores of S models, (1/S) sum_s tau_s(q, n) [q, n].

    Park et al., "TRAK" (arXiv 2303.14186) average over models trained on different
    subsets, each with its own features and kernel; so do the D-TRAK paper's ensembles.
    The mean has their damping, of which each model has its own lambda, and no kernel.
    `spread` is the standard deviation sqrt(sum_s (tau_s - mean)^2 / (S - 1)). `errors`
    are the mean of the models' errors, the largest that the mean's can be, since models
    may share their noise; so are those of every grouping that all models were scored
    with. Groups and copies are the first model's; a warning names those that differ.

    Raises:
      ValueError: there are no scores, or not of one method and damping for the same
        queries and training examples, in the same order.
      TypeError: an entry is something else.
    """
    scores = items("scores", scores)
    for member in scores:
        instance("an entry of scores", member, Scores)
    if not scores:
        raise ValueError("scores is empty; an ensemble needs those of a model or more.")
    first = scores[0]
    for index, member in enumerate(scores):
        for name, what in COMPARED.items():
            pair = getattr(member, name), getattr(first, name)
            if not np.array_equal(*pair):
                values = " and ".join(getattr(v, "words", repr(v)) for v in pair)
                raise ValueError(
                    f"scores[{index}] and scores[0] differ in {what}"
                    f"{'' if name.endswith('ids') else f' ({values})'}; an ensemble needs "
                    "scores of one method and damping for the same queries and training "
                    "examples, in the same order."
                )
    _warn_of_groups(scores)
    arrays = [member.scores.astype(np.float64) for member in scores]
    mean = sum(arrays) / len(arrays)
    spread = None
    if len(arrays) > 1:
        squares = sum((array - mean) ** 2 for array in arrays)
        spread = np.sqrt(squares / (len(arrays) - 1)).astype(np.float32)
    groupings = set(first.group_errors).intersection(*(m.group_errors for m in scores))
    return dataclasses.replace(
        first,
        scores=mean.astype(np.float32),
        lambdas=None,
        eigenvalues=None,
        made_from="",
        errors=np.mean([member.errors for member in scores], axis=0),
        spread=spread,
        group_errors={
            name: np.mean([member.group_errors[name] for member in scores], axis=0)
            for name in sorted(groupings)
        },
        freedom=min(member.freedom for member in scores),
        group_freedom={
            name: min(member.group_freedom.get(name, 0.0) for member in scores)
            for name in sorted(groupings)
        },
    )


def _warn_of_groups(scores: Sequence[Scores]) -> None:
    """Warns of groupings and copies that are not the same in all scores."""
    by_member = [member.columns | {"copies": member.copies} for member in scores]
    differing = [
        repr(name)
        for name in dict.fromkeys(name for columns in by_member for name in columns)
        if not all(
            np.array_equal(columns.get(name), by_member[0].get(name))
            for columns in by_member
        )
    ]
    if differing:
        warnings.warn(
            f"scores have other groups or copies, {', '.join(differing)}, than scores[0], "
            "whose are taken for the mean.",
            stacklevel=3,
        )
