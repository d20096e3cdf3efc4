"""Diffusion models: the UNet of the paper, and its checkpoints."""

from dtrak_jax.models.convert import from_diffusers, to_diffusers
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
    "UNet2D",
    "apply_fn",
    "bottleneck_fn",
    "build",
    "from_diffusers",
    "init",
    "init_fn",
    "parameter_count",
    "to_diffusers",
    "train_apply_fn",
]
