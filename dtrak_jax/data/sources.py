"""The sources of images, and the choice of those for training and for validation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.folder import folder, pictures
from dtrak_jax.data.preprocess import preprocess
from dtrak_jax.data.splits import choose


def digits(config: DataConfig, split: str, prepare: Callable) -> Dataset:
    """Opens scikit-learn's 1,797 grey digits of 8x8 pixels, which have no splits.

    Pixels are x / 8 - 1, where x is scikit-learn's integer from 0 to 16.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = data.images.astype(np.float32) / 8 - 1
    return Dataset(
        ids=np.array([f"digit-{index:04d}" for index in range(len(pixels))]),
        read=lambda index: prepare(Image.fromarray(pixels[index])),
        labels=data.target.astype(int),
        label_names=tuple(map(str, data.target_names)),
    )


def tfds(config: DataConfig, split: str, prepare: Callable) -> Dataset:
    """Opens a split of tensorflow-datasets, which is slow to import; see `prepared`."""
    from dtrak_jax.data.prepared import prepared

    return prepared(config, split, prepare)


SOURCES = {"digits": digits, "tfds": tfds, "folder": folder}
"""For each `DataConfig.source`, the function (config, split, prepare) that opens it.

It returns all examples of a split; `prepare` makes the array of a Pillow image.
"""


@dataclass(frozen=True, eq=False)
class Splits:
    """The training images and the validation images, which are disjoint by id."""

    train: Dataset
    validation: Dataset


def load(config: DataConfig, size: int, channels: int) -> Splits:
    """Chooses the images that a configuration asks for; none is decoded yet.

    Both choices are functions of `config.seed`, ids and labels, and give every label
    its share (`choose`). Validation images come from `config.validation_split` where
    the source is tfds, and from the same examples as training images otherwise; an
    example whose id a training image has is never one. Images are ordered as in their
    source and never mirrored: mirroring belongs to training.

    Raises:
      ValueError: a source, split, label, group or file is missing or wrong, or there
        are too few examples.
    """

    def prepare(image: Image.Image) -> np.ndarray:
        return preprocess(image, size, channels, config.center_crop)

    open_split = functools.partial(SOURCES[config.source], config, prepare=prepare)
    source = validation_source = open_split(config.train_split)
    train = _choose(config, "train", source, _labelled(source, config.labels))
    split = config.validation_split
    if config.source == "tfds" and config.validation and split != config.train_split:
        validation_source = open_split(split)
    pool = _labelled(validation_source, config.labels)
    pool = pool[~np.isin(validation_source.ids[pool], train.ids)]
    return Splits(train, _choose(config, "validation", validation_source, pool))


def load_queries(path: str, size: int, channels: int, csv: str = "") -> Dataset:
    """Opens a folder of PNG and JPEG pictures as queries; none is decoded yet.

    Pictures are cut and resized to `size` as in `preprocess`; ids are paths relative to
    the folder, and pictures are ordered by them. The CSV in the folder, if it is named,
    lists the pictures, with labels or captions.

    Raises:
      ValueError: the folder, the CSV or a file is missing or wrong.
    """
    prepare = functools.partial(preprocess, size=size, channels=channels)
    return pictures(path, prepare, csv, setting="queries.folder")


def _labelled(source: Dataset, names: tuple[str, ...]) -> np.ndarray:
    """Returns the indices of the examples that have one of these labels.

    Without names these are all examples. A number is the index of a label, unless
    labels are named by numbers themselves.
    """
    if not names:
        return np.arange(len(source))
    if source.labels is None:
        raise ValueError(f"data.labels is {names}, but these images have no labels.")
    numbers = {name: number for number, name in enumerate(source.label_names)}
    allowed = ", ".join(numbers)
    if not any(map(str.isdecimal, numbers)):
        allowed += f"; or a number from 0 to {len(numbers) - 1}"
        numbers |= {str(number): number for number in range(len(numbers))}
    for name in names:
        if name not in numbers:
            raise ValueError(f"data.labels has {name!r}; it must be one of: {allowed}.")
    chosen = [numbers[name] for name in names]
    return np.flatnonzero(np.isin(source.labels, chosen))


def _choose(
    config: DataConfig, role: str, source: Dataset, pool: np.ndarray
) -> Dataset:
    """Returns the examples out of `pool` that are to have a role."""
    count = getattr(config, role)
    if count > len(pool):
        labels = f" with data.labels={config.labels}" if config.labels else ""
        apart = " that are not training images" if role == "validation" else ""
        raise ValueError(
            f"data.{role} is {count}, but there are only {len(pool)} examples"
            f"{labels}{apart}."
        )
    labels = None if source.labels is None else source.labels[pool]
    return source.take(pool[choose(source.ids[pool], labels, count, config.seed, role)])
