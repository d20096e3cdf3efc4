"""The denoising network: a UNet that computes what diffusers' `UNet2DModel` computes.

Submodules have diffusers' names: its tensor `down_blocks.0.resnets.1.conv1.weight` is
the parameter `down_blocks_0/resnets_1/conv1/kernel`. Images are [B, H, W, C]. Numbers
are float32; `jax_default_matmul_precision` decides the precision of convolutions and
matrix products.
"""

import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.models.config import ModelConfig


def norm(name, x, config):
    """Returns x normalised in groups, by a submodule of the calling module."""
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nn.GroupNorm(
        config.norm_num_groups,
        epsilon=config.norm_eps,
        use_fast_variance=False,
        name=name,
    )(x)


class TimeEmbedding(nn.Module):
    """Maps t [B] to [B, 4 * block_out_channels[0]], by sinusoids and linear layers."""

    config: ModelConfig

    @nn.compact
    def __call__(self, t):
        width = self.config.block_out_channels[0]
        half = width // 2
        # The frequencies are rounded as in PyTorch, and on the host, since t multiplies
        # their errors by up to a thousand.
        exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
        exponents /= np.float32(half - self.config.freq_shift)
        frequencies = np.exp(exponents, dtype=np.float64).astype(np.float32)
        angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
        waves = [jnp.sin(angles), jnp.cos(angles)]
        if self.config.flip_sin_to_cos:
            waves.reverse()
        h = jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, width % 2)))
        h = nn.silu(nn.Dense(4 * width, name="linear_1")(h))
        return nn.Dense(4 * width, name="linear_2")(h)


class Dropout(nn.Module):
    """Sets a share `rate` of every example's entries to 0 and scales up the rest.

    An example's mask is a function of its key in `keys` [B] and of this module's path
    alone, so that it does not depend on the batch or on the devices. Nothing is dropped
    where `keys` is None.
    """

    rate: float

    @nn.compact
    def __call__(self, x, keys):
        if keys is None or self.rate == 0:
            return x
        keep_rate = 1 - self.rate
        module = zlib.crc32("/".join(self.path).encode())

        def draw(key):
            key = jax.random.fold_in(key, module)
            return jax.random.bernoulli(key, keep_rate, x.shape[1:])

        return jnp.where(jax.vmap(draw)(keys), x / keep_rate, 0.0)


class ResBlock(nn.Module):
    """Adds to x two convolutions of it, the second one conditioned on the time."""

    config: ModelConfig
    features: int
    scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x, temb, keys):
        features = self.features
        h = nn.silu(norm("norm1", x, self.config))
        h = nn.Conv(features, (3, 3), name="conv1")(h)
        scale_shift = self.config.resnet_time_scale_shift == "scale_shift"
        project = nn.Dense(features * (1 + scale_shift), name="time_emb_proj")
        temb = project(nn.silu(temb))[:, None, None, :]
        if scale_shift:
            scale, shift = jnp.split(temb, 2, axis=-1)
            h = norm("norm2", h, self.config) * (1 + scale) + shift
        else:
            h = norm("norm2", h + temb, self.config)
        h = Dropout(self.config.dropout)(nn.silu(h), keys)
        h = nn.Conv(features, (3, 3), name="conv2")(h)
        if x.shape[-1] != features:
            x = nn.Conv(features, (1, 1), name="conv_shortcut")(x)
        return (x + h) / self.scale_factor


class Attention(nn.Module):
    """Adds to x its self-attention over the pixels."""

    config: ModelConfig
    normalize: bool = True
    scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        head_dim = self.config.attention_head_dim or channels
        h = norm("group_norm", x, self.config) if self.normalize else x
        h = h.reshape(batch, height * width, channels)
        q, k, v = (
            nn.Dense(channels, name=name)(h).reshape(*h.shape[:2], -1, head_dim)
            for name in ("to_q", "to_k", "to_v")
        )
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim))
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(h.shape)
        h = nn.Dense(channels, name="to_out_0")(h)
        return (x + h.reshape(x.shape)) / self.scale_factor


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        padding = 2 * [(self.config.downsample_padding, 1)]
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=padding, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by nearest neighbours and a convolution."""

    @nn.compact
    def __call__(self, x):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return nn.Conv(x.shape[-1], (3, 3), name="conv")(x)


class Down(nn.Module):
    """Computes a level of the way down; returns its output and the skips."""

    config: ModelConfig
    features: int
    attention: bool
    last: bool

    @nn.compact
    def __call__(self, x, temb, keys):
        skips = []
        for i in range(self.config.layers_per_block):
            x = ResBlock(self.config, self.features, name=f"resnets_{i}")(x, temb, keys)
            if self.attention:
                x = Attention(self.config, name=f"attentions_{i}")(x)
            skips.append(x)
        if not self.last:
            x = Downsample(self.config, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class Mid(nn.Module):
    """Computes the lowest level: two residual blocks, with attention between them."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, temb, keys):
        scale = self.config.mid_block_scale_factor
        features = x.shape[-1]
        x = ResBlock(self.config, features, scale, name="resnets_0")(x, temb, keys)
        if self.config.add_attention:
            normalize = self.config.mid_attention_norm
            x = Attention(self.config, normalize, scale, name="attentions_0")(x)
        return ResBlock(self.config, features, scale, name="resnets_1")(x, temb, keys)


class Up(nn.Module):
    """Computes a level of the way up, which takes the last of `skips` first."""

    config: ModelConfig
    features: int
    attention: bool
    last: bool

    @nn.compact
    def __call__(self, x, skips, temb, keys):
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = ResBlock(self.config, self.features, name=f"resnets_{i}")(x, temb, keys)
            if self.attention:
                x = Attention(self.config, name=f"attentions_{i}")(x)
        if not self.last:
            x = Upsample(name="upsamplers_0")(x)
        return x


class UNet2D(nn.Module):
    """The network of diffusers' `UNet2DModel` (Ho et al. 2020, arXiv 2006.11239).

    `module.apply({"params": params}, x, t)` takes images x [B, H, W, in_channels] in
    [-1, 1] and integer timesteps t [B], and returns the prediction
    [B, H, W, out_channels]. With random `keys` [B], one for each example, dropout is
    on. Parameters come from `models.init` or `from_diffusers`; those of flax's
    `module.init` have flax's distribution. Other shapes are a ValueError.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        config = self.config
        channels = config.block_out_channels
        last = len(channels) - 1
        wrong = x.ndim != 4 or x.shape[-1] != config.in_channels
        if wrong or t.shape != x.shape[:1] or any(n % 2**last for n in x.shape[1:3]):
            raise ValueError(
                f"x has shape {x.shape} and t has shape {t.shape}; they must be "
                f"[B, H, W, {config.in_channels}] and [B], H and W multiples of "
                f"{2**last}."
            )
        if config.center_input_sample:
            x = 2 * x - 1
        temb = TimeEmbedding(config, name="time_embedding")(t)
        x = nn.Conv(channels[0], (3, 3), name="conv_in")(x)
        skips = [x]
        for i, kind in enumerate(config.down_block_types):
            attention = kind == "AttnDownBlock2D"
            down = Down(
                config, channels[i], attention, i == last, name=f"down_blocks_{i}"
            )
            x, level_skips = down(x, temb, keys)
            skips += level_skips
        x = Mid(config, name="mid_block")(x, temb, keys)
        for i, kind in enumerate(config.up_block_types):
            attention = kind == "AttnUpBlock2D"
            split = len(skips) - (config.layers_per_block + 1)
            up = Up(
                config, channels[last - i], attention, i == last, name=f"up_blocks_{i}"
            )
            x = up(x, skips[split:], temb, keys)
            skips = skips[:split]
        x = nn.silu(norm("conv_norm_out", x, config))
        return nn.Conv(config.out_channels, (3, 3), name="conv_out")(x)
