"""Blocks that the UNets and the autoencoder share, under the names of diffusers.

Submodules have diffusers' names: its tensor `down_blocks.0.resnets.1.conv1.weight` is
the parameter `down_blocks_0/resnets_1/conv1/kernel`. Images are [B, H, W, C]. A block
reads the fields of `config` that it needs; they mean the same in every configuration.

A network computes in the type of its parameters, but for means, variances and softmax,
which are float32; `jax_default_matmul_precision` decides the precision of convolutions
and matrix products. The time embedding is `temb` [B, D], None in the autoencoder. With
random `keys` [B], one for each example, dropout is on.
"""

import math
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.rng import bernoulli, fold_in

Attend = Callable[[str, jax.Array], jax.Array]
"""A function (name, x) -> x that makes a submodule of attention and applies it."""


def norm(name, x, config, epsilon=None):
    """Returns x normalised in groups, by a submodule of the calling module."""
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nn.GroupNorm(
        config.norm_num_groups,
        epsilon=epsilon or config.norm_eps,
        use_fast_variance=False,
        name=name,
    )(x)


def param_type(module: nn.Module, name: str = "conv_in") -> jnp.dtype:
    """Returns the type of a module's parameters, which is that of a submodule's."""
    params = module.variables.get("params", {})
    return params[name]["kernel"].dtype if name in params else jnp.float32


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """Maps [B, S, C] to [B, S, heads, head_dim]."""
    return x.reshape(*x.shape[:2], -1, head_dim)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(d)) v [B, Q, C] of q [B, Q, heads, d], k and v.

    A causal query sees no key after its own position.
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    if causal:
        seen = np.tri(q.shape[1], dtype=bool)[None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
    weights = nn.softmax(logits / math.sqrt(q.shape[-1])).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)


class TimeEmbedding(nn.Module):
    """Maps t [B] to [B, 4 * block_out_channels[0]], by sinusoids and linear layers."""

    config: Any
    dtype: jnp.dtype = jnp.float32

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
        h = nn.silu(nn.Dense(4 * width, name="linear_1")(h.astype(self.dtype)))
        return nn.Dense(4 * width, name="linear_2")(h)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, name: str) -> jax.Array:
    """Sets a share `rate` of every example's entries to 0 and scales up the rest.

    An example's mask is a function of its key in `keys` [B] and of the name alone, so
    that it does not depend on the batch or on the devices. Nothing is dropped where
    `keys` is None.
    """
    if keys is None or rate == 0:
        return x
    keep_rate = 1 - rate

    def draw(key):
        key = fold_in(key, zlib.crc32(name.encode()))
        return bernoulli(key, keep_rate, x.shape[1:])

    return jnp.where(jax.vmap(draw)(keys), x / keep_rate, 0.0)


class Dropout(nn.Module):
    """Applies `dropout` by the name that is this module's path."""

    rate: float

    @nn.compact
    def __call__(self, x, keys):
        return dropout(x, self.rate, keys, "/".join(self.path))


class ResBlock(nn.Module):
    """Adds to x two convolutions of it, the second one conditioned on the time."""

    config: Any
    features: int
    scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x, temb=None, keys=None):
        features = self.features
        h = nn.silu(norm("norm1", x, self.config))
        h = nn.Conv(features, (3, 3), name="conv1")(h)
        if temb is None:
            h = norm("norm2", h, self.config)
        else:
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

    config: Any
    normalize: bool = True
    scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        h = norm("group_norm", x, self.config) if self.normalize else x
        h = h.reshape(batch, height * width, channels)
        head_dim = self.config.attention_head_dim or channels
        q, k, v = (
            split_heads(nn.Dense(channels, name=f"to_{name}")(h), head_dim)
            for name in "qkv"
        )
        h = nn.Dense(channels, name="to_out_0")(attention(q, k, v))
        return (x + h.reshape(x.shape)) / self.scale_factor


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2."""

    config: Any

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

    config: Any
    features: int
    layers: int
    attend: Attend | None
    last: bool

    @nn.compact
    def __call__(self, x, temb=None, keys=None):
        skips = []
        for i in range(self.layers):
            x = ResBlock(self.config, self.features, name=f"resnets_{i}")(x, temb, keys)
            if self.attend:
                x = self.attend(f"attentions_{i}", x)
            skips.append(x)
        if not self.last:
            x = Downsample(self.config, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class Mid(nn.Module):
    """Computes the lowest level: two residual blocks, with attention between them."""

    config: Any
    attend: Attend | None

    @nn.compact
    def __call__(self, x, temb=None, keys=None):
        scale = self.config.mid_block_scale_factor
        features = x.shape[-1]
        x = ResBlock(self.config, features, scale, name="resnets_0")(x, temb, keys)
        if self.attend:
            x = self.attend("attentions_0", x)
        return ResBlock(self.config, features, scale, name="resnets_1")(x, temb, keys)


class Up(nn.Module):
    """Computes a level of the way up, with a layer for each of `skips`, the last first.

    A skip of None adds nothing to its layer.
    """

    config: Any
    features: int
    attend: Attend | None
    last: bool

    @nn.compact
    def __call__(self, x, skips, temb=None, keys=None):
        for i, skip in enumerate(reversed(skips)):
            if skip is not None:
                x = jnp.concatenate([x, skip], axis=-1)
            x = ResBlock(self.config, self.features, name=f"resnets_{i}")(x, temb, keys)
            if self.attend:
                x = self.attend(f"attentions_{i}", x)
        if not self.last:
            x = Upsample(name="upsamplers_0")(x)
        return x


def unet(
    module: nn.Module,
    x: jax.Array,
    t: jax.Array,
    keys: jax.Array | None,
    attends: tuple[list[Attend | None], Attend | None, list[Attend | None]],
    added: jax.Array | None = None,
) -> jax.Array:
    """Returns the prediction of a UNet, which is the calling module.

    Args:
      attends: the attention of each level on the way down, of the lowest level, and of
        each on the way up; None where a level has none.
      added: what is added to the embedding of time [B, D], if anything.

    Raises:
      ValueError: x or t does not have the shape that the configuration calls for; another
        height or width than it names is a warning.
    """
    config = module.config
    channels = config.block_out_channels
    last = len(channels) - 1
    wrong = x.ndim != 4 or x.shape[-1] != config.in_channels
    if wrong or t.shape != x.shape[:1] or any(n % 2**last for n in x.shape[1:3]):
        raise ValueError(
            f"x has shape {x.shape} and t has shape {t.shape}; they must be "
            f"[B, H, W, {config.in_channels}] and [B], H and W multiples of {2**last}."
        )
    size = config.sample_size
    if size is not None and x.shape[1:3] != (size, size):
        height, width = x.shape[1:3]
        warnings.warn(
            f"x has {height}x{width} pixels, and the network was made for {size}x{size} "
            "(sample_size): it computes, but knows nothing of this size.",
            stacklevel=2,
        )
    dtype = param_type(module)
    if config.center_input_sample:
        x = 2 * x - 1
    down, mid, up = attends
    temb = TimeEmbedding(config, dtype, name="time_embedding")(t)
    temb = temb if added is None else temb + added
    x = nn.Conv(channels[0], (3, 3), name="conv_in")(x.astype(dtype))
    skips = [x]
    layers = per_level(config, "layers_per_block")
    for i in range(last + 1):
        block = Down(
            config, channels[i], layers[i], down[i], i == last, name=f"down_blocks_{i}"
        )
        x, level_skips = block(x, temb, keys)
        skips += level_skips
    x = Mid(config, mid, name="mid_block")(x, temb, keys)
    for i in range(last + 1):
        level = last - i
        split = len(skips) - (layers[level] + 1)
        block = Up(config, channels[level], up[i], i == last, name=f"up_blocks_{i}")
        x = block(x, skips[split:], temb, keys)
        skips = skips[:split]
    x = nn.silu(norm("conv_norm_out", x, config))
    x = nn.Conv(config.out_channels, (3, 3), name="conv_out")(x)
    return x.astype(jnp.float32)


def per_level(config: Any, name: str) -> tuple[int, ...]:
    """Returns a field of a configuration that may be one integer for all levels."""
    value = getattr(config, name)
    return (
        value if isinstance(value, tuple) else (value,) * len(config.down_block_types)
    )
