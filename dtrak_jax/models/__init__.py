"""Networks: UNets, the autoencoder and CLIP, and their files in others' formats."""

from dtrak_jax.models.autoencoder import AutoencoderKL
from dtrak_jax.models.clip import CLIPText, CLIPVision
from dtrak_jax.models.clip_folder import from_transformers, to_transformers
from dtrak_jax.models.clip_images import CLIPImages
from dtrak_jax.models.conditional_unet import UNet2DCondition
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
from dtrak_jax.models.stable_diffusion import (
    INDEX,
    PARTS,
    StableDiffusion,
    from_stable_diffusion,
    read_part,
    resolve_stable_diffusion,
    to_stable_diffusion,
)
from dtrak_jax.models.tokenizer import Tokenizer
from dtrak_jax.models.unet import UNet2D

__all__ = [
    "INDEX",
    "PARTS",
    "AutoencoderKL",
    "CLIPImages",
    "CLIPText",
    "CLIPVision",
    "ModelConfig",
    "StableDiffusion",
    "Tokenizer",
    "UNet2D",
    "UNet2DCondition",
    "apply_fn",
    "bottleneck_fn",
    "build",
    "from_diffusers",
    "from_stable_diffusion",
    "from_transformers",
    "init",
    "init_fn",
    "parameter_count",
    "read_part",
    "resolve",
    "resolve_stable_diffusion",
    "to_diffusers",
    "to_stable_diffusion",
    "to_transformers",
    "train_apply_fn",
]
