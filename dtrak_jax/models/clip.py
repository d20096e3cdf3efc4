"""CLIP's text and vision networks, as transformers computes them.

Submodules have transformers' names below `text_model` and `vision_model`: the tensor
text_model.encoder.layers.0.mlp.fc1.weight is the parameter
`encoder/layers_0/mlp/fc1/kernel` (Radford et al. 2021, arXiv 2103.00020). Numbers are
of the parameters' type, norms and softmax float32, and so are the outputs.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtrak_jax.checks import at_least, check_choices, positive
from dtrak_jax.models.blocks import attention, split_heads

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": functools.partial(nn.gelu, approximate=False),
}
"""The activations of OpenAI's models, and of Stable Diffusion 2 and LAION's."""


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """A text network, in the field names of transformers' `CLIPTextConfig`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    """The token whose state stands for the text. 2, in older files, means that this is
    the token with the highest number."""
    projection_dim: int | None = None
    """The size of `text_embeds`, which are left out if this is None."""

    def __post_init__(self):
        _check("text_model", self)


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """A vision network, in the field names of transformers' `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self):
        _check("vision_model", self)
        if self.patch_size > self.image_size:
            raise ValueError(
                f"vision_model.patch_size is {self.patch_size}; it must be at most "
                f"image_size, {self.image_size}."
            )


def _check(section: str, config: CLIPTextConfig | CLIPVisionConfig) -> None:
    """Raises a ValueError that names a field whose value no network has."""
    check_choices(section, config)
    for name, value in vars(config).items():
        if name == "layer_norm_eps":
            positive(f"{section}.{name}", value)
        elif name not in ("hidden_act", "eos_token_id") and (
            name != "projection_dim" or value is not None
        ):
            at_least(f"{section}.{name}", value, int(name != "num_hidden_layers"))
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{section}.num_attention_heads is {config.num_attention_heads}; it must "
            f"divide hidden_size, {config.hidden_size}."
        )


def norm(name, x, config):
    """Returns x normalised over its last axis, by a submodule of the calling module."""
    layer = nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)
    return layer(x)


class SelfAttention(nn.Module):
    """Attends from every token to all, or to itself and those before it."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool

    @nn.compact
    def __call__(self, x):
        head_dim = x.shape[-1] // self.config.num_attention_heads
        q, k, v = (
            split_heads(nn.Dense(x.shape[-1], name=f"{letter}_proj")(x), head_dim)
            for letter in "qkv"
        )
        h = attention(q, k, v, self.causal)
        return nn.Dense(x.shape[-1], name="out_proj")(h)


class MLP(nn.Module):
    """Two linear layers with the activation between them."""

    config: CLIPTextConfig | CLIPVisionConfig

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.config.intermediate_size, name="fc1")(x)
        return nn.Dense(x.shape[-1], name="fc2")(ACTIVATIONS[self.config.hidden_act](h))


class Layer(nn.Module):
    """Adds to x its attention, and then its MLP, each of normalised input."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool

    @nn.compact
    def __call__(self, x):
        attention = SelfAttention(self.config, self.causal, name="self_attn")
        x = x + attention(norm("layer_norm1", x, self.config))
        return x + MLP(self.config, name="mlp")(norm("layer_norm2", x, self.config))


class Encoder(nn.Module):
    """Returns the states before the first layer and after each: L + 1 of [B, S, D]."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool

    @nn.compact
    def __call__(self, x):
        states = [x]
        for i in range(self.config.num_hidden_layers):
            layer = Layer(self.config, self.causal, name=f"layers_{i}")
            states.append(layer(states[-1]))
        return states


class TextEmbeddings(nn.Module):
    """Adds a vector of each token and one of its position."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, ids):
        table = functools.partial(
            nn.Embed,
            features=self.config.hidden_size,
            embedding_init=nn.initializers.normal(0.02),
        )
        tokens = table(self.config.vocab_size, name="token_embedding")
        length = self.config.max_position_embeddings
        positions = table(length, name="position_embedding")
        return tokens(ids) + positions(jnp.arange(ids.shape[1]))[None]


class VisionEmbeddings(nn.Module):
    """Returns a class token and then a token for each patch, [B, 1 + patches, D]."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels):
        config = self.config
        width, patch = config.hidden_size, 2 * (config.patch_size,)
        first = self.param("class_embedding", nn.initializers.normal(), (width,))
        convolve = nn.Conv(
            width, patch, patch, "VALID", use_bias=False, name="patch_embedding"
        )
        h = convolve(pixels.astype(first.dtype)).reshape(len(pixels), -1, width)
        h = jnp.concatenate([jnp.broadcast_to(first, (len(h), 1, width)), h], axis=1)
        positions = nn.Embed(h.shape[1], width, name="position_embedding")
        return h + positions(jnp.arange(h.shape[1]))[None]


class TextOutput(NamedTuple):
    """The outputs of the text network for ids [B, S], all float32."""

    last: jax.Array
    """The final norm of the last layer's states, [B, S, D]: the context of Stable
    Diffusion."""
    states: list[jax.Array]
    """The states before the first layer and after each, without that norm."""
    pooled: jax.Array
    """`last` at the first end of the text, [B, D]."""
    embeds: jax.Array | None
    """The projection of `pooled`, [B, P], of networks that have one."""


class CLIPText(nn.Module):
    """The network of transformers' `CLIPTextModel`, with or without projection.

    `module.apply({"params": params}, ids)` takes tokens' ids [B, S], where S is at most
    `max_position_embeddings`, and returns a `TextOutput`. Each token sees itself and
    those before it. Other shapes are a ValueError; ids must be below `vocab_size`.
    """

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> TextOutput:
        config = self.config
        if ids.ndim != 2 or ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"ids have shape {ids.shape}; it must be [B, S] with S at most "
                f"{config.max_position_embeddings}."
            )
        states = Encoder(config, causal=True, name="encoder")(
            TextEmbeddings(config, name="embeddings")(ids)
        )
        last = norm("final_layer_norm", states[-1], config)
        ends = ids if config.eos_token_id == 2 else ids == config.eos_token_id
        pooled = last[jnp.arange(len(ids)), ends.argmax(axis=1)]
        embeds = None
        if config.projection_dim is not None:
            project = nn.Dense(
                config.projection_dim, use_bias=False, name="text_projection"
            )
            embeds = project(pooled)
        return jax.tree.map(
            lambda output: output.astype(jnp.float32),
            TextOutput(last, states, pooled, embeds),
        )

    def inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Returns the shape of ids for one text."""
        return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


class CLIPVision(nn.Module):
    """The network of transformers' `CLIPVisionModelWithProjection`.

    `module.apply({"params": params}, pixels)` takes normalised pixels
    [B, image_size, image_size, num_channels] (see `CLIPImages`) and returns their
    embeddings [B, projection_dim], float32. Other shapes are a ValueError.
    """

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        config = self.config
        shape = (*2 * (config.image_size,), config.num_channels)
        if pixels.ndim != 4 or pixels.shape[1:] != shape:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"pixels have shape {pixels.shape}, not [B, {sizes}].")
        h = VisionEmbeddings(config, name="embeddings")(pixels)
        h = norm("pre_layrnorm", h, config)
        h = Encoder(config, causal=False, name="encoder")(h)[-1]
        h = norm("post_layernorm", h[:, 0], config)
        project = nn.Dense(
            config.projection_dim, use_bias=False, name="visual_projection"
        )
        return project(h).astype(jnp.float32)

    def inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Returns the shape of pixels for one picture."""
        shape = (1, *2 * (self.config.image_size,), self.config.num_channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)
