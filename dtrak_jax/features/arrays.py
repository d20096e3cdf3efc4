"""The parameters and conditions that a user gives, as pytrees of arrays that JAX has."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np


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
    is_array = isinstance(leaf, np.ndarray | jax.Array)
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
