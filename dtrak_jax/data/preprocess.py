"""Pillow images, 8-bit pixels, and the pixels in [-1, 1] that a model sees."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


def decode(file: Path | BinaryIO) -> Image.Image:
    """Returns the image in a file, the way up that its EXIF data asks for."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise errors of many kinds.
        raise ValueError(f"it is not a readable image: {error}") from error


def preprocess(
    image: Image.Image, size: int, channels: int, center_crop: int = 0
) -> np.ndarray:
    """Returns an image cut square, resized and scaled to [-1, 1], as D-TRAK does it.

    The steps are, in this order: conversion to grey (ITU-R 601 luma) or RGB, which
    ignores transparency; torchvision's CenterCrop(center_crop), unless it is 0;
    Resize(size), which makes the shorter side `size` and the longer one
    int(size * long / short), bilinear with antialiasing; CenterCrop(size);
    x / 127.5 - 1. The offset of a crop is (side - size) / 2 rounded half to even.

    Pixels of an image of mode "F" (one float channel) must be in [-1, 1] already and
    are not scaled. An image that is smaller than `center_crop` (torchvision would pad
    it with black) or has more than 8 bits per channel is a ValueError.

    Returns:
      float32 [size, size, channels].
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; images have 1 (grey) or 3 (RGB).")
    if image.mode.startswith("I"):
        raise ValueError(
            f"it has more than 8 bits per channel (mode {image.mode}); convert it."
        )
    if image.mode != "F":
        image = image.convert("L" if channels == 1 else "RGB")
    if center_crop:
        if min(image.size) < center_crop:
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, fewer than "
                f"data.center_crop={center_crop}."
            )
        image = _crop(image, center_crop)
    sides = tuple(int(size * side / min(image.size)) for side in image.size)
    image = _crop(image.resize(sides, Image.Resampling.BILINEAR), size)
    pixels = np.asarray(image).reshape(size, size, -1)
    if image.mode == "F":
        return np.repeat(pixels, channels, axis=2)
    return from_pixels(pixels)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Returns the square in the centre of an image."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def from_pixels(pixels: np.ndarray) -> np.ndarray:
    """Returns 8-bit pixels as float32 numbers in [-1, 1], x / 127.5 - 1."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Returns pixels in [-1, 1] as 8-bit numbers, rounded; undoes `from_pixels`."""
    return np.clip(np.round(images * 127.5 + 127.5), 0, 255).astype(np.uint8)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Returns 8-bit pixels [H, W, 1 or 3] as a Pillow image."""
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
