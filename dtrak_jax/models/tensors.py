"""Tensors of safetensors files as parameters of flax modules, and back.

A flax module whose submodules have the names that PyTorch's have needs no table: its
parameter ("up_blocks_0", "conv", "kernel") is the tensor up_blocks.0.conv.weight.
"""

import json
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dtrak_jax.checks import one_of
from dtrak_jax.files import write_bytes

AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
"""The axes of a weight in PyTorch's order: (out, in) or (out, in, height, width)."""

TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
}
"""The types that tensors may have, by their names in a safetensors file."""


def tensor_names(path: epath.Path) -> list[str]:
    """Returns the names of the tensors in a safetensors file, whose weights are not read.

    Raises:
      ValueError: the file is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # By specification the header is no longer than that.
        header = file.read(min(length, 100_000_000))
    try:
        return [name for name in json.loads(header) if name != "__metadata__"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def read_tensors(path: epath.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file, by name.

    Raises:
      ValueError: the file is damaged, or a tensor has a type that is not in `TYPES`.
    """
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    tensors = {}
    for name, entry in entries:
        one_of(f"{path}: the type of {name}", entry["dtype"], TYPES)
        content = np.frombuffer(entry["data"], TYPES[entry["dtype"]])
        tensors[name] = content.reshape(entry["shape"])
    return tensors


def write_tensors(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that PyTorch reads, in one step."""
    contiguous = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    write_bytes(path, safetensors.numpy.save(contiguous, metadata={"format": "pt"}))


def tensor_name(path: tuple[str, ...]) -> str:
    """Returns PyTorch's name of a parameter."""
    *modules, leaf = path
    modules = [re.sub(r"(s|to_out)_(\d+)$", r"\1.\2", name) for name in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def tensor_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns the axes of a parameter in PyTorch's order."""
    return (0, 1) if path[-1] == "embedding" else AXES[ndim]


def to_params(
    shapes: Mapping,
    tensors: Mapping[str, np.ndarray],
    source: object,
    name_of: Callable[[tuple[str, ...]], str] = tensor_name,
) -> dict:
    """Returns float32 parameters, made of tensors by PyTorch's names and axes.

    Args:
      shapes: the module's parameters as nested dicts of `jax.ShapeDtypeStruct`.
      tensors: all tensors of the module, and no others.
      source: the file or folder that the tensors are of, for messages.
      name_of: the function from a parameter's path to its tensor's name.

    Raises:
      ValueError: a tensor is missing, left over, misshapen or not of floating point.
    """
    tensors = dict(tensors)
    params = {}
    for path, leaf in flatten_dict(shapes).items():
        name, axes = name_of(path), tensor_axes(path, leaf.ndim)
        shape = tuple(leaf.shape[axis] for axis in axes)
        if name not in tensors:
            raise ValueError(
                f"{source} has no tensor {name} of shape {shape}, which its config.json "
                "calls for."
            )
        tensor = tensors.pop(name)
        if tensor.shape != shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{source}: {name} has shape {tensor.shape} and type {tensor.dtype}; by "
                f"its config.json it must be {shape}, of floating point."
            )
        params[path] = tensor.astype(np.float32).transpose(np.argsort(axes))
    for name, tensor in tensors.items():
        raise ValueError(
            f"{source} has a tensor {name} of shape {tensor.shape}, for which the model "
            "of its config.json has no place."
        )
    return unflatten_dict(params)


def to_tensors(
    params: Mapping, name_of: Callable[[tuple[str, ...]], str] = tensor_name
) -> dict[str, np.ndarray]:
    """Returns parameters as tensors by PyTorch's names and axes."""
    flat = flatten_dict(jax.device_get(params))
    return {
        name_of(path): leaf.transpose(tensor_axes(path, leaf.ndim))
        for path, leaf in flat.items()
    }
