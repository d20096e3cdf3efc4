"""Images, which are decoded when they are needed, and what is known of them."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from dtrak_jax.checks import check_ids, check_images
from dtrak_jax.data.corrections import GROUP, corrections, recorded_texts
from dtrak_jax.data.preprocess import Picture
from dtrak_jax.digests import digest, short_digest
from dtrak_jax.progress import progress

RESTORE = "Restore them, or name another --workdir."
"""The remedy where images are not those of the run."""

LOOKED_AT = 100
"""The new pictures that are compared with those that are gone."""

KEPT = 2**30
"""The bytes of pixels up to which those that were decoded for their digests are kept."""


class Decoded(NamedTuple):
    """The pixels of all images of a data set, and what is known once they are decoded."""

    images: np.ndarray | None
    """float32 [n, height, width, channels]; None if they are too many to keep."""
    digests: np.ndarray
    """The hash of each image's pixels, str [n]."""
    changes: Counter
    """The number of images to which something was done, by `Picture.changes`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """n images, which are decoded when `images` is first used, and their columns."""

    ids: np.ndarray
    """str [n], all different; an id stays with its image for good."""
    read: Callable[[int], Picture] = field(repr=False)
    """Decodes the image with that index; a ValueError says why it cannot."""
    labels: np.ndarray | None = None
    """int [n], indices into `label_names`; None if there are no labels."""
    label_names: tuple[str, ...] = ()
    """All names of the source, including those that are not in use."""
    first_labels: np.ndarray | None = field(default=None, repr=False)
    """int [n], the labels that the first stage of a run saw, where they were corrected
    since: they decided its random subsets. None if they are `labels`."""
    captions: np.ndarray | None = None
    """str [n]; None if there are no captions."""
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    """For each column of `DataConfig.groups`, str [n]."""
    seeds: np.ndarray | None = None
    """uint32 [n], of generated images; None if nobody knows them."""
    stamp: Callable[[int], tuple[int, int]] | None = field(default=None, repr=False)
    """Returns the size of an image's file and when it was written; None without files."""
    recorded: np.ndarray | None = field(default=None, repr=False)
    """The `digests` that the images must have, str [n]; None if nobody knows."""
    pool: str = field(default="", repr=False)
    """The hash of all ids that the images were chosen from; "" if none were chosen."""
    notes: tuple[str, ...] = field(default=(), repr=False)
    """Sentences on how the source was read, where that may not be expected."""

    @classmethod
    def of(cls, images: np.ndarray, ids: np.ndarray) -> "Dataset":
        """Returns the data set of images that are in memory already."""
        check_ids(ids, len(images))
        if len(images):
            check_images(images)
        return cls(ids=np.asarray(ids, str), read=lambda row: Picture(images[row]))

    def take(self, rows: np.ndarray) -> "Dataset":
        """Returns the data set of the examples with these indices."""
        return replace(
            self,
            ids=self.ids[rows],
            read=lambda index: self.read(rows[index]),
            stamp=self.stamp and (lambda index: self.stamp(rows[index])),
            labels=None if self.labels is None else self.labels[rows],
            first_labels=None if self.first_labels is None else self.first_labels[rows],
            captions=None if self.captions is None else self.captions[rows],
            groups={name: column[rows] for name, column in self.groups.items()},
            seeds=None if self.seeds is None else self.seeds[rows],
            recorded=None if self.recorded is None else self.recorded[rows],
        )

    def __repr__(self) -> str:
        columns = {
            name: getattr(self, name) for name in ("labels", "captions", "seeds")
        }
        present = [name for name, column in columns.items() if column is not None]
        parts = [f"{len(self)} images", *present, *self.groups]
        return f"Dataset({', '.join(parts)})"

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def images(self) -> np.ndarray:
        """The pixels, float32 [n, height, width, channels] in [-1, 1].

        An image that is damaged, or is not the recorded one, is a ValueError.
        """
        decoded = vars(self).get("decoded")
        if decoded is None or decoded.images is None:
            decoded = vars(self)["decoded"] = self._decode(math.inf)
        self._compare(decoded.digests, np.arange(len(self)))
        return decoded.images

    def _compare(self, digests: np.ndarray, rows: np.ndarray) -> None:
        """Raises a ValueError if images have other digests than are recorded."""
        if self.recorded is None:
            return
        changed = rows[digests != self.recorded[rows]]
        if len(changed):
            raise ValueError(
                f"{len(changed)} of {len(self)} images have changed since the "
                f"first stage of this run saw them, such as {self.ids[changed[0]]}. "
                f"{RESTORE}"
            )

    @functools.cached_property
    def decoded(self) -> Decoded:
        """All images, of which no more than `KEPT` bytes are kept, and their digests."""
        return self._decode(KEPT)

    def _decode(self, kept: float) -> Decoded:
        """Decodes every image once; all that cannot be are one ValueError."""
        images, digests, changes, errors = None, [], Counter(), {}
        for index in progress(
            range(len(self)), "reading images", unit="image", delay=2
        ):
            try:
                pixels, changed = self.read(index)
                if not digests:
                    shape = pixels.shape
                    if len(self) * pixels.nbytes <= kept:
                        images = np.empty((len(self), *shape), np.float32)
                if pixels.shape != shape:
                    raise ValueError(
                        f"it has {_size(pixels.shape)} pixels, and the first image "
                        f"{_size(shape)}; name a size to which all are made."
                    )
            except ValueError as error:
                errors[str(self.ids[index])] = error
                continue
            digests.append(short_digest(pixels.tobytes(), 8))
            changes.update(changed)
            if images is not None:
                images[index] = pixels
        if errors:
            (name, error), *others = errors.items()
            message = f"The image {name}: {str(error).rstrip('.')}."
            if others:
                names = ", ".join(other for other, _ in others[:4])
                message += f" {len(others)} more cannot be used, such as {names}."
            raise ValueError(message) from error
        if not len(self):
            images = np.zeros(0, np.float32)
        return Decoded(images, np.array(digests, str), changes)

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """The hash of each image's pixels, str [n]; decodes them if none are recorded."""
        return self.decoded.digests if self.recorded is None else self.recorded

    @functools.cached_property
    def stamps(self) -> np.ndarray:
        """The `stamp` of every image, int64 [n, 2]; [0, 2] without files."""
        files = range(len(self)) if self.stamp else ()
        return np.array([self.stamp(i) for i in files], np.int64).reshape(-1, 2)

    @functools.cached_property
    def digest(self) -> str:
        """The hash of all ids and pixels in their order."""
        return digest(*map(str, self.ids), *map(str, self.digests))

    @property
    def groupings(self) -> dict[str, np.ndarray]:
        """The name of each image's group, str [n], by grouping: "label", if there are
        labels, and the columns of `groups`."""
        if self.labels is None:
            return self.groups
        return {"label": np.array(self.label_names, str)[self.labels]} | self.groups

    @property
    def texts(self) -> dict[str, np.ndarray]:
        """All that is said of the images, str [n]: `groupings`, and "caption"."""
        captions = {} if self.captions is None else {"caption": self.captions}
        return captions | self.groupings

    @property
    def strata(self) -> np.ndarray | None:
        """The labels of which each random subset has its share, int [n]: those that the
        first stage saw. None if there are none."""
        return self.labels if self.first_labels is None else self.first_labels

    def columns(self) -> dict[str, np.ndarray]:
        """Returns what splits.npz has beside digests and stamps, by its names there."""
        columns = {"ids": self.ids, "labels": self.labels, "captions": self.captions}
        columns["first_labels"] = self.first_labels
        columns |= {f"{GROUP}{name}": column for name, column in self.groups.items()}
        return {name: c for name, c in columns.items() if c is not None}

    def recorded_in(
        self, saved: dict[str, np.ndarray], role: str, deciding: Collection[str] = ()
    ) -> "Dataset":
        """Returns the data set that refuses other pixels than those that were recorded.

        `saved` has the `columns` and the `digests` that an earlier stage saw, with
        "train_" or "validation_" before their names. Other ids are a ValueError, and so
        are other `texts` of the `deciding` columns, which the model is given, and other
        pixels: here where the stamp is another too, which costs decoding these images,
        and otherwise in `images`. All other texts are taken as they are now; `strata`
        stay.
        """
        ids = saved.get(f"{role}_ids", self.ids)
        if not np.array_equal(ids, self.ids):
            changed = set(ids.tolist()) ^ set(self.ids.tolist())
            such_as = f", such as {min(changed)}," if changed else ""
            renamed = self._renamed(ids, saved.get(f"{role}_digests"))
            shares = (
                "" if self.labels is None else " (every label has its share of them)"
            )
            raise ValueError(
                f"the {role} images have other ids than the first stage of this run saw"
                f"{such_as} or their order has changed{shares}{renamed}. {RESTORE}"
            )
        before = recorded_texts(saved, role)
        for name in deciding:
            if name in before and name not in self.texts:
                raise ValueError(
                    f"the {role} images have no {name} any more. {RESTORE}"
                )
        for column, rows, example in corrections(self.ids, before, self.texts):
            if column in deciding:
                raise ValueError(
                    f"{example}: {len(rows)} of {len(self)} {role} images have another "
                    f"{column} than the first stage of this run saw, and the model is "
                    f"given it. {RESTORE}"
                )
        kept = self.stratified_as(saved, role)
        recorded = replace(kept, recorded=saved.get(f"{role}_digests"))
        if "decoded" in vars(self):
            vars(recorded)["decoded"] = self.decoded
        stamps = saved.get(f"{role}_stamps", self.stamps)
        if stamps.shape == self.stamps.shape:
            rows = np.flatnonzero((stamps != self.stamps).any(axis=1))
            if len(rows) and recorded.recorded is not None:
                recorded._compare(self.take(rows).decoded.digests, rows)
        return recorded

    def _renamed(self, ids: np.ndarray, digests: np.ndarray | None) -> str:
        """Returns words on the first picture that was recorded with another id, if a look at
        the first `LOOKED_AT` new ones finds it; "" if not."""
        if digests is None:
            return ""
        gone = ~np.isin(ids, self.ids)
        before = dict(zip(digests[gone].tolist(), ids[gone].tolist(), strict=True))
        new = self.take(np.flatnonzero(~np.isin(self.ids, ids))[:LOOKED_AT])
        try:
            now = dict(zip(new.decoded.digests.tolist(), new.ids.tolist(), strict=True))
        except ValueError:  # They say so when they are needed.
            return ""
        for picture in before.keys() & now.keys():
            return (
                f"; {now[picture]} is the same picture as {before[picture]} was, under "
                "another id, which noise and subsets follow"
            )
        return ""

    def stratified_as(self, saved: dict[str, np.ndarray], role: str) -> "Dataset":
        """Returns the data set with the `strata` that were recorded of these ids."""
        if not np.array_equal(saved.get(f"{role}_ids"), self.ids):
            return self
        none = np.zeros(len(self), int)
        first = saved.get(f"{role}_first_labels", saved.get(f"{role}_labels", none))
        same = np.array_equal(first, none if self.labels is None else self.labels)
        return replace(self, first_labels=None if same else first)

    def named_as(self, names: tuple[str, ...]) -> "Dataset":
        """Returns the data set with labels that are indices into `names`, then its own."""
        if self.labels is None:
            return self
        names = (*names, *(n for n in self.label_names if n not in names))
        index = np.array([names.index(name) for name in self.label_names], int)
        return replace(self, labels=index[self.labels], label_names=names)


def _size(shape: tuple[int, ...]) -> str:
    """Returns "WIDTHxHEIGHT" of an array of pixels."""
    return f"{shape[1]}x{shape[0]}"
