"""The sources of images."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from dtrak_jax.checks import one_of
from dtrak_jax.data.artbench import CAPTION, artbench
from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.folder import pictures
from dtrak_jax.data.hands import hands
from dtrak_jax.data.preprocess import preprocess

FIELD = re.compile(r"{([^{}]*)}")
"""A field of a caption's template."""


def open_source(config: DataConfig, split: str, size: int, channels: int) -> Dataset:
    """Returns all examples of a split; only tfds and artbench have splits.

    Captions are by `config.caption`, if it is set.
    """
    prepare = functools.partial(
        preprocess, size=size, channels=channels, center_crop=config.center_crop
    )
    template = config.caption
    if config.source == "digits":
        source = digits(prepare)
    elif config.source == "hands":
        source = hands(prepare, config.groups)
    elif config.source == "folder":
        source = pictures(config.name, prepare, config.csv, config.groups)
    elif config.source == "artbench":
        source = artbench(config.name, split, config.groups, prepare)
        template = template or CAPTION
    else:
        from dtrak_jax.data.prepared import prepared  # It is slow to import.

        source = prepared(config.name, split, config.groups, prepare)
    return captioned(source, template) if template else source


def captioned(source: Dataset, template: str) -> Dataset:
    """Returns the examples with captions by a template, see `DataConfig.caption`."""
    columns = dict(source.groups)
    if source.labels is not None:
        columns["label"] = np.array(source.label_names)[source.labels]
    for field in FIELD.findall(template):
        one_of(f"data.caption is {template!r}; a field", field, sorted(columns))

    def caption(row):
        return FIELD.sub(lambda m: columns[m[1]][row].replace("_", " "), template)

    captions = [caption(row) for row in range(len(source))]
    return replace(source, captions=np.array(captions, str))


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


def load_queries(
    path: str, size: int, channels: int, csv: str = "", groups: Sequence[str] = ()
) -> Dataset:
    """Returns the PNG and JPEG files of a folder as queries, see `pictures`."""
    prepare = functools.partial(preprocess, size=size, channels=channels)
    return pictures(path, prepare, csv, groups, is_generated=True)
