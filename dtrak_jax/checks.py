"""Values that a computation may rely on, or an error that says what would be right."""

import dataclasses
import difflib
import math
import numbers
import operator
import re
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType
from typing import Literal

import jax.numpy as jnp
import numpy as np

from dtrak_jax.rng import LARGEST_SEED

LONGEST = 80
"""The characters of a value that an error shows."""

REMEDY = "uint8 pixels: divide by 127.5 and subtract 1"


def shown(value: object) -> str:
    """Returns a value as an error shows it: an array by its shape, and nothing long."""
    if hasattr(value, "dtype") and getattr(value, "shape", ()):
        return f"an array of {value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def one_of(name: str, value: object, allowed: Collection) -> None:
    """Raises a ValueError that lists what is allowed, unless `value` is in it."""
    if not _is_hashable(value) or value not in allowed:
        known = ", ".join(repr(choice) for choice in allowed)
        # Names that differ in a letter or two: what is in a file is no slip of the hand.
        near = _nearest(str(value), list(map(str, allowed)), 0.8)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name} is {shown(value)}{hint}; it must be one of: {known}.")


def _nearest(value: str, names: Collection[str], cutoff: float) -> list[str]:
    """Returns the name that has the same letters in another order or case, or is most
    like a value with a ratio of `difflib` of at least the cutoff; [] if none is."""
    same = [name for name in names if sorted(name.lower()) == sorted(value.lower())]
    return same[:1] or difflib.get_close_matches(value, names, 1, cutoff)


def _is_hashable(value: object) -> bool:
    """Returns False for lists, arrays and what holds them, which are no choices."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def instance(name: str, value: object, *classes: type) -> None:
    """Raises a TypeError unless a value is of one of some classes."""
    if not isinstance(value, classes):
        words = {NoneType: "None", Mapping: "dict"}
        names = dict.fromkeys(words.get(kind, kind.__name__) for kind in classes)
        raise TypeError(f"{name} is {shown(value)}; it must be {' or '.join(names)}.")


def function(name: str, value: object) -> None:
    """Raises a TypeError unless a value can be called."""
    if not callable(value):
        raise TypeError(f"{name} is {shown(value)}; it must be a function.")


def items(name: str, value: object) -> list:
    """Returns the items of a list, tuple or array; what else there is, is a TypeError."""
    is_one = isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
    # Arrays without axes call themselves iterable.
    if is_one or getattr(value, "shape", None) == ():
        raise TypeError(f"{name} is {shown(value)}; it must be a list or array.")
    return list(value)


def real_numbers(name: str, value: object, ndim: int | None = None) -> np.ndarray:
    """Returns an array of real numbers as float64; what else there is, is a ValueError.

    It must have so many axes, if their number is given.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind in "OSUc" or ndim not in (None, array.ndim):
            raise TypeError(f"{array.dtype} {array.shape}")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        axes = "" if ndim is None else f" with {ndim} axes"
        raise ValueError(
            f"{name} is {shown(value)}; it must be an array of real numbers{axes}."
        ) from error


def distinct(name: str, values: Sequence) -> None:
    """Raises a ValueError that names what is there twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name} has {value!r} twice; name each once.")


def alike(value: object, allowed: Collection, first: Sequence[str] = ()) -> str:
    """Returns the allowed names that are most like a value, "NAME or NAME"; "" if none is.

    Of names that are not nearly the same, those in `first` are taken, if there are any.
    """
    texts = [choice for choice in allowed if isinstance(choice, str)]
    names = (
        _nearest(str(value), texts, 0.85)
        or first
        or difflib.get_close_matches(str(value), texts, 3, 0.6)
    )
    return " or ".join(names)


def free(default):
    """Returns a field of settings that decides no trained model and no sample."""
    return dataclasses.field(default=default, metadata={"free": True})


def check_choices(section: str, settings: object) -> None:
    """Raises a ValueError unless every `Literal` field holds one of its choices.

    Fields are those of a dataclass, of the type `Literal[...]` or
    `tuple[Literal[...], ...]`; an error calls them "section.field". Numbers of NumPy
    become Python's, which files of settings can hold.
    """
    for field in dataclasses.fields(settings):
        kind, value = field.type, getattr(settings, field.name)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, tuple):
            value = tuple(v.item() if isinstance(v, np.generic) else v for v in value)
        object.__setattr__(settings, field.name, value)
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


def at_least(name: str, value: object, low: int, high: float = math.inf) -> int:
    """Returns an integer as Python's, or raises a ValueError unless it is in [low, high].

    Integers of NumPy and of JAX are integers too.
    """
    integer = _plain(value, operator.index)
    if integer is None or not low <= integer <= high:
        what = f"between {low} and {high}" if high < math.inf else f">= {low}"
        raise ValueError(f"{name} is {shown(value)}; it must be an integer {what}.")
    return integer


def seed(name: str, value: object, most: int = LARGEST_SEED) -> int:
    """Returns a seed as Python's integer, or raises a ValueError unless it is in [0, most]."""
    return at_least(name, value, 0, most)


def between(name: str, value: object, low: float, high: float = math.inf) -> float:
    """Returns a number as Python's, or raises a ValueError unless it is in [low, high].

    Numbers of NumPy and of JAX are numbers too.
    """
    number = _plain(value, float)
    if number is None or not math.isfinite(number) or not low <= number <= high:
        what = f"between {low} and {high}" if high < math.inf else f">= {low}"
        raise ValueError(
            f"{name} is {shown(value)}; it must be a finite number {what}."
        )
    return number


def positive(name: str, value: object) -> float:
    """Returns a number as Python's, or raises a ValueError unless it is above zero."""
    number = _plain(value, float)
    if number is None or not math.isfinite(number) or number <= 0:
        raise ValueError(
            f"{name} is {shown(value)}; it must be a finite number above 0."
        )
    return number


def _plain(value: object, convert: Callable):
    """Returns a number of any library as Python's, or None for all that is no number."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    number = kind and kind not in "bcmMOSU" or isinstance(value, numbers.Real)
    if not number or isinstance(value, bool) or np.ndim(value):
        return None
    try:
        return convert(value)
    except (TypeError, ValueError):
        return None


def pattern(name: str, value: str) -> None:
    """Raises a ValueError unless `value` is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name} is {shown(value)}; it must be a regular expression ({error})."
        ) from error


def check_images(
    images: np.ndarray, bounds: tuple[float, float] | None = (-1.0, 1.0)
) -> np.ndarray:
    """Returns images as float32 [n, H, W, C], or raises a ValueError.

    None of n, H, W and C may be 0, and every pixel must be finite and within bounds.
    Without bounds there is a warning where they are not those of a pixel model, [-1, 1].
    Lists and arrays of any numbers are accepted, but uint8 only with bounds up to 255.
    """
    if bounds is not None:
        limits = [_plain(limit, float) for limit in items("bounds", bounds)]
        if len(limits) != 2 or None in limits or not limits[0] < limits[1]:
            raise ValueError(f"bounds is {shown(bounds)}; it must be (least, largest).")
    images = np.asarray(images)
    if images.ndim != 4:
        expected = "[n, height, width, channels]"
        raise ValueError(f"images have shape {images.shape}; they must be {expected}.")
    if images.size == 0:
        raise ValueError(f"images have shape {images.shape}: there are none.")
    real = any(jnp.issubdtype(images.dtype, kind) for kind in (np.floating, np.integer))
    bytes_as_such = bounds is not None and 255 <= bounds[1] < math.inf
    if not real or (images.dtype == np.uint8 and not bytes_as_such):
        raise ValueError(f"images are {images.dtype}; they must be float32 ({REMEDY}).")
    # What is float32 already is not copied.
    images = images.astype(np.float32, copy=False)
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        raise ValueError(
            f"{len(bad)} of {len(images)} images have pixels that are not finite; "
            f"the first one has index {bad[0]}."
        )
    if bounds is None:
        _warn_of_range(float(low), float(high))
    elif low < bounds[0] or high > bounds[1]:
        least, most = bounds
        raise ValueError(
            f"pixels are between {low:g} and {high:g}; they must be in "
            f"[{least:g}, {most:g}] ({REMEDY})."
        )
    return images


def _warn_of_range(low: float, high: float) -> None:
    """Warns of images without bounds that are not as most pixel models have them."""
    if low >= 0 and 0 < high <= 1:
        hint = "They look like pixels in [0, 1]; most models take 2 x - 1 of these."
    elif low >= 0 and 16 < high <= 255:
        hint = "They look like pixels in [0, 255]; most models take x / 127.5 - 1."
    elif low < -1 or high > 1:
        hint = "Most models of pixels take [-1, 1]; latents have no such range."
    else:
        return
    warnings.warn(
        f"images are between {low:g} and {high:g}. {hint} If it is right, say so: "
        f"bounds=({math.floor(low)}, {math.ceil(high)}), outside of which is an error.",
        stacklevel=6,
    )


def check_ids(ids: Sequence[str] | np.ndarray, n: int) -> list[str]:
    """Returns ids, or raises a ValueError unless they are `n` different strings.

    What is not a string is a TypeError.
    """
    ids = items("ids", ids)
    if len(ids) != n:
        raise ValueError(f"there are {len(ids)} ids for {n} examples.")
    seen = set()
    for index, name in enumerate(ids):
        if not isinstance(name, str):
            raise TypeError(f"ids[{index}] is {shown(name)}; ids must be strings.")
        if name in seen:
            raise ValueError(
                f"the id {str(name)!r} occurs more than once; ids must be unique."
            )
        seen.add(name)
    return ids
