"""Tensors of safetensors files as parameters of flax modules, and back.

A flax module whose submodules have the names that PyTorch's have needs no table: its
parameter ("up_blocks_0", "conv", "kernel") is the tensor up_blocks.0.conv.weight.
"""

import json
import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dtrak_jax.checks import one_of
from dtrak_jax.files import at, check_fetched, read_json, write_bytes

CONFIG = "config.json"
INDEX = "model_index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

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


def model_folder(folder: epath.PathLike, part: str) -> epath.Path:
    """Returns the folder of one model: this one, or the part of a pipeline, like `unet`.

    Raises:
      FileNotFoundError: neither has a config.json.
      ValueError: it is the folder of a pipeline without that part.
    """
    folder = at(folder)
    for candidate in (folder, folder / part):
        if (candidate / CONFIG).is_file():
            return candidate
    if (folder / INDEX).is_file():
        name = read_json(folder / INDEX).get("_class_name")
        raise ValueError(
            f"{folder} is that of a {name}, which has no {part}/{CONFIG}; it must be the "
            f"folder of a pipeline whose network is in `{part}`."
        )
    raise FileNotFoundError(
        f"{folder} has no {CONFIG}, nor has a folder `{part}` in it; it must be the "
        f"folder of a model, or of a pipeline with the model in `{part}`."
    )


def weights_files(folder: epath.Path, stem: str) -> list[epath.Path]:
    """Returns the safetensors files of a model's folder: a single one, or all shards.

    Args:
      stem: what their names begin with: "diffusion_pytorch_model" or "model".

    Raises:
      FileNotFoundError: there are none, or a shard is missing.
      ValueError: there are pickles only.
    """
    for variant in ("", ".fp16", ".bf16"):
        path = folder / f"{stem}{variant}.safetensors"
        if path.is_file():
            return [path]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder} has no {', '.join(missing)}, which {index.name} names."
                )
            return [folder / name for name in names]
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"{folder} has its weights in {min(pickles)} alone. That is a pickle, "
            "which may run any program when it is read, so it is not. Take "
            f"{stem}.safetensors: many models have it, some on another revision "
            "(`--revision refs/pr/9` of lambda/miniSD-diffusers); or load the pickle "
            "in PyTorch, if you trust it, and call save_pretrained."
        )
    raise FileNotFoundError(
        f"{folder} has no {stem}.safetensors, which is to hold the model's weights; nor "
        f"{stem}.fp16.safetensors, nor {stem}.safetensors.index.json and its files."
    )


def read_weights(folder: epath.Path, stem: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a model's folder, by name; see `weights_files`."""
    shards = map(read_tensors, weights_files(folder, stem))
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def weight_names(folder: epath.Path, stem: str) -> set[str]:
    """Returns the names of a model folder's tensors, none of which is read."""
    paths = weights_files(folder, stem)
    return {name for path in paths for name in read_header(path)[0]}


def read_header(path: epath.Path) -> tuple[dict, dict[str, str], int]:
    """Returns a safetensors file's entries by name, its metadata and where data begin.

    Raises:
      ValueError: the file is damaged, or stands for one that Git LFS did not fetch.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        # By specification the header is no longer than that.
        header = file.read(min(length, 100_000_000))
        size = file.seek(0, 2)
    check_fetched(path, start)
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"{path} is damaged: its header is no JSON of tensors."
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{path} is damaged: it has {size:,} bytes, and by its header {expected:,}. "
            "Fetch it again."
        )
    return entries, metadata, 8 + length


def read_tensors(path: epath.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file, by name; they share one buffer.

    Raises:
      ValueError: as `read_header`; or a tensor has a type that is not in `TYPES`.
    """
    entries, _, offset = read_header(path)
    content = path.read_bytes()
    tensors = {}
    for name, entry in entries.items():
        one_of(f"{path}: the type of {name}", entry["dtype"], TYPES)
        dtype, shape = np.dtype(TYPES[entry["dtype"]]), entry["shape"]
        begin, end = entry["data_offsets"]
        count = math.prod(shape)
        if end - begin != count * dtype.itemsize or begin < 0:
            raise ValueError(f"{path} is damaged: {name} has not the size of {shape}.")
        tensor = np.frombuffer(content, dtype, count, offset + begin)
        tensors[name] = tensor.reshape(shape)
    return tensors


def write_tensors(
    path: epath.Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file that PyTorch reads, in one step."""
    contiguous = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    write_bytes(path, safetensors.numpy.save(contiguous, metadata=metadata))


def tensor_name(path: tuple[str, ...]) -> str:
    """Returns PyTorch's name of a parameter."""
    *modules, leaf = path
    modules = [re.sub(r"(s|to_out|net)_(\d+)$", r"\1.\2", name) for name in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def tensor_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns the axes of a parameter in PyTorch's order."""
    return (0, 1) if path[-1] == "embedding" else AXES[ndim]


def to_params(
    shapes: Mapping,
    tensors: Mapping[str, np.ndarray],
    source: object,
    name_of: Callable[[tuple[str, ...]], str] = tensor_name,
    dtype: jnp.dtype | None = np.float32,
) -> dict:
    """Returns parameters on the host, made of tensors by PyTorch's names and axes.

    Args:
      shapes: the module's parameters as nested dicts of `jax.ShapeDtypeStruct`.
      tensors: all tensors of the module, and no others.
      source: the file or folder that the tensors are of, for messages.
      name_of: the function from a parameter's path to its tensor's name.
      dtype: the type of the parameters; None leaves each as its tensor is.

    Raises:
      ValueError: a tensor is missing, left over, misshapen or not of floating point.
    """
    adapted = [name for name in tensors if ".base_layer." in name or ".lora_" in name]
    if adapted:
        raise ValueError(
            f"{source} was saved with an adapter on it ({adapted[0]}), whose weights may "
            "be added to the base's already. Save the base again without it, in PyTorch: "
            "unfuse_lora() if it was fused, unload_lora_weights(), save_pretrained()."
        )
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
        tensor = tensor.astype(dtype or tensor.dtype, copy=False)
        params[path] = tensor.transpose(np.argsort(axes))
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
