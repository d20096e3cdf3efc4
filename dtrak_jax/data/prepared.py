"""Images from tensorflow-datasets, read without TensorFlow."""

import difflib
import io
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from dtrak_jax.checks import one_of
from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.preprocess import decode, to_picture

CAPTIONS = ("caption", "text", "prompt")
"""The names by which a text feature is taken to be the caption, best first."""


def prepared(config: DataConfig, split: str, prepare: Callable) -> Dataset:
    """Opens a split of a data set that tensorflow-datasets has prepared.

    Its files must be array_record; TensorFlow is not needed. The image is the feature
    called "image", or else the only `Image` or `Tensor` [h, w, c] of uint8; the label
    is the `ClassLabel` called "label", or else the only one; the caption is a `Text`
    with a name in `CAPTIONS`; groups are features of the type `Text` or `ClassLabel`.
    An id is the record's own `Text` called "id", or else "train-000012", the split and
    the position in it.

    Raises:
      ValueError: the data set, split or a feature is missing, or of another type.
    """
    builder = _builder(config.name)
    features = builder.info.features
    texts = {key for key in features if isinstance(features[key], tfds.features.Text)}
    classes = [
        key for key in features if isinstance(features[key], tfds.features.ClassLabel)
    ]
    label = "label" if "label" in classes else None
    if len(classes) == 1:
        (label,) = classes
    caption = next((name for name in CAPTIONS if name in texts), None)
    for name in config.groups:
        one_of("data.groups", name, sorted([*texts, *classes]))

    image = _image(config.name, features)
    ids, records = _open(builder, split, image)
    used = {"id", label, caption, *config.groups} & {*texts, *classes}
    columns = {key: [] for key in used}
    positions = range(len(ids) if used else 0)
    description = f"labels of {config.name} {split}"
    for index in tqdm(positions, description, disable=None, delay=2):
        record = records[index]
        for key in used:
            value = record[key]
            columns[key].append(value.decode() if key in texts else int(value))
    ids = columns["id"] if "id" in texts else ids

    def group(name: str) -> np.ndarray:
        column = columns[name]
        if name not in texts:
            names = [*features[name].names, ""]  # The label -1 stands for none.
            column = [names[number] for number in column]
        if "" in column:
            raise ValueError(
                f"data.groups has {name!r}, which is empty for {ids[column.index('')]}."
            )
        return np.array(column, str)

    def read(index: int) -> np.ndarray:
        content = records[index][image]
        encoded = isinstance(content, bytes)
        return prepare(decode(io.BytesIO(content)) if encoded else to_picture(content))

    return Dataset(
        ids=np.array(ids, str),
        read=read,
        labels=np.array(columns[label], int) if label else None,
        label_names=tuple(features[label].names) if label else (),
        captions=np.array(columns[caption], str) if caption else None,
        groups={name: group(name) for name in config.groups},
    )


def _builder(name: str) -> tfds.core.DatasetBuilder:
    """Returns the tfds builder of a prepared data set."""
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, names)
        raise ValueError(
            f"data.name is {name!r}, which tensorflow-datasets does not know"
            + (f"; did you mean {' or '.join(close)}?" if close else ".")
        ) from error
    except (ValueError, AssertionError) as error:
        raise ValueError(f"data.name is {name!r}: {error}") from error
    if not builder.data_path.exists():
        raise ValueError(
            f"{name} is not prepared in {builder.data_path}. {_how_to_prepare(name)}"
        )
    return builder


def _how_to_prepare(name: str) -> str:
    """Returns the instructions for preparing a data set, which is done once."""
    return (
        "Prepare it once, on any machine with TensorFlow: pip install tensorflow-cpu "
        f"&& tfds build {name} --file_format=array_record (with --data_dir=DIR, and "
        "TFDS_DATA_DIR=DIR afterwards, to have it elsewhere)."
    )


def _image(name: str, features) -> str:
    """Returns the name of the feature that is the image."""
    kinds = tfds.features.Image, tfds.features.Tensor
    images = [
        key
        for key in (["image"] if "image" in features else features)
        if isinstance(features[key], kinds)
        and features[key].np_dtype == np.uint8
        and len(features[key].shape) == 3
        and features[key].shape[-1] in (1, 3, 4)
    ]
    if len(images) != 1:
        raise ValueError(
            f"{name} has no single feature that is an image of 1, 3 or 4 channels of "
            f"8 bits; it has {', '.join(sorted(features))}."
        )
    return images[0]


def _open(builder: tfds.core.DatasetBuilder, split: str, image: str):
    """Returns the positions in a split or slice, as "train-000012", and the records.

    Images in the records are as they are stored.
    """
    splits = builder.info.splits
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{builder.name} cannot be read: {error}") from error
    positions = [
        f"{part.splitname}-{position:06d}"
        for part in parts
        for position in range(splits[part.splitname].num_examples)[part.from_ : part.to]
    ]
    # Tensors are stored plain, and skipping their decoding would lose their shape.
    encoded = isinstance(builder.info.features[image], tfds.features.Image)
    decoders = {image: tfds.decode.SkipDecoding()} if encoded else None
    try:
        return positions, builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} is prepared in {builder.data_path} as "
            f"{builder.info.file_format.value}, which cannot be read without "
            f"TensorFlow. {_how_to_prepare(builder.name)}"
        ) from error
