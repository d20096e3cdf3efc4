"""The sources of images."""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.folder import pictures
from dtrak_jax.data.preprocess import preprocess


def open_source(config: DataConfig, split: str, size: int, channels: int) -> Dataset:
    """Returns all examples of a split; digits and folders have no splits."""
    prepare = functools.partial(
        preprocess, size=size, channels=channels, center_crop=config.center_crop
    )
    if config.source == "digits":
        return digits(prepare)
    if config.source == "folder":
        return pictures(config.name, prepare, config.csv, config.groups)
    from dtrak_jax.data.prepared import prepared  # It is slow to import.

    return prepared(config.name, split, config.groups, prepare)


def digits(prepare: Callable[[Image.Image], np.ndarray]) -> Dataset:
    """Returns scikit-learn's 1,797 grey digits of 8x8 pixels.

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


def load_queries(path: str, size: int, channels: int, csv: str = "") -> Dataset:
    """Returns the PNG and JPEG files of a folder as queries, see `pictures`."""
    prepare = functools.partial(preprocess, size=size, channels=channels)
    return pictures(path, prepare, csv, setting="queries.folder")
