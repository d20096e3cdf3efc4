"""Images and ids that a computation may rely on, or an error that says why not."""

from collections.abc import Sequence

import numpy as np


def check_images(images: np.ndarray) -> None:
    """Raises a ValueError unless `images` are float32 [n, H, W, C] in [-1, 1].

    None of n, H, W and C may be 0, and every pixel must be finite. Arrays of NumPy
    and of JAX are accepted.
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; they must be [n, height, width, "
            "channels]."
        )
    if images.size == 0:
        raise ValueError(f"images have shape {images.shape}: there are none.")
    if images.dtype == np.uint8:
        raise ValueError(
            "images are uint8; divide them by 127.5 and subtract 1 to have float32 "
            "pixels in [-1, 1]."
        )
    if images.dtype != np.float32:
        raise ValueError(f"images are {images.dtype}; they must be float32.")
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        raise ValueError(
            f"{len(bad)} of {len(images)} images have pixels that are not finite; "
            f"the first one has index {bad[0]}."
        )
    if low < -1 or high > 1:
        raise ValueError(
            f"pixels are between {low:g} and {high:g}; they must be in [-1, 1] "
            "(uint8 pixels: divide by 127.5 and subtract 1)."
        )


def check_ids(ids: Sequence[str] | np.ndarray, n: int) -> None:
    """Raises a ValueError unless `ids` are `n` different strings.

    What is not a string is a TypeError.
    """
    if len(ids) != n:
        raise ValueError(f"there are {len(ids)} ids for {n} examples.")
    seen = set()
    for index, name in enumerate(ids):
        if not isinstance(name, str):
            raise TypeError(f"ids[{index}] is {name!r}; ids must be strings.")
        if name in seen:
            raise ValueError(
                f"the id {str(name)!r} occurs more than once; ids must be unique."
            )
        seen.add(name)
