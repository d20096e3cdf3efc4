"""Pillow images, 8-bit pixels, and the pixels in [-1, 1] that a model sees."""

from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from dtrak_jax.checks import shown

GREY = ("1", "L", "LA", "La")
"""Pillow's modes of 8 bits that have no colour."""


class Picture(NamedTuple):
    """The pixels of an image, and what was done to it that its owner may not expect."""

    pixels: np.ndarray
    """float32 [height, width, channels] in [-1, 1]."""
    changes: tuple[str, ...] = ()
    """Words that follow a count of pictures, such as "enlarged"."""


def decode(file: Path | BinaryIO) -> Image.Image:
    """Returns the image in a file, the way up that its EXIF data asks for.

    Of several frames it is the first one, and `is_animated` says so. Pixels of 16 bits
    have the mode "I;16"; numbers with a fraction are a ValueError, since no file says
    which of them are black and white.
    """
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            animated = getattr(image, "is_animated", False)
            kind = image.format
    except Exception as error:  # Pillow's decoders raise errors of many kinds.
        raise ValueError(f"it is not a readable image: {error}") from error
    if upright.mode == "F":
        raise ValueError("it has pixels with a fraction; save it with 8 or 16 bits.")
    if upright.mode == "I" and kind in ("PNG", "PPM"):
        # These formats have no more than 16 bits, whatever Pillow reads them into.
        upright = Image.fromarray(np.asarray(upright).astype(np.uint16))
    upright.is_animated = animated
    return upright


def preprocess(
    image: Image.Image,
    size: int | None,
    channels: int,
    center_crop: int = 0,
    background: str = "white",
) -> Picture:
    """Returns an image cut square, resized and scaled to [-1, 1], as D-TRAK does it.

    The steps are, in this order: transparency is laid on the background; conversion to
    grey (ITU-R 601 luma) or RGB; torchvision's CenterCrop(center_crop), unless it is 0;
    Resize(size), which makes the shorter side `size` and the longer one
    int(size * long / short), bilinear with antialiasing; CenterCrop(size);
    x / 127.5 - 1. The offset of a crop is (side - size) / 2 rounded half to even. If
    the size is None, an image keeps its own height and width.

    Pixels of 16 bits (mode "I;16") are scaled by x / 32767.5 - 1 and never rounded.
    Those of an image of mode "F" (one float channel) must be in [-1, 1] already and
    are not scaled. An image that is smaller than `center_crop` (torchvision would pad
    it with black) or of another kind is a ValueError.

    Returns:
      The pixels, float32 [size, size, channels], and what was changed.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; images have 1 (grey) or 3 (RGB).")
    changes = []
    if getattr(image, "is_animated", False):
        changes.append("with several frames, of which the first is taken")
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image)
        is_dark = image.getextrema()[1] < -0.875  # as are 12 bits stored in 16
        changes.append("of 16 bits" + " and almost black" * is_dark)
    elif image.mode == "I":
        raise ValueError("it has pixels of 32 bits; save it with 8 or 16.")
    elif image.mode != "F":
        image, more = _flat(image, channels, background)
        changes += more
    if center_crop:
        if min(image.size) < center_crop:
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, fewer than "
                f"data.center_crop={center_crop}."
            )
        image = _crop(image, center_crop)
    if size:
        if image.width != image.height:
            changes.append("cut to a square")
        if min(image.size) < size:
            changes.append("enlarged")
        sides = tuple(int(size * side / min(image.size)) for side in image.size)
        image = _crop(image.resize(sides, Image.Resampling.BILINEAR), size)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if (pixels == pixels[0, 0]).all():
        changes.append("of one colour")
    if image.mode == "F":
        return Picture(np.repeat(pixels, channels, axis=2), tuple(changes))
    return Picture(from_pixels(pixels), tuple(changes))


def _flat(
    image: Image.Image, channels: int, background: str
) -> tuple[Image.Image, list[str]]:
    """Returns an image of 8 bits as opaque grey or RGB, and what was changed."""
    changes = []
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            least, most = image.getextrema()[3]
            if least < 255:
                how = "with transparency" if most else "wholly transparent"
                changes.append(f"{how} on {background}")
            ground = Image.new("RGBA", image.size, background)
            image = Image.alpha_composite(ground, image).convert("RGB")
        if channels == 1 and image.mode not in GREY and _has_colour(image):
            changes.append("in colour made grey")
        return image.convert("L" if channels == 1 else "RGB"), changes
    except ValueError as error:
        raise ValueError(
            f"it has the mode {image.mode}, which Pillow cannot convert ({error}); "
            "save it as RGB."
        ) from error


def _has_colour(image: Image.Image) -> bool:
    """Returns True if red, green and blue differ anywhere."""
    return bool(np.ptp(np.asarray(image.convert("RGB")), axis=2).any())


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Returns a grey image of 16 bits as one of mode "F" in [-1, 1]."""
    if image.has_transparency_data:
        raise ValueError("it has 16 bits and transparency; save it with 8 bits.")
    return Image.fromarray(np.asarray(image).astype(np.float32) / 32767.5 - 1)


def check_colour(name: str, value: str) -> None:
    """Raises a ValueError unless Pillow knows `value` as an opaque colour."""
    try:
        opaque = len(ImageColor.getrgb(value)) == 3
    except (ValueError, AttributeError, TypeError):
        opaque = False
    if not opaque:
        raise ValueError(
            f"{name} is {shown(value)}; it must be a colour such as 'white' or '#ffffff'."
        )


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
