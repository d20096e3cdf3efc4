"""From a Pillow image to the pixels that a model sees."""

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""


def preprocess(
    image: Image.Image, size: int, channels: int, center_crop: int = 0
) -> np.ndarray:
    """Makes an image square, resized, and scaled to [-1, 1], as D-TRAK does.

    In this order: conversion to grey (ITU-R 601 luma) or RGB, which ignores
    transparency; torchvision's CenterCrop(center_crop), unless it is 0;
    Resize(size), which makes the shorter side `size` and the longer one
    int(size * long / short), bilinear with antialiasing; CenterCrop(size);
    x / 127.5 - 1. The offset of a crop is (side - size) / 2 rounded half to even.

    Args:
      image: in a mode of at most 8 bits per channel; or in mode "F" (one float
        channel), whose pixels must be in [-1, 1] already and are not scaled.
      size: height and width of the result.
      channels: 1 or 3.
      center_crop: side of the square to cut out before resizing; 0 cuts nothing.

    Returns:
      float32 [size, size, channels] in [-1, 1].

    Raises:
      ValueError: an image smaller than `center_crop` (torchvision would pad it with
        black, silently), more than 8 bits per channel, or other numbers of channels.
    """
    if channels not in MODES:
        raise ValueError(f"channels is {channels}; images have 1 (grey) or 3 (RGB).")
    if image.mode.startswith("I"):
        raise ValueError(
            f"it has more than 8 bits per channel (mode {image.mode}); convert it."
        )
    if image.mode != "F":
        image = image.convert(MODES[channels])
    if center_crop:
        if min(image.size) < center_crop:
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, fewer than "
                f"data.center_crop={center_crop}."
            )
        image = _crop(image, center_crop)
    image = _crop(_resize(image, size), size)
    pixels = np.asarray(image, np.float32).reshape(size, size, -1)
    if image.mode == "F":
        return np.repeat(pixels, channels, axis=2)
    return pixels / 127.5 - 1


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] as 8-bit numbers, rounded; undone by x / 127.5 - 1."""
    return np.clip(np.round(images * 127.5 + 127.5), 0, 255).astype(np.uint8)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """8-bit pixels [H, W, 1 or 3] as a Pillow image."""
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the centre."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, size: int) -> Image.Image:
    """The image with a shorter side of `size`."""
    short = min(image.size)
    sides = tuple(int(size * side / short) for side in image.size)
    return image.resize(sides, Image.Resampling.BILINEAR)
