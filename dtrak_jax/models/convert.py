"""Checkpoints of diffusers' `UNet2DModel`, read and written without PyTorch."""

import re
from collections.abc import Collection, Mapping

import jax
from etils import epath

from dtrak_jax.checks import check_fields, one_of
from dtrak_jax.files import at, read_json, write_json
from dtrak_jax.models.config import ModelConfig
from dtrak_jax.models.functions import build, parameter_shapes
from dtrak_jax.models.tensors import (
    read_tensors,
    tensor_names,
    to_params,
    to_tensors,
    write_tensors,
)
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
    names = set(map(current_name, tensor_names(folder / WEIGHTS)))
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
    tensors = read_tensors(folder / WEIGHTS)
    tensors = {current_name(name): tensor for name, tensor in tensors.items()}
    model = build(model_config(read_json(folder / CONFIG), tensors))
    params = to_params(parameter_shapes(model), tensors, folder / WEIGHTS)
    return model, jax.device_put(params)


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


def to_diffusers(model: UNet2D, params: dict, folder: epath.PathLike) -> None:
    """Writes a folder that diffusers' `UNet2DModel.from_pretrained` loads.

    The folder is made if it is missing. Its config.json and
    diffusion_pytorch_model.safetensors are replaced, each in one step.
    """
    config = model.config
    settings = {name: getattr(config, name) for name in DEFAULTS}
    groups = config.norm_num_groups if config.mid_attention_norm else None
    settings |= {"_class_name": "UNet2DModel", "attn_norm_num_groups": groups}
    write_tensors(at(folder) / WEIGHTS, to_tensors(params))
    write_json(at(folder) / CONFIG, settings)
