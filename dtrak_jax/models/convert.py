"""Checkpoints of diffusers' `UNet2DModel`, read and written without PyTorch."""

import json
import re
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dtrak_jax.checks import check_fields, one_of
from dtrak_jax.files import at, read_json, write_bytes, write_json
from dtrak_jax.models.config import ModelConfig
from dtrak_jax.models.functions import build, parameter_shapes
from dtrak_jax.models.unet import UNet2D

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) + 3 * ("AttnDownBlock2D",),
    "up_block_types": 3 * ("AttnUpBlock2D",) + ("UpBlock2D",),
    "attention_head_dim": 8,
    "add_attention": True,
    "resnet_time_scale_shift": "default",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "dropout": 0.0,
}
"""The values that diffusers gives to fields that a config.json leaves out."""

FIXED = {
    "_class_name": ("UNet2DModel",),
    "act_fn": ("silu", "swish"),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
"""Fields of diffusers that this UNet does not have, and the values that it implies."""

IGNORED = (
    "num_train_timesteps",
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
"""Fields without effect: of learned time embeddings, and those that averaging adds."""

RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of the attention as diffusers <= 0.17 names them, and as it does now."""

AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
"""The axes of a parameter in PyTorch's order: (out, in) or (out, in, height, width)."""

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
"""The types that tensors may have, by their names in a safetensors file."""


def resolve(config: ModelConfig) -> ModelConfig:
    """Returns the settings of the model itself: those in `config.folder`, if it is set.

    No weights are read; of the tensors' names only those that tell two models apart are
    checked.

    Raises:
      FileNotFoundError, ValueError: as `from_diffusers`.
    """
    if not config.folder:
        return config
    folder = _model_folder(config.folder)
    path = folder / WEIGHTS
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(
            min(length, 100_000_000)
        )  # By specification it is no longer.
    try:
        names = set(map(current_name, json.loads(header)))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return model_config(read_json(folder / CONFIG), names)


def from_diffusers(folder: epath.PathLike) -> tuple[UNet2D, dict]:
    """Returns the model in a folder of diffusers and its parameters.

    The folder is that of a `UNet2DModel`, with config.json and
    diffusion_pytorch_model.safetensors; or that of a pipeline, whose folder `unet` is
    then taken.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: this UNet does not have a field or value of config.json; a tensor is
        missing, left over, misshapen or not of floating point; or a file is damaged.
    """
    folder = _model_folder(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    model = build(model_config(read_json(folder / CONFIG), tensors))
    return model, jax.device_put(parameters(model, tensors))


def _model_folder(folder: epath.PathLike) -> epath.Path:
    """Returns the folder that holds a model's files: this one, or `unet` in it."""
    folder = at(folder)
    if (folder / "unet" / CONFIG).is_file() and not (folder / CONFIG).is_file():
        folder = folder / "unet"
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; it must hold {CONFIG} and "
            f"{WEIGHTS} of a diffusers UNet2DModel, or be a pipeline's folder with "
            "these in `unet`. (Weights in a .bin file: load them in diffusers and "
            "call save_pretrained.)"
        )
    return folder


def _read_tensors(path: epath.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by the names that diffusers has now."""
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    tensors = {}
    for name, entry in entries:
        one_of(f"{path}: the type of {name}", entry["dtype"], TYPES)
        content = np.frombuffer(entry["data"], TYPES[entry["dtype"]])
        tensors[current_name(name)] = content.reshape(entry["shape"])
    return tensors


def current_name(name: str) -> str:
    """Returns the name that diffusers now gives to a tensor; see `RENAMED`."""
    pattern = rf"\.({'|'.join(RENAMED)})\."
    return re.sub(pattern, lambda match: f".{RENAMED[match[1]]}.", name)


def model_config(settings: Mapping, tensors: Collection[str]) -> ModelConfig:
    """Returns the settings that a config.json and the names of tensors describe.

    Raises:
      ValueError: this UNet does not have a field or its value.
    """
    for name, allowed in FIXED.items():
        one_of(f"{CONFIG}: {name}", settings.get(name, allowed[0]), allowed)
    derived = ("time_embedding_dim", "attn_norm_num_groups")
    check_fields(CONFIG, settings, {*DEFAULTS, *FIXED, *derived, *IGNORED})
    fields = {name: settings.get(name, value) for name, value in DEFAULTS.items()}
    size = fields["sample_size"]
    if isinstance(size, list) and len(set(size)) == 1:
        fields["sample_size"] = size[0]
    for name in ("down_block_types", "up_block_types"):
        fields[name] = tuple(kind.removeprefix("UNetRes") for kind in fields[name])
    fields["block_out_channels"] = tuple(fields["block_out_channels"])
    # Up to 0.16 diffusers normalises before every attention. Later ones leave this
    # out of the middle block under scale_shift, unless attn_norm_num_groups is set.
    # config.json may not tell the two apart, the tensors do.
    fields["mid_attention_norm"] = (
        fields["resnet_time_scale_shift"] != "scale_shift"
        or settings.get("attn_norm_num_groups") is not None
        or "mid_block.attentions.0.group_norm.weight" in tensors
    )
    config = ModelConfig(**fields)
    values = (4 * config.block_out_channels[0], config.norm_num_groups)
    for name, value in zip(derived, values):
        one_of(f"{CONFIG}: {name}", settings.get(name), (None, value))
    return config


def parameters(model: UNet2D, tensors: Mapping) -> dict:
    """Returns the parameters of a model, made of tensors by diffusers' names and axes.

    Raises:
      ValueError: a tensor is missing, left over or misshapen.
    """
    tensors = dict(tensors)
    params = {}
    for path, leaf in flatten_dict(parameter_shapes(model)).items():
        name, axes = tensor_name(path), AXES[leaf.ndim]
        shape = tuple(leaf.shape[axis] for axis in axes)
        if name not in tensors:
            raise ValueError(
                f"{WEIGHTS} has no tensor {name} of shape {shape}, which {CONFIG} "
                "calls for."
            )
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise ValueError(
                f"{WEIGHTS}: {name} has shape {tensor.shape}; by {CONFIG} it must "
                f"be {shape}."
            )
        params[path] = tensor.astype(np.float32).transpose(np.argsort(axes))
    for name, tensor in tensors.items():
        raise ValueError(
            f"{WEIGHTS} has a tensor {name} of shape {tensor.shape}, for which the "
            f"model of {CONFIG} has no place."
        )
    return unflatten_dict(params)


def tensor_name(path: tuple[str, ...]) -> str:
    """Returns diffusers' name of a parameter.

    That of ("up_blocks_0", "conv", "kernel") is up_blocks.0.conv.weight.
    """
    *modules, leaf = path
    modules = [re.sub(r"(s|to_out)_(\d+)$", r"\1.\2", name) for name in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def to_diffusers(model: UNet2D, params: dict, folder: epath.PathLike) -> None:
    """Writes a folder that diffusers' `UNet2DModel.from_pretrained` loads.

    The folder is made if it is missing. Its config.json and
    diffusion_pytorch_model.safetensors are replaced, each in one step.
    """
    config = model.config
    settings = {name: getattr(config, name) for name in DEFAULTS}
    groups = config.norm_num_groups if config.mid_attention_norm else None
    settings |= {"_class_name": "UNet2DModel", "attn_norm_num_groups": groups}
    tensors = {
        tensor_name(path): np.ascontiguousarray(leaf.transpose(AXES[leaf.ndim]))
        for path, leaf in flatten_dict(jax.device_get(params)).items()
    }
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_bytes(at(folder) / WEIGHTS, weights)
    write_json(at(folder) / CONFIG, settings)
