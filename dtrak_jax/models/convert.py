"""Checkpoints of diffusers' `UNet2DModel`, read and written without PyTorch."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dtrak_jax.config import ModelConfig, one_of
from dtrak_jax.files import read_json, write_bytes, write_json
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
"""diffusers' values of the fields that a config.json leaves out."""

FIXED = {
    "act_fn": ("silu", "swish"),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
"""Fields of diffusers that this UNet does not vary, and the values it stands for."""

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
"""Axes of a parameter in PyTorch's order: (out, in) and (out, in, height, width)."""


def from_diffusers(folder: epath.PathLike) -> tuple[UNet2D, dict]:
    """The model in a folder with the config.json and the
    diffusion_pytorch_model.safetensors of a diffusers `UNet2DModel`.

    Returns the module and its parameters, as `init` would. Raises a FileNotFoundError
    if a file is missing, and a ValueError for a field or value of config.json that
    this UNet does not have, for a tensor that is missing, left over or misshapen, and
    for a damaged file.
    """
    folder = epath.Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; it must hold {CONFIG} and "
            f"{WEIGHTS} of a diffusers UNet2DModel. (Weights in a .bin file: load them "
            "in diffusers and call save_pretrained.)"
        )
    settings = read_json(folder / CONFIG)
    try:
        tensors = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}.") from error
    except KeyError as error:
        raise ValueError(
            f"{folder / WEIGHTS} has tensors of type {error}, which NumPy does not "
            "have; they must be float32 or float16."
        ) from error
    old = re.compile(rf"\.({'|'.join(RENAMED)})\.")
    tensors = {
        old.sub(lambda match: f".{RENAMED[match[1]]}.", name): tensor
        for name, tensor in tensors.items()
    }
    model = build(model_config(settings, tensors))
    return model, jax.device_put(parameters(model, tensors))


def model_config(settings: Mapping, tensors: Mapping) -> ModelConfig:
    """The ModelConfig of a config.json; ValueError where there is none."""
    one_of(
        f"{CONFIG}: _class_name",
        settings.get("_class_name", "UNet2DModel"),
        ("UNet2DModel",),
    )
    known = DEFAULTS.keys() | FIXED.keys() | {"time_embedding_dim"}
    known |= {"attn_norm_num_groups", *IGNORED}
    for name, value in settings.items():
        if name not in known and not name.startswith("_"):
            raise ValueError(
                f"{CONFIG}: {name} is {value!r}; this field is unknown. Known are: "
                f"{', '.join(sorted(known))}."
            )
    for name, allowed in FIXED.items():
        one_of(f"{CONFIG}: {name}", settings.get(name, allowed[0]), allowed)

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
    for name, value in (
        ("time_embedding_dim", 4 * config.block_out_channels[0]),
        ("attn_norm_num_groups", config.norm_num_groups),
    ):
        one_of(f"{CONFIG}: {name}", settings.get(name), (None, value))
    return config


def parameters(model: UNet2D, tensors: Mapping) -> dict:
    """The parameters of a model from tensors by diffusers' names and axes."""
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
    """diffusers' name of a parameter: ("up_blocks_0", "conv", "kernel") is
    up_blocks.0.conv.weight."""
    *modules, leaf = path
    modules = [re.sub(r"(s|to_out)_(\d+)$", r"\1.\2", name) for name in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def to_diffusers(model: UNet2D, params: dict, folder: epath.PathLike) -> None:
    """Writes a folder that diffusers' `UNet2DModel.from_pretrained` loads.

    Makes the folder if need be and replaces its config.json and
    diffusion_pytorch_model.safetensors, each in one step.
    """
    settings = dataclasses.asdict(model.config)
    normalize = settings.pop("mid_attention_norm")
    settings["attn_norm_num_groups"] = (
        model.config.norm_num_groups if normalize else None
    )
    tensors = {
        tensor_name(path): np.ascontiguousarray(leaf.transpose(AXES[leaf.ndim]))
        for path, leaf in flatten_dict(jax.device_get(params)).items()
    }
    folder = epath.Path(folder)
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_bytes(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, {"_class_name": "UNet2DModel", **settings})
