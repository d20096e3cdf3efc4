"""The scores of groups of training images, such as all of one contributor."""

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import NamedTuple

import numpy as np

from dtrak_jax.checks import instance
from dtrak_jax.digests import digest


def group_scores(
    scores: np.ndarray, column: Sequence[str] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the names of all groups, sorted [G], and their scores, float64 [q, G].

    Influence is additive, so that a group's score is the sum of its images' scores: the
    more images a group has, the larger its score may be.

    Args:
      scores: [q, n], of n training images for q queries.
      column: [n], the name of each training image's group.

    Raises:
      ValueError: the column has not one name for each training image.
    """
    scores, column = np.asarray(scores), np.asarray(column)
    if scores.ndim != 2 or column.shape != scores.shape[1:] or not column.size:
        raise ValueError(
            f"column has shape {column.shape} and scores {scores.shape}; they must be "
            "[n] and [q, n], with n of 1 or more."
        )
    names, index, sizes = np.unique(column, return_inverse=True, return_counts=True)
    by_group = scores[:, np.argsort(index, kind="stable")]
    starts = np.cumsum(sizes) - sizes
    return names, np.add.reduceat(by_group, starts, axis=1, dtype=np.float64)


def check_columns(
    columns: Mapping[str, Sequence[str]] | None, n: int
) -> dict[str, np.ndarray]:
    """Returns groupings by name as arrays of n names; see `check_column`."""
    instance("groups", columns, Mapping, NoneType)
    return {
        name: check_column(f"groups: {name!r}", column, n)
        for name, column in (columns or {}).items()
    }


def check_column(what: str, column: Sequence[str] | np.ndarray, n: int) -> np.ndarray:
    """Returns the names of n training examples' groups as strings, or raises a ValueError
    that begins with `what`.

    None, NaN and "" are no names.
    """
    try:
        given = np.asarray(column)
    except ValueError:  # Its items have several lengths.
        given = np.empty((n, 0))
    if given.shape != (n,):
        raise ValueError(
            f"{what} has shape {given.shape}; it must have a name for each of {n} "
            "training examples."
        )
    names = given.astype(str)
    # NumPy writes NaN among strings as "nan".
    missing = np.isin(names, ("", "nan")) | np.equal(given, None)
    if missing.any():
        first = missing.argmax()
        raise ValueError(
            f"{what} has {given[first]!r} at position {first}; every training example "
            'needs a group, such as "unknown".'
        )
    return names


def names_hash(column: Sequence[str] | np.ndarray) -> str:
    """Returns a text that differs where the groups of the training examples differ."""
    return digest(*np.asarray(column, str).tolist())


class Shares(NamedTuple):
    """Shares that add up to one, and what they leave out."""

    shares: np.ndarray
    """float64 [q, G]: the positive part of each score over the sum of all of them; NaN
    for a query without a positive score."""
    left_out: np.ndarray
    """float64 [q]: the size of all negative scores over the same sum; inf without a
    positive score. Where it is 1, as much speaks against as for."""


def shares(scores: np.ndarray) -> Shares:
    """Returns each score's part of all positive ones, of scores [q, G].

      share(q, g) = max(s(q, g), 0) / sum_h max(s(q, h), 0)

    Scores do not add up to anything by themselves: negative ones are left out, and how
    much that is must be said with the shares.
    """
    scores = np.asarray(scores, np.float64)
    positive, negative = np.maximum(scores, 0), np.maximum(-scores, 0).sum(axis=1)
    total = positive.sum(axis=1)
    some = total > 0
    divisor = np.where(some, total, np.nan)
    left_out = np.where(some, negative / divisor, np.inf)
    return Shares(positive / divisor[:, None], left_out)


def overall(scores: np.ndarray) -> np.ndarray:
    """Returns what groups are ranked by over all queries, float64 [G], of scores [q, G].

      v(g) = (1/Q) sum_q s(q, g) / max_h |s(q, h)|

    Scores are comparable within a query only, so that each query counts with the scores
    relative to its largest one, of either sign: v is 1 if for every query the group is the
    first, and no other has a negative score of more than its size. Queries whose scores
    are all 0 count with 0.

    It has no standard error: queries share their noise, so that one would take every
    draw's sums for all queries, which nobody keeps; the errors of the queries' own sums,
    added up as if they were independent, would be too small.
    """
    scores = np.asarray(scores, np.float64)
    largest = np.abs(scores).max(axis=1, keepdims=True)
    zeros = np.zeros_like(scores)
    return np.divide(scores, largest, out=zeros, where=largest > 0).mean(axis=0)
