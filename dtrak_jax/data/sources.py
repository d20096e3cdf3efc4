"""The sources of images."""

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dtrak_jax.checks import at_least, instance, items, one_of
from dtrak_jax.data.artbench import CAPTION, artbench
from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.folder import COLUMNS, GENERATED, pictures
from dtrak_jax.data.hands import hands
from dtrak_jax.data.preprocess import Picture, check_colour, from_pixels, preprocess
from dtrak_jax.data.remarks import remarks

FIELD = re.compile(r"{([^{}]*)}")
"""A field of a caption's template."""


def open_source(config: DataConfig, split: str, size: int, channels: int) -> Dataset:
    """Returns all examples of a split; only tfds and artbench have splits.

    Captions are by `config.caption`, if it is set.
    """
    prepare = preparation(config, size, channels)
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


def preparation(
    config: DataConfig, size: int, channels: int
) -> Callable[[Image.Image], Picture]:
    """Returns what makes a picture of a source what the network sees."""
    return functools.partial(
        preprocess,
        size=size,
        channels=channels,
        center_crop=config.center_crop,
        background=config.background,
    )


def open_validation(config: DataConfig, size: int, channels: int) -> Dataset:
    """Returns the pictures of `config.validation_folder`.

    If the training images have a CSV, there may be one of the same name.
    """
    folder = Path(config.validation_folder).expanduser()
    validation = pictures(
        folder,
        preparation(config, size, channels),
        config.csv if (folder / config.csv).is_file() else "",
        config.groups,
        setting="data.validation_folder",
        needs_groups=False,
    )
    return captioned(validation, config.caption) if config.caption else validation


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


def digits(prepare: Callable[[Image.Image], Picture]) -> Dataset:
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
    path: str,
    size: int,
    channels: int,
    csv: str = "",
    groups: Sequence[str] = (),
    background: str = "white",
) -> Dataset:
    """Returns the pictures of a folder as queries, see `pictures`."""
    queries = pictures(
        path,
        functools.partial(
            preprocess, size=size, channels=channels, background=background
        ),
        csv,
        groups,
        setting="queries.folder",
        optional=GENERATED,
        needs_groups=False,
    )
    if queries.seeds is None:
        return queries
    note = f"{csv}: `seed` is not used, as queries that are given are not made again."
    return replace(queries, notes=(*queries.notes, note))


def samples(saved: Mapping[str, np.ndarray]) -> Dataset:
    """Returns the generated images of samples.npz, from their 8-bit pixels."""
    images = Dataset.of(from_pixels(saved["images"]), saved["ids"])
    columns = {"captions": saved.get("prompts")}
    if "labels" in saved:
        names, columns["labels"] = np.unique(saved["labels"], return_inverse=True)
        columns["label_names"] = tuple(map(str, names))
    return replace(images, **columns)


def load_images(
    folder: str | os.PathLike,
    size: int | None = None,
    *,
    channels: int = 3,
    csv: str = "",
    groups: Sequence[str] = (),
    center_crop: int = 0,
    background: str = "white",
) -> Dataset:
    """Returns the pictures below a folder, decoded, for use from Python.

    `images` is float32 [n, height, width, channels] in [-1, 1]; `ids` are relative
    paths. A warning says what was changed: transparency laid on the background, sizes,
    colours, and pictures that are the same.

    Args:
      size: the height and width to which pictures are resized and cut (`preprocess`);
        None keeps their own, which must be the same for all.
      channels: 1 (grey) or 3 (RGB).
      csv: a CSV in the folder with the column `file` and perhaps `label`, `caption` or
        `prompt`, and `seed`. Without it, names of subfolders are labels.
      groups: further columns of the CSV.
      center_crop: the square to cut from the centre before resizing; 0 cuts nothing.
      background: the colour that is seen through transparency, such as "#ffffff".

    Raises:
      ValueError: the folder, CSV or a picture is missing or wrong.
    """
    check_colour("background", background)
    one_of("channels", channels, (1, 3))
    at_least("center_crop", center_crop, 0)
    if size is not None:
        at_least("size", size, 1)
    instance("csv", csv, str)
    for name in items("groups", groups):
        instance("an entry of groups", name, str)
    if len(groups) and not csv:
        raise ValueError(f"groups is {groups}, but csv is empty; name the CSV.")
    prepare = functools.partial(
        preprocess,
        size=size,
        channels=channels,
        center_crop=center_crop,
        background=background,
    )
    columns = {"optional": GENERATED if csv else COLUMNS, "setting": "folder"}
    images = pictures(folder, prepare, csv, groups, **columns)
    images.images  # noqa: B018
    for text in (*remarks({"pictures": images}), *_numbered(images.label_names)):
        warnings.warn(text, stacklevel=2)
    return images


def _numbered(names: Sequence[str]) -> Iterator[str]:
    """Yields a sentence on labels that are numbers, but not those of their positions."""
    if not all(map(str.isdecimal, names)):
        return
    differing = [(i, name) for i, name in enumerate(names) if int(name) != i]
    if differing:
        position, name = differing[0]
        yield (
            f"labels are positions in label_names, such as {position} for {name!r}; "
            "where a network is given the numbers themselves, pass "
            "np.array(label_names, int)[labels]."
        )
