"""Images from tensorflow-datasets, read without TensorFlow."""

import difflib
import io
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dtrak_jax.checks import one_of
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.preprocess import Picture, decode, to_picture
from dtrak_jax.progress import progress

CAPTIONS = ("caption", "text", "prompt")
"""The names by which a text feature is taken to be the caption, best first."""

PREPARE = (
    "Prepare it once, on any machine with TensorFlow: pip install tensorflow-cpu "
    "&& tfds build {} --file_format=array_record (with --data_dir=DIR, and "
    "TFDS_DATA_DIR=DIR afterwards, to have it elsewhere)."
)


def prepared(
    name: str,
    split: str,
    groups: Sequence[str],
    prepare: Callable[[Image.Image], Picture],
) -> Dataset:
    """Returns a split of a data set that tensorflow-datasets has prepared.

    Its files must be array_record; TensorFlow is not needed. The image is the feature
    called "image", or else the only `Image` or `Tensor` [h, w, c] of uint8; the label
    is the `ClassLabel` called "label", or else the only one; the caption is a `Text`
    with a name in `CAPTIONS`; groups are features of the type `Text` or `ClassLabel`.
    An id is the record's own `Text` called "id", or else "train-000012", the split and
    the position in it.
    """
    builder = _builder(name)
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    classes = [
        key for key in features if isinstance(features[key], tfds.features.ClassLabel)
    ]
    label = classes[0] if len(classes) == 1 else "label"
    label = label if label in classes else None
    caption = next((key for key in CAPTIONS if key in texts), None)
    for key in groups:
        one_of("data.groups", key, sorted([*texts, *classes]))

    image = _image(name, features)
    ids, records = _open(builder, split, image)
    columns = {key: [] for key in {"id", label, caption, *groups} & {*texts, *classes}}
    positions = range(len(ids) if columns else 0)
    for index in progress(
        positions, f"labels of {name} {split}", unit="label", delay=2
    ):
        record = records[index]
        for key, column in columns.items():
            column.append(record[key].decode() if key in texts else int(record[key]))
    ids = columns["id"] if "id" in texts else ids

    def read(index: int) -> Picture:
        content = records[index][image]
        encoded = isinstance(content, bytes)
        return prepare(decode(io.BytesIO(content)) if encoded else to_picture(content))

    def group(key: str) -> np.ndarray:
        column = columns[key]
        if key in classes:
            names = [*features[key].names, ""]  # The label -1 stands for none.
            column = [names[number] for number in column]
        if "" in column:
            raise ValueError(
                f"data.groups has {key!r}, which is empty for {ids[column.index('')]}; "
                "leave it out, or prepare the set with a group for every image."
            )
        return np.array(column, str)

    return Dataset(
        ids=np.array(ids, str),
        read=read,
        labels=np.array(columns[label], int) if label else None,
        label_names=tuple(features[label].names) if label else (),
        captions=np.array(columns[caption], str) if caption else None,
        groups={key: group(key) for key in groups},
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
            f"{name} is not prepared in {builder.data_path}. {PREPARE.format(name)}"
        )
    return builder


def _image(name: str, features: tfds.features.FeaturesDict) -> str:
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


def _open(
    builder: tfds.core.DatasetBuilder, split: str, image: str
) -> tuple[list[str], Sequence[dict]]:
    """Returns the positions in a split or slice, as "train-000012", and the records."""
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
    # Images stay encoded. Tensors are stored plain, and would lose their shape.
    encoded = isinstance(builder.info.features[image], tfds.features.Image)
    decoders = {image: tfds.decode.SkipDecoding()} if encoded else None
    try:
        return positions, builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} is prepared in {builder.data_path} as "
            f"{builder.info.file_format.value}, which cannot be read without "
            f"TensorFlow. {PREPARE.format(builder.name)}"
        ) from error
