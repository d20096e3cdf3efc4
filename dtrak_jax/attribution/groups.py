"""The scores of groups of training images, such as all of one contributor."""

from collections.abc import Mapping, Sequence

import numpy as np


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
    """Returns groupings by name as arrays of n names, or raises a ValueError."""
    arrays = {name: np.asarray(column, str) for name, column in (columns or {}).items()}
    for name, column in arrays.items():
        if column.shape != (n,):
            raise ValueError(
                f"groups: {name!r} has shape {column.shape}; it must name a group for "
                f"each of the {n} training examples."
            )
    return arrays
