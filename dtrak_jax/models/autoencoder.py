"""The network of diffusers' `AutoencoderKL`, which maps images to latents and back."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtrak_jax.checks import at_least, positive
from dtrak_jax.models.blocks import Attention, Down, Mid, Up, norm, param_type
from dtrak_jax.models.config import check_network, known_fields

FIXED = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None,),
}
"""Fields of diffusers that this autoencoder does not have, and what it implies."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """An `AutoencoderKL`, in diffusers' field names and with its defaults."""

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = (
        "DownEncoderBlock2D",
    )
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    """A diffusion model works on latents times this factor."""
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    # What the blocks ask for and all autoencoders have in common.
    attention_head_dim: ClassVar[None] = None
    downsample_padding: ClassVar[int] = 0
    dropout: ClassVar[float] = 0.0
    freq_shift: ClassVar[int] = 0
    mid_block_scale_factor: ClassVar[float] = 1.0
    norm_eps: ClassVar[float] = 1e-6

    def __post_init__(self):
        section = "AutoencoderKL"
        check_network(section, self)
        for name in ("sample_size", "latent_channels", "layers_per_block"):
            at_least(f"{section}.{name}", getattr(self, name), 1)
        positive(f"{section}.scaling_factor", self.scaling_factor)

    @property
    def factor(self) -> int:
        """The height of an image, divided by that of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)


def autoencoder_config(
    settings: Mapping, tensors: Collection[str] = ()
) -> AutoencoderConfig:
    """Returns the settings that a config.json describes.

    Raises:
      ValueError: this autoencoder does not have a field or its value.
    """
    names = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    # The type of the parameters decides whether numbers are float32.
    fields = known_fields(settings, names, FIXED, ignored=("force_upcast",))
    return AutoencoderConfig(**fields)


def middle(x: jax.Array, config: AutoencoderConfig) -> jax.Array:
    """Returns what the lowest level makes of x, a submodule of the calling module."""

    def attend(name, x):
        return Attention(config, name=name)(x)

    attend = attend if config.mid_block_add_attention else None
    return Mid(config, attend, name="mid_block")(x)


def conv(features: int, name: str) -> nn.Conv:
    """Returns a 3x3 convolution, a submodule of the calling module."""
    return nn.Conv(features, (3, 3), name=name)


class Encoder(nn.Module):
    """Maps images [B, H, W, C] to [B, H / factor, W / factor, 2 * latent_channels]."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        channels, layers = config.block_out_channels, config.layers_per_block
        x = conv(channels[0], "conv_in")(x.astype(param_type(self)))
        for i, width in enumerate(channels):
            last = i == len(channels) - 1
            x, _ = Down(config, width, layers, None, last, name=f"down_blocks_{i}")(x)
        x = nn.silu(norm("conv_norm_out", middle(x, config), config))
        return conv(2 * config.latent_channels, "conv_out")(x)


class Decoder(nn.Module):
    """Maps latents to images."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, z):
        config = self.config
        channels = config.block_out_channels[::-1]
        x = middle(conv(channels[0], "conv_in")(z.astype(param_type(self))), config)
        no_skips = (config.layers_per_block + 1) * (None,)
        for i, width in enumerate(channels):
            last = i == len(channels) - 1
            x = Up(config, width, None, last, name=f"up_blocks_{i}")(x, no_skips)
        x = nn.silu(norm("conv_norm_out", x, config))
        return conv(config.out_channels, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """The network of diffusers' `AutoencoderKL` (Rombach et al. 2022, arXiv 2112.10752).

    `module.apply({"params": params}, x, method="encode")` takes images x
    [B, H, W, in_channels] in [-1, 1] and returns the mean and the logarithm of the
    variance of their latents [B, H / f, W / f, latent_channels], f = config.factor;
    method "decode" takes latents and returns images. Neither applies
    `config.scaling_factor`. Both return float32; other shapes are a ValueError.
    """

    config: AutoencoderConfig

    def setup(self):
        config = self.config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1))
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1))

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        self._check(x, self.config.in_channels, self.config.factor)
        h = self.encoder(x)
        if self.config.use_quant_conv:
            h = self.quant_conv(h)
        mean, log_variance = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    def decode(self, z: jax.Array) -> jax.Array:
        self._check(z, self.config.latent_channels, 1)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z.astype(param_type(self, "post_quant_conv")))
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the images that the means of the latents of x decode to."""
        return self.decode(self.encode(x)[0])

    def _check(self, x, channels, factor):
        if (
            x.ndim != 4
            or x.shape[-1] != channels
            or any(n % factor for n in x.shape[1:3])
        ):
            raise ValueError(
                f"an autoencoder is given an array of shape {x.shape}; it must be "
                f"[B, H, W, {channels}], H and W multiples of {factor}."
            )

    def inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Returns the shape of x for one example."""
        size, channels = self.config.factor, self.config.in_channels
        return (jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),)
