"""The arguments of a user as arrays that JAX has, or an error."""

import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.checks import check_ids, check_images
from dtrak_jax.digests import named_leaves
from dtrak_jax.features.task import Task


def as_arrays(name: str, tree):
    """Returns a pytree with an array in place of each leaf, in types without 64 bits.

    Leaves may be arrays of any library that NumPy reads, numbers, and lists of numbers,
    however deep. An error calls a leaf "name: path".

    Raises:
      ValueError: a leaf holds something else than numbers, or too large integers.
    """

    def convert(path, leaf):
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        return _as_array(f"{name}: {place}" if place else name, leaf)

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=_is_numbers)


def _is_numbers(node) -> bool:
    """Returns True for a list of numbers, or of such lists: an array to be."""
    if not isinstance(node, list | tuple) or not node:
        return False
    return all(isinstance(e, numbers.Number) or _is_numbers(e) for e in node)


def _as_array(name: str, leaf) -> np.ndarray | jax.Array:
    """Returns a leaf as an array of numbers without 64 bits, see `as_arrays`."""
    # Arrays that are read when they are sliced stay so.
    typed = isinstance(getattr(leaf, "dtype", None), np.dtype)
    is_array = typed and not isinstance(leaf, np.generic)
    try:
        array = leaf if is_array else np.asarray(leaf)
    except ValueError as error:
        raise ValueError(f"{name} is a list of unequal lists: {error}.") from error
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        what = f"an array of {array.dtype}" if array.ndim else f"{leaf!r:.80}"
        raise ValueError(
            f"{name} is {what}; it must be an array of numbers. Bind what is no array, "
            "such as a function, to the network before you hand it over."
        )
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return array
    array = np.asarray(array)
    converted = array.astype(dtype)
    if np.issubdtype(dtype, np.integer) and (converted != array).any():
        raise ValueError(f"{name} has integers that do not fit in {dtype}.")
    return converted


def images_of(task: Task, images, bounds) -> np.ndarray:
    """Returns images as float32, or raises a ValueError unless they fit the task."""
    try:
        images = np.asarray(images)
    except ValueError as error:
        raise ValueError(f"images are lists of unequal lengths: {error}") from error
    apart, shape = images.ndim == 5, images.shape
    if apart and shape[1] != len(task.pairs):
        raise ValueError(
            f"images have shape {shape}: {shape[1]} for each example; the task has "
            f"{len(task.pairs)} pairs of a timestep and a draw."
        )
    flat = images.reshape(-1, *shape[-3:]) if apart else images
    return check_images(flat, bounds).reshape(shape)


def ids_of(ids: Sequence[str] | None, n: int) -> tuple[str, ...]:
    """Returns n ids, which are numbers if None are given, or raises an error."""
    if ids is None:
        return tuple(map(str, range(n)))
    return tuple(check_ids(ids, n))


def check_rows(cond, n: int) -> None:
    """Raises a ValueError unless every array of a pytree has a row for each image."""
    for path, leaf in named_leaves(cond).items():
        name = f"cond: {path}" if path else "cond"
        if not leaf.ndim:
            raise ValueError(f"{name} is {leaf!s}; it must be an array with rows.")
        if len(leaf) != n:
            raise ValueError(
                f"{name} has {len(leaf)} rows and images {n}; give one each."
            )
