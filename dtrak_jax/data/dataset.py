"""The images of a run: chosen, read, preprocessed."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from dtrak_jax.config import DataConfig
from dtrak_jax.data.checks import check_ids, check_images
from dtrak_jax.data.folder import folder
from dtrak_jax.data.prepared import prepared
from dtrak_jax.data.preprocess import preprocess
from dtrak_jax.data.sources import Source, digits
from dtrak_jax.data.splits import choose

SOURCES = {"digits": digits, "tfds": prepared, "folder": folder}
"""For each `DataConfig.source`, the function of (config, split) that opens it."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """n images and what is known of them."""

    images: np.ndarray
    """float32 [n, size, size, channels] in [-1, 1]."""
    ids: np.ndarray
    """[n] different strings; `np.savez` keeps them as they are."""
    labels: np.ndarray | None
    """int [n], indices into `label_names`; None if the source has no labels."""
    label_names: tuple[str, ...]
    """All names of the source, including those that are not in use."""
    captions: tuple[str, ...] | None
    """n texts; None if the source has no captions."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Training images, and images for validation, which are disjoint by id."""

    train: Dataset
    validation: Dataset


def load(config: DataConfig, size: int, channels: int) -> Splits:
    """Chooses and reads the images that a configuration asks for.

    Both choices are functions of `config.seed`, ids and labels, and give every label
    its share (`choose`). Validation images come from `config.validation_split` where
    the source is tfds, and from the same examples as training images otherwise; an
    example whose id a training image has is never one. Images are ordered as in their
    source and never mirrored: mirroring belongs to training.

    Args:
      config: the settings.
      size: height and width of the images.
      channels: 1 (grey) or 3 (RGB).

    Returns:
      `config.train` and `config.validation` images; arrays of length 0 where that
      is 0.

    Raises:
      ValueError: a source, split, label, file or image that is missing or wrong, or
        too few examples.
    """
    source = other = SOURCES[config.source](config, config.train_split)
    train = _choose(config, "train", source, _wanted(source, config.labels))
    split = config.validation_split
    if config.source == "tfds" and config.validation and split != config.train_split:
        other = SOURCES[config.source](config, split)
    pool = _wanted(other, config.labels)
    pool = pool[~np.isin(other.ids[pool], source.ids[train])]
    validation = _choose(config, "validation", other, pool)
    return Splits(
        train=_read(config, source, train, size, channels),
        validation=_read(config, other, validation, size, channels),
    )


def _wanted(source: Source, names: tuple[str, ...]) -> np.ndarray:
    """Indices of the examples whose label is one of `names`; of all if it is empty."""
    check_ids(source.ids, len(source.ids))
    if not names:
        return np.arange(len(source.ids))
    known = source.label_names
    if source.labels is None:
        raise ValueError(f"data.labels is {names}, but these images have no labels.")
    numbers = []
    for name in names:
        if name in known:
            numbers.append(known.index(name))
        elif name.isdecimal() and int(name) < len(known):
            numbers.append(int(name))
        else:
            raise ValueError(
                f"data.labels has {name!r}; it must be one of: {', '.join(known)}; or "
                f"a number from 0 to {len(known) - 1}."
            )
    return np.flatnonzero(np.isin(source.labels, numbers))


def _choose(
    config: DataConfig, role: str, source: Source, pool: np.ndarray
) -> np.ndarray:
    """Indices of the examples that are to be `role`, out of those in `pool`."""
    count = getattr(config, role)
    if count > len(pool):
        labels = f" with data.labels={config.labels}" if config.labels else ""
        left = " that are not training images" if role == "validation" else ""
        raise ValueError(
            f"data.{role} is {count}, but there are only {len(pool)} examples"
            f"{labels}{left}."
        )
    labels = None if source.labels is None else source.labels[pool]
    return pool[choose(source.ids[pool], labels, count, config.seed, role)]


def _read(
    config: DataConfig, source: Source, chosen: np.ndarray, size: int, channels: int
) -> Dataset:
    """The chosen examples with their images."""
    images = np.empty((len(chosen), size, size, channels), np.float32)
    progress = tqdm(chosen, "reading images", disable=None, delay=2)
    for slot, index in enumerate(progress):
        image = source.read(index)
        try:
            images[slot] = preprocess(image, size, channels, config.center_crop)
        except ValueError as error:
            raise ValueError(f"The image {source.ids[index]}: {error}") from error
    if len(images):
        check_images(images)
    captions = source.captions
    return Dataset(
        images=images,
        ids=source.ids[chosen],
        labels=None if source.labels is None else source.labels[chosen],
        label_names=source.label_names,
        captions=None if captions is None else tuple(captions[i] for i in chosen),
    )
