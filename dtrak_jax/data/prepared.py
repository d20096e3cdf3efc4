"""Images from tensorflow-datasets, read without TensorFlow."""

import difflib
import io

import numpy as np
from PIL import Image
from tqdm import tqdm

from dtrak_jax.config import DataConfig
from dtrak_jax.data.sources import Source, decode

CAPTIONS = ("caption", "text", "prompt")
"""Names under which a text feature is taken to be a caption."""


def prepared(config: DataConfig, split: str) -> Source:
    """A split of a data set that tensorflow-datasets has prepared as array_record.

    Read without TensorFlow. The image is the feature called "image", or else the only
    one of its kind: an `Image`, or a `Tensor` [h, w, c] of uint8; the label is the
    `ClassLabel` called "label", or else the only one; the caption is a `Text` with a
    name in `CAPTIONS`. An id is the record's own `Text` called "id", or else
    "train-000012", the split and the position in it.
    """
    import tensorflow_datasets as tfds

    builder = _builder(config.name)
    features = builder.info.features
    image = _image(config.name, features)
    label = _only(features, "label", tfds.features.ClassLabel)
    texts = {key for key in features if isinstance(features[key], tfds.features.Text)}
    caption = next((name for name in CAPTIONS if name in texts), None)
    named = "id" in texts

    ids, labels, captions = _positions(builder, split), [], []
    records = _records(builder, split, image)
    if named or label or caption:
        description = f"labels of {config.name} {split}"
        for index in tqdm(range(len(ids)), description, disable=None, delay=2):
            record = records[index]
            if named:
                ids[index] = record["id"].decode()
            if label:
                labels.append(int(record[label]))
            if caption:
                captions.append(record[caption].decode())

    def read(index: int) -> Image.Image:
        content = records[index][image]
        if isinstance(content, bytes):
            return decode(io.BytesIO(content), f"{config.name} {ids[index]}")
        return Image.fromarray(content[..., 0] if content.shape[2] == 1 else content)

    return Source(
        ids=np.array(ids, str),
        labels=np.array(labels, int) if label else None,
        label_names=tuple(features[label].names) if label else (),
        captions=tuple(captions) if caption else None,
        read=read,
    )


def _builder(name: str):
    """The tfds builder of a prepared data set."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known)
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
    """What a user has to do once."""
    return (
        "Prepare it once, on any machine with TensorFlow: pip install tensorflow-cpu "
        f"&& tfds build {name} --file_format=array_record (with --data_dir=DIR, and "
        "TFDS_DATA_DIR=DIR afterwards, to have it elsewhere)."
    )


def _only(features, name: str, kind: type, rank: int | None = None) -> str | None:
    """The feature of that kind with that name, or else the only one of that kind."""
    found = [
        key
        for key, feature in features.items()
        if isinstance(feature, kind) and rank in (None, len(feature.shape))
    ]
    if name in found:
        return name
    return found[0] if len(found) == 1 else None


def _image(name: str, features) -> str:
    """The feature that is the image."""
    import tensorflow_datasets as tfds

    image = _only(features, "image", tfds.features.Image) or _only(
        features, "image", tfds.features.Tensor, rank=3
    )
    if (
        image is None
        or features[image].np_dtype != np.uint8
        or features[image].shape[-1] not in (1, 3, 4)
    ):
        raise ValueError(
            f"{name} has no single feature that is an image of 1, 3 or 4 channels of "
            f"8 bits; it has {', '.join(sorted(features))}."
        )
    return image


def _positions(builder, split: str) -> list[str]:
    """ "train-000012" and so on: where each record of a split or slice is."""
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{builder.name} cannot be read: {error}") from error
    return [
        f"{part.splitname}-{position:06d}"
        for part in parts
        for position in range(splits[part.splitname].num_examples)[part.from_ : part.to]
    ]


def _records(builder, split: str, image: str):
    """The records of a split, with images as they are stored."""
    import tensorflow_datasets as tfds

    # Tensors are stored plain, and skipping their decoding would lose their shape.
    encoded = isinstance(builder.info.features[image], tfds.features.Image)
    decoders = {image: tfds.decode.SkipDecoding()} if encoded else None
    try:
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} is prepared in {builder.data_path} as "
            f"{builder.info.file_format.value}, which cannot be read without "
            f"TensorFlow. {_how_to_prepare(builder.name)}"
        ) from error
