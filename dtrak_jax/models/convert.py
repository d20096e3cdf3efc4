"""Folders of diffusers' networks, read and written without PyTorch."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax.checks import instance, one_of
from dtrak_jax.files import at, read_json, write_json
from dtrak_jax.models.autoencoder import AutoencoderKL, autoencoder_config
from dtrak_jax.models.conditional_unet import UNet2DCondition, conditional_config
from dtrak_jax.models.config import ModelConfig
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.tensors import (
    CONFIG,
    INDEX,
    model_folder,
    read_weights,
    to_params,
    to_tensors,
    weight_names,
    write_tensors,
)
from dtrak_jax.models.unet import UNet2D, model_config

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"


class Format(NamedTuple):
    """A network in diffusers."""

    class_name: str
    part: str
    """The folder of the network in one of a pipeline."""
    config: Callable
    """A function from config.json and the tensors, by name, to the settings."""


FORMATS = {
    UNet2D: Format("UNet2DModel", "unet", model_config),
    UNet2DCondition: Format("UNet2DConditionModel", "unet", conditional_config),
    AutoencoderKL: Format("AutoencoderKL", "vae", autoencoder_config),
}

RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of the attention as diffusers <= 0.17 names them, and as it does now."""


def current_name(name: str) -> str:
    """Returns the name that diffusers now gives to a tensor; see `RENAMED`."""
    pattern = rf"\.({'|'.join(RENAMED)})\."
    return re.sub(pattern, lambda match: f".{RENAMED[match[1]]}.", name)


def current(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors under the names and in the shapes that diffusers now has.

    Old files have the matrices of attention as weights of 1x1 convolutions.
    """
    tensors = {current_name(name): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        matrix = re.search(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name)
        if matrix and tensor.shape[2:] == (1, 1):
            tensors[name] = tensor[:, :, 0, 0]
    return tensors


def resolve(config: ModelConfig) -> ModelConfig:
    """Returns the settings of the model itself: those in `config.folder`, if it is set.

    No weights are read; of the tensors' names only those that tell two models apart are
    checked.

    Raises:
      FileNotFoundError, ValueError: as `from_diffusers`; or the folder is of a pipeline
        whose network is given something else than pictures.
    """
    if not config.folder:
        return config
    folder = model_folder(config.folder, "unet")
    _check_pipeline(folder)
    settings = _settings(folder, FORMATS[UNet2D])
    names = set(map(current_name, weight_names(folder, STEM)))
    return dataclasses.replace(model_config(settings, names), variance=config.variance)


def _check_pipeline(folder: epath.Path) -> None:
    """Raises a ValueError if a network is part of a pipeline with further networks."""
    index = folder.parent / INDEX
    if not index.is_file():
        return
    settings = read_json(index)
    further = sorted(
        name
        for name, value in settings.items()
        if isinstance(value, list) and any(value) and name not in ("unet", "scheduler")
    )
    if further:
        raise ValueError(
            f"{folder} is part of a {settings.get('_class_name')}, which has "
            f"{', '.join(further)} beside its unet, so that it is not given pictures. "
            "model.folder takes a `UNet2DModel` of pictures, alone or in a pipeline; "
            "base.folder takes a StableDiffusionPipeline."
        )


def _settings(folder: epath.Path, form: Format) -> dict:
    """Returns config.json, and a ValueError names its class if that is another."""
    settings = read_json(folder / CONFIG)
    name = settings.get("_class_name", form.class_name)
    one_of(f"{folder / CONFIG}: _class_name", name, (form.class_name,))
    return settings


def from_diffusers(
    folder: epath.PathLike,
    network: type[nn.Module] = UNet2D,
    dtype: jnp.dtype | None = jnp.float32,
) -> tuple[nn.Module, dict]:
    """Returns the network in a folder of diffusers and its parameters.

    The folder has config.json and diffusion_pytorch_model.safetensors (or shards of it,
    with their index). It may be that of a pipeline, whose folder `unet` or `vae` is
    then taken.

    Args:
      network: UNet2D, UNet2DCondition or AutoencoderKL.
      dtype: the type of the parameters; None leaves each as it is in the folder.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the network does not have a field or value of config.json; a tensor is
        missing, left over, misshapen or not of floating point; or a file is damaged or
        a pickle.
    """
    one_of("network", network, FORMATS)
    form = FORMATS[network]
    folder = model_folder(folder, form.part)
    settings = _settings(folder, form)
    tensors = current(read_weights(folder, STEM))
    model = network(form.config(settings, tensors))
    params = to_params(parameter_shapes(model), tensors, folder, dtype=dtype)
    return model, jax.device_put(params)


def to_diffusers(model: nn.Module, params: dict, folder: epath.PathLike) -> None:
    """Writes a folder that `from_pretrained` of diffusers' class loads.

    The folder is made if it is missing. Its config.json and
    diffusion_pytorch_model.safetensors are replaced, each in one step.
    """
    instance("model", model, *FORMATS)
    form = FORMATS[type(model)]
    settings = {"_class_name": form.class_name, **dataclasses.asdict(model.config)}
    if isinstance(model, UNet2D):
        del settings["folder"], settings["variance"]
        normalize = settings.pop("mid_attention_norm")
        groups = model.config.norm_num_groups if normalize else None
        settings["attn_norm_num_groups"] = groups
    write_tensors(at(folder) / WEIGHTS, to_tensors(params))
    write_json(at(folder) / CONFIG, settings)
