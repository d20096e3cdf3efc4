"""Diffusion models: the UNet of the paper, and its files in the format of diffusers."""

from dtrak_jax.models.config import ModelConfig
from dtrak_jax.models.convert import from_diffusers, resolve, to_diffusers
from dtrak_jax.models.functions import (
    apply_fn,
    bottleneck_fn,
    build,
    init,
    init_fn,
    parameter_count,
    train_apply_fn,
)
from dtrak_jax.models.unet import UNet2D

__all__ = [
    "ModelConfig",
    "UNet2D",
    "apply_fn",
    "bottleneck_fn",
    "build",
    "from_diffusers",
    "init",
    "init_fn",
    "parameter_count",
    "resolve",
    "to_diffusers",
    "train_apply_fn",
]
