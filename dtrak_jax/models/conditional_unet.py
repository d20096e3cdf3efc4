"""The network of diffusers' `UNet2DConditionModel`, as in Stable Diffusion 1 and 2."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtrak_jax.checks import at_least, one_of
from dtrak_jax.models.blocks import (
    Attend,
    attention,
    norm,
    param_type,
    per_level,
    split_heads,
    unet,
)
from dtrak_jax.models.config import check_network, known_fields

DownBlock = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "CrossAttnUpBlock2D"]

LEVEL_FIELDS = (
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
)
"""Fields that are one integer, or one for each level on the way down."""

_NONE = """
addition_embed_type addition_time_embed_dim class_embed_type cross_attention_norm
encoder_hid_dim encoder_hid_dim_type num_attention_heads num_class_embeds
projection_class_embeddings_input_dim reverse_transformer_layers_per_block
time_cond_proj_dim time_embedding_act_fn timestep_post_act
"""
FIXED = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dual_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "time_embedding_type": ("positional",),
    **dict.fromkeys(_NONE.split(), (None,)),
}
"""Fields of diffusers that this UNet does not have, and the values that it implies."""

IGNORED = ("time_embedding_dim", "upcast_attention", "addition_embed_type_num_heads")
"""Fields without effect, as softmax is float32 anyway; or checked by themselves."""


@dataclass(frozen=True, kw_only=True)
class ConditionalConfig:
    """A `UNet2DConditionModel`, in diffusers' field names and with its defaults."""

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    down_block_types: tuple[DownBlock, ...] = (
        *3 * ("CrossAttnDownBlock2D",),
        "DownBlock2D",
    )
    up_block_types: tuple[UpBlock, ...] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",))
    attention_head_dim: int | tuple[int, ...] = 8
    """The number of heads, in spite of its name."""
    transformer_layers_per_block: int | tuple[int, ...] = 1
    cross_attention_dim: int = 1280
    """The channels of the context."""
    use_linear_projection: bool = False
    """Project by matrix products, before and after a transformer, or by 1x1 convolutions."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    flip_sin_to_cos: bool = True
    freq_shift: Literal[0, 1] = 0
    downsample_padding: Literal[0, 1] = 1
    center_input_sample: bool = False
    mid_block_scale_factor: float = 1.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self):
        section = "UNet2DConditionModel"
        check_network(section, self)
        at_least(f"{section}.cross_attention_dim", self.cross_attention_dim, 1)
        if self.sample_size is not None:
            at_least(f"{section}.sample_size", self.sample_size, 1)
        levels = len(self.block_out_channels)
        for name in LEVEL_FIELDS:
            values = per_level(self, name)
            for value in values:
                at_least(f"{section}.{name}", value, 1)
            if len(values) != levels:
                raise ValueError(
                    f"{section}.{name} is {values}; it must be one integer or {levels}, "
                    "one for each level."
                )
        heads = per_level(self, "attention_head_dim")
        for channels, number in zip(self.block_out_channels, heads):
            if channels % number:
                raise ValueError(
                    f"{section}.attention_head_dim has {number}, the number of heads, "
                    f"which does not divide {channels} of block_out_channels."
                )


def conditional_config(
    settings: Mapping, tensors: Collection[str] = ()
) -> ConditionalConfig:
    """Returns the settings that a config.json describes.

    Raises:
      ValueError: this UNet does not have a field or its value.
    """
    names = {field.name for field in dataclasses.fields(ConditionalConfig)}
    config = ConditionalConfig(**known_fields(settings, names, FIXED, IGNORED))
    name, width = "time_embedding_dim", 4 * config.block_out_channels[0]
    one_of(f"config.json: {name}", settings.get(name), (None, width))
    return config


class CrossAttention(nn.Module):
    """Maps x [B, Q, C] to its attention over a context [B, K, D], by heads."""

    heads: int

    @nn.compact
    def __call__(self, x, context):
        channels = x.shape[-1]

        def project(name, inputs):
            h = nn.Dense(channels, use_bias=False, name=name)(inputs)
            return split_heads(h, channels // self.heads)

        q = project("to_q", x)
        k, v = project("to_k", context), project("to_v", context)
        return nn.Dense(channels, name="to_out_0")(attention(q, k, v))


class GatedLinear(nn.Module):
    """Maps x to a * gelu(b), where a and b are linear in x (Shazeer 2020, GEGLU)."""

    features: int

    @nn.compact
    def __call__(self, x):
        a, b = jnp.split(nn.Dense(2 * self.features, name="proj")(x), 2, axis=-1)
        return a * nn.gelu(b, approximate=False)


class FeedForward(nn.Module):
    """Maps every position of x by itself."""

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        return nn.Dense(channels, name="net_2")(
            GatedLinear(4 * channels, name="net_0")(x)
        )


class TransformerBlock(nn.Module):
    """Adds to x its self-attention, its attention over the context, and a map of it."""

    heads: int

    @nn.compact
    def __call__(self, x, context):
        def normalized(name, x):
            return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)

        h = normalized("norm1", x)
        x = x + CrossAttention(self.heads, name="attn1")(h, h)
        h = normalized("norm2", x)
        x = x + CrossAttention(self.heads, name="attn2")(h, context)
        return x + FeedForward(name="ff")(normalized("norm3", x))


class Transformer(nn.Module):
    """Adds to an image what transformer blocks make of its pixels and the context."""

    config: ConditionalConfig
    heads: int
    layers: int

    @nn.compact
    def __call__(self, x, context):
        batch, height, width, channels = x.shape

        def project(name, x):
            if self.config.use_linear_projection:
                return nn.Dense(channels, name=name)(x)
            return nn.Conv(channels, (1, 1), name=name)(x)

        h = project("proj_in", norm("norm", x, self.config, epsilon=1e-6))
        h = h.reshape(batch, height * width, channels)
        for i in range(self.layers):
            h = TransformerBlock(self.heads, name=f"transformer_blocks_{i}")(h, context)
        return x + project("proj_out", h.reshape(x.shape))


class UNet2DCondition(nn.Module):
    """The network of diffusers' `UNet2DConditionModel` (Rombach et al. 2022).

    `module.apply({"params": params}, x, t, context)` takes latents x
    [B, H, W, in_channels], integer timesteps t [B] and text embeddings
    [B, S, cross_attention_dim], and returns the prediction [B, H, W, out_channels],
    float32. With random `keys` [B], one for each example, dropout is on. Other shapes
    are a ValueError.
    """

    config: ConditionalConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        shape = getattr(context, "shape", None)
        width = config.cross_attention_dim
        if shape is None or len(shape) != 3 or shape[::2] != (len(x), width):
            raise ValueError(
                f"the condition has shape {shape}; it must be text embeddings of shape "
                f"[{len(x)}, S, {width}], with a row for each of x."
            )
        context = context.astype(param_type(self))

        def transformer(level) -> Attend:
            heads = per_level(config, "attention_head_dim")[level]
            layers = per_level(config, "transformer_layers_per_block")[level]

            def attend(name, x):
                return Transformer(config, heads, layers, name=name)(x, context)

            return attend

        levels = range(len(config.block_out_channels))
        kinds = zip(config.down_block_types, levels)
        down = [transformer(i) if "Attn" in kind else None for kind, i in kinds]
        kinds = zip(config.up_block_types, reversed(levels))
        up = [transformer(i) if "Attn" in kind else None for kind, i in kinds]
        return unet(self, x, t, keys, (down, transformer(-1), up))

    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of (x, t, context) for one example."""
        config = self.config
        size = config.sample_size or 2 ** len(config.block_out_channels)
        x = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        return x, t, jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), x.dtype)
