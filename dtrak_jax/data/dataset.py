"""Images, which are decoded when they are needed, and what is known of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from dtrak_jax.checks import check_ids, check_images
from dtrak_jax.digests import digest, short_digest


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """n images, which are decoded when `images` is first used, and their columns."""

    ids: np.ndarray
    """str [n], all different; an id stays with its image for good."""
    read: Callable[[int], np.ndarray] = field(repr=False)
    """Decodes the image with that index; a ValueError says why it cannot."""
    labels: np.ndarray | None = None
    """int [n], indices into `label_names`; None if there are no labels."""
    label_names: tuple[str, ...] = ()
    """All names of the source, including those that are not in use."""
    captions: np.ndarray | None = None
    """str [n]; None if there are no captions."""
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    """For each column of `DataConfig.groups`, str [n]."""
    seeds: np.ndarray | None = None
    """uint32 [n], of generated images; None if nobody knows them."""
    recorded: np.ndarray | None = field(default=None, repr=False)
    """The `digests` that the images must have, str [n]; None if nobody knows."""

    @classmethod
    def of(cls, images: np.ndarray, ids: np.ndarray) -> "Dataset":
        """Returns the data set of images that are in memory already."""
        check_ids(ids, len(images))
        if len(images):
            check_images(images)
        return cls(ids=np.asarray(ids, str), read=images.__getitem__)

    def take(self, rows: np.ndarray) -> "Dataset":
        """Returns the data set of the examples with these indices."""
        return replace(
            self,
            ids=self.ids[rows],
            read=lambda index: self.read(rows[index]),
            labels=None if self.labels is None else self.labels[rows],
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
        """The pixels, float32 [n, size, size, channels] in [-1, 1].

        An image that is damaged, or is not the recorded one, is a ValueError.
        """
        images = []
        for index in tqdm(range(len(self)), "reading images", disable=None, delay=2):
            try:
                images.append(self.read(index))
            except ValueError as error:
                raise ValueError(f"The image {self.ids[index]}: {error}") from error
        images = np.array(images, np.float32)
        if self.recorded is not None:
            changed = np.flatnonzero(image_digests(images) != self.recorded)
            if len(changed):
                raise ValueError(
                    f"{len(changed)} of {len(images)} images have changed since the "
                    f"first stage of this run saw them, such as {self.ids[changed[0]]}. "
                    "Restore them, or name another --workdir."
                )
        return images

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """The hash of each image's pixels, str [n]; decodes them if none are recorded."""
        return image_digests(self.images) if self.recorded is None else self.recorded

    @functools.cached_property
    def digest(self) -> str:
        """The hash of all ids and pixels in their order."""
        return digest(*map(str, self.ids), *map(str, self.digests))

    def columns(self) -> dict[str, np.ndarray]:
        """Returns what splits.npz has beside digests, by the names that it has there."""
        columns = {"ids": self.ids, "labels": self.labels, "captions": self.captions}
        columns |= {f"group_{name}": column for name, column in self.groups.items()}
        return {name: c for name, c in columns.items() if c is not None}

    def recorded_in(self, saved: dict[str, np.ndarray], role: str) -> "Dataset":
        """Returns the data set that refuses other pixels than those that were recorded.

        `saved` has the `columns` and the `digests` that an earlier stage saw, with
        "train_" or "validation_" before their names. Other ids, labels, captions or
        groups are a ValueError here, and other pixels one in `images`.
        """
        columns = {"labels": np.array([]), "captions": np.array([])} | self.columns()
        for name, column in columns.items():
            recorded = saved.get(f"{role}_{name}", column)
            if not np.array_equal(recorded, column):
                changed = set(recorded.astype(str)) ^ set(column.astype(str))
                such_as = f", such as {min(changed)}," if changed else ""
                raise ValueError(
                    f"the {role} images have other {name} than the first stage of this "
                    f"run saw{such_as} or their order has changed. Restore them, or "
                    "name another --workdir."
                )
        return replace(self, recorded=saved.get(f"{role}_digests"))


def image_digests(images: np.ndarray) -> np.ndarray:
    """Returns the hash of each image's pixels, str [n]."""
    return np.array([short_digest(image.tobytes(), 8) for image in images], str)
