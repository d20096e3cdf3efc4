"""What is known of a set of images, and the smallest such set: scikit-learn's digits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dtrak_jax.config import DataConfig


@dataclass(frozen=True, eq=False)
class Source:
    """What is known of n examples without decoding their images."""

    ids: np.ndarray
    """[n] strings, which stay with their images for good."""
    labels: np.ndarray | None
    """int [n], indices into `label_names`."""
    label_names: tuple[str, ...]
    captions: tuple[str, ...] | None
    read: Callable[[int], Image.Image]
    """Decodes the image with that index; a ValueError says which one is corrupt."""


def decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """The image in a file, the way up that its EXIF data asks for."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise errors of many kinds.
        raise ValueError(f"{name} is not a readable image: {error}") from error


def digits(config: DataConfig, split: str) -> Source:
    """scikit-learn's 1,797 grey 8x8 digits, x / 8 - 1 of its 0 to 16; no splits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = data.images.astype(np.float32) / 8 - 1
    return Source(
        ids=np.array([f"digit-{index:04d}" for index in range(len(pixels))]),
        labels=data.target.astype(int),
        label_names=tuple(str(name) for name in data.target_names),
        captions=None,
        read=lambda index: Image.fromarray(pixels[index]),
    )
