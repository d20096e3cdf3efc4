"""Values that a computation may rely on, or an error that says what would be right."""

import dataclasses
import math
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np


def one_of(name: str, value: object, allowed: Collection) -> None:
    """Raises a ValueError that lists what is allowed, unless `value` is in it."""
    if value not in allowed:
        known = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} is {value!r}; it must be one of: {known}.")


def free(default):
    """Returns a field of settings that decides no trained model and no sample."""
    return dataclasses.field(default=default, metadata={"free": True})


def check_choices(section: str, settings: object) -> None:
    """Raises a ValueError unless every `Literal` field holds one of its choices.

    Fields are those of a dataclass, of the type `Literal[...]` or
    `tuple[Literal[...], ...]`; an error calls them "section.field".
    """
    for field in dataclasses.fields(settings):
        kind, value = field.type, getattr(settings, field.name)
        many = typing.get_origin(kind) is tuple
        if many:
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is Literal:
            for choice in value if many else (value,):
                one_of(f"{section}.{field.name}", choice, typing.get_args(kind))


def check_fields(name: str, settings: Mapping, known: Collection[str]) -> None:
    """Raises a ValueError if a file has fields besides the known ones and _private."""
    for field, value in settings.items():
        if field not in known and not field.startswith("_"):
            raise ValueError(
                f"{name}: {field} is {value!r}; this field is unknown. Known are: "
                f"{', '.join(sorted(known))}."
            )


def at_least(name: str, value: object, low: int) -> None:
    """Raises a ValueError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= {low}.")


def seed(name: str, value: object, most: int = 2**32 - 1) -> None:
    """Raises a ValueError unless `value` is a seed, an integer from 0 to `most`."""
    at_least(name, value, 0)
    if value > most:
        raise ValueError(f"{name} is {value}; it must be an integer from 0 to {most}.")


def between(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raises a ValueError unless `value` is a number in [low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        what = f"between {low} and {high}" if high < math.inf else f">= {low}"
        raise ValueError(f"{name} is {value!r}; it must be a finite number {what}.")


def positive(name: str, value: object) -> None:
    """Raises a ValueError unless `value` is a finite number above zero."""
    between(name, value, 0)
    if value == 0:
        raise ValueError(f"{name} is 0; it must be a finite number above 0.")


def pattern(name: str, value: str) -> None:
    """Raises a ValueError unless `value` is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name} is {value!r}; it must be a regular expression ({error})."
        ) from error


def check_images(
    images: np.ndarray, bounds: tuple[float, float] | None = (-1.0, 1.0)
) -> None:
    """Raises a ValueError unless `images` are float32 [n, H, W, C] within bounds.

    None of n, H, W and C may be 0, and every pixel must be finite. Arrays of NumPy
    and of JAX are accepted.
    """
    images, remedy = np.asarray(images), "uint8 pixels: divide by 127.5 and subtract 1"
    if images.ndim != 4:
        expected = "[n, height, width, channels]"
        raise ValueError(f"images have shape {images.shape}; they must be {expected}.")
    if images.size == 0:
        raise ValueError(f"images have shape {images.shape}: there are none.")
    if images.dtype != np.float32:
        raise ValueError(f"images are {images.dtype}; they must be float32 ({remedy}).")
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        raise ValueError(
            f"{len(bad)} of {len(images)} images have pixels that are not finite; "
            f"the first one has index {bad[0]}."
        )
    if bounds and (low < bounds[0] or high > bounds[1]):
        least, most = bounds
        raise ValueError(
            f"pixels are between {low:g} and {high:g}; they must be in "
            f"[{least:g}, {most:g}] ({remedy})."
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
