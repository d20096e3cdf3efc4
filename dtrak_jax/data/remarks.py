"""Sentences on pictures that their owner may not expect, for a warning."""

import unicodedata
from collections.abc import Mapping

import numpy as np

from dtrak_jax.data.dataset import Dataset

NAMES = {
    "train": "training images",
    "validation": "validation images",
    "generated": "queries",
}
"""The words for sets of images."""


def remarks(sets: Mapping[str, Dataset], uses_captions: bool = True) -> list[str]:
    """Returns sentences on how images were read and changed, and which are the same.

    Decodes images of which nobody knows digests or changes. The other sets are compared
    with "train", if it is there.
    """
    train = sets.get("train")
    sets = {NAMES.get(name, name): images for name, images in sets.items()}
    lines = [note for images in sets.values() for note in images.notes]
    lines += [_changes(name, images) for name, images in sets.items()]
    for name, images in sets.items():
        lines.append(_repeated(name, images))
        if train is not None and images is not train:
            lines.append(_trained_on(name, images, train))
        else:
            lines += remarks_on_groups(images)
    captioned = [n for n, s in sets.items() if s.captions is not None and len(s)]
    if captioned and not uses_captions:
        lines.append(
            f"Captions of {' and '.join(captioned)} are not used: the network takes none."
        )
    return [line for line in dict.fromkeys(lines) if line]


def _changes(name: str, images: Dataset) -> str:
    """Returns the count of images to which something was done."""
    counts = images.decoded.changes.most_common()
    listed = ", ".join(f"{count} {change}" for change, count in counts)
    if len(images) == 1:
        name = "query" if name == "queries" else name.removesuffix("s")
    return f"{len(images)} {name}: {listed}." if counts else ""


def _repeated(name: str, images: Dataset) -> str:
    """Returns the count of images that are there before in other files."""
    _, first, index = np.unique(images.digests, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[index] != np.arange(len(images)))
    if not len(again):
        return ""
    copy, original = images.ids[again[0]], images.ids[first[index[again[0]]]]
    return (
        f"The same picture as another one, pixel for pixel: {len(again)} of "
        f"{len(images)} {name}, such as {copy} ({original})."
    )


def remarks_on_groups(images: Dataset) -> list[str]:
    """Returns sentences on columns of groups that rank nothing, or nothing but images, and
    on names that look alike."""
    alike = (look_alikes(column, names) for column, names in images.groupings.items())
    lines = [line for line in alike if line]
    for column, names in images.groups.items():
        count = len(np.unique(names))
        if count == 1:
            lines.append(
                f"All {len(images)} images have the same `{column}`, {str(names[0])!r}: there "
                "is no group to compare it with."
            )
        elif count == len(images):
            lines.append(
                f"Each of the {count} images has a `{column}` of its own: the ranking of "
                "groups is that of images."
            )
    return lines


def look_alikes(column: str, names: np.ndarray) -> str:
    """Returns a sentence on names of groups that a reader may take for one another; "".

    They differ in case, in how Unicode composes a letter, in width, in spaces, or in
    characters that nobody sees.
    """
    alike: dict[str, list[str]] = {}
    for name in np.unique(names).tolist():
        seen = (c for c in name if unicodedata.category(c) not in ("Cc", "Cf"))
        folded = unicodedata.normalize("NFKC", "".join(seen)).casefold()
        key = " ".join(unicodedata.normalize("NFKC", folded).split())
        alike.setdefault(key, []).append(name)
    pairs = [names for names in alike.values() if len(names) > 1]
    if not pairs:
        return ""
    listed = ["; ".join(" and ".join(map(ascii, names)) for names in pairs[:4])]
    listed += [f"{len(pairs) - 4} more"] if len(pairs) > 4 else []
    return (
        f"Names of `{column}` look alike and are different groups: {', '.join(listed)}. "
        "Write them alike if they mean the same."
    )


def trained_on(queries: Dataset, train: Dataset) -> list[list[str]]:
    """Returns the ids of the training images that each query is, pixel for pixel."""
    by_digest: dict[str, list[str]] = {}
    for name, digest in zip(train.ids.tolist(), train.digests.tolist(), strict=True):
        by_digest.setdefault(digest, []).append(name)
    return [by_digest.get(digest, []) for digest in queries.digests.tolist()]


def _trained_on(name: str, queries: Dataset, train: Dataset) -> str:
    """Returns the count of queries that are training images."""
    images = trained_on(queries, train)
    rows = [row for row, ids in enumerate(images) if ids]
    if not rows:
        return ""
    query, image = queries.ids[rows[0]], images[rows[0]][0]
    return (
        f"The same picture as a training image, pixel for pixel: {len(rows)} of "
        f"{len(queries)} {name}, such as {query} ({image}); expect each to rank itself "
        "first."
    )
