"""Corrections: labels, captions and groups of images that are others than were recorded."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

GROUP = "group_"
"""The prefix of a grouping's name in splits.npz."""


class Correction(NamedTuple):
    """A column of texts that other images have now than were recorded."""

    column: str
    """ "label", "caption" or the name of a grouping."""
    rows: np.ndarray
    """The positions of the images whose text is another one."""
    example: str
    """The first of them in words, such as "contributor of 12.png: anna -> berta"."""


def recorded_texts(saved: Mapping[str, np.ndarray], role: str) -> dict[str, np.ndarray]:
    """Returns the names of labels, the captions and the groups of splits.npz, str [n], by
    column; `role` is "train" or "validation"."""
    texts, prefix = {}, f"{role}_"
    if f"{role}_labels" in saved and "label_names" in saved:
        names, labels = saved["label_names"], saved[f"{role}_labels"]
        # Earlier versions had the names of training images alone.
        texts["label"] = np.take(names, labels, mode="clip")
    if f"{role}_captions" in saved:
        texts["caption"] = saved[f"{role}_captions"]
    prefix += GROUP
    groups = {name: saved[name] for name in saved if name.startswith(prefix)}
    return texts | {name.removeprefix(prefix): c for name, c in groups.items()}


def corrections(
    ids: np.ndarray,
    before: Mapping[str, np.ndarray],
    texts: Mapping[str, np.ndarray],
) -> list[Correction]:
    """Returns what differs of the columns that were there before and are there now; labels
    and captions that are not there any more are "none"."""
    gone = (before.keys() - texts.keys()) & {"label", "caption"}
    texts = {**texts, **dict.fromkeys(gone, np.full(len(ids), "none"))}
    changed = []
    for column in texts.keys() & before.keys():
        old, new = before[column], texts[column]
        rows = np.flatnonzero(old != new)
        if len(rows):
            first = rows[0]
            example = f"{column} of {ids[first]}: {old[first]} -> {new[first]}"
            changed.append(Correction(column, rows, example))
    return sorted(changed)
