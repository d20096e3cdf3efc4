"""The network of diffusers' `UNet2DModel`."""

import dataclasses
from collections.abc import Collection, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtrak_jax.checks import one_of
from dtrak_jax.models.blocks import Attention, TimeEmbedding, param_type, unet
from dtrak_jax.models.config import ModelConfig, known_fields

DEFAULTS = {
    "sample_size": None,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D",) + 3 * ("AttnDownBlock2D",),
    "up_block_types": 3 * ("AttnUpBlock2D",) + ("UpBlock2D",),
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "default",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "dropout": 0.0,
}
"""The values of diffusers for fields that a config.json leaves out, where they are not
those of `ModelConfig`."""

FIXED = {
    "_class_name": ("UNet2DModel",),
    "act_fn": ("silu", "swish"),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
}
"""Fields of diffusers that this UNet does not have, and the values that it implies."""


def model_config(settings: Mapping, tensors: Collection[str]) -> ModelConfig:
    """Returns the settings that a config.json and the names of tensors describe.

    Raises:
      ValueError: this UNet does not have a field or its value.
    """
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    names -= {"folder", "variance", "mid_attention_norm"}
    derived = ("time_embedding_dim", "attn_norm_num_groups")
    # The number of timesteps is for learned time embeddings.
    ignored = (*derived, "num_train_timesteps")
    fields = DEFAULTS | known_fields(settings, names, FIXED, ignored)
    for name in ("down_block_types", "up_block_types"):
        fields[name] = tuple(kind.removeprefix("UNetRes") for kind in fields[name])
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
        one_of(f"config.json: {name}", settings.get(name), (None, value))
    return config


class UNet2D(nn.Module):
    """The network of diffusers' `UNet2DModel` (Ho et al. 2020, arXiv 2006.11239).

    `module.apply({"params": params}, x, t)` takes images x [B, H, W, in_channels] in
    [-1, 1] and integer timesteps t [B], and returns the prediction
    [B, H, W, out_channels], float32. The context is None; or where the configuration
    `takes_classes` the class of each image [B], or its embedding [B, D]. With random
    `keys` [B], one for each example, dropout is on. Parameters come from `models.init` or
    `from_diffusers`; those of flax's `module.init` have flax's distribution. Other shapes
    are a ValueError.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config

        def attend(name, x):
            return Attention(config, name=name)(x)

        def attend_mid(name, x):
            normalize, scale = config.mid_attention_norm, config.mid_block_scale_factor
            return Attention(config, normalize, scale, name=name)(x)

        attends = (
            [attend if "Attn" in kind else None for kind in config.down_block_types],
            attend_mid if config.add_attention else None,
            [attend if "Attn" in kind else None for kind in config.up_block_types],
        )
        added = class_embedding(config, context, len(x), param_type(self))
        return unet(self, x, t, keys, attends, added)

    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of (x, t) for one example, and of its class if it has one."""
        config, shape = self.config, jax.ShapeDtypeStruct
        x = shape((1, config.sample_size, config.sample_size, config.in_channels), "f4")
        t = shape((1,), jnp.int32)
        if not config.takes_classes:
            return x, t
        if config.class_embed_type == "identity":
            return x, t, shape((1, 4 * config.block_out_channels[0]), jnp.float32)
        return x, t, t


def class_embedding(
    config: ModelConfig, classes: jax.Array | None, count: int, dtype: jnp.dtype
) -> jax.Array | None:
    """Returns what classes add to the embedding of time, [B, D], if anything.

    It makes a submodule of the calling module.

    Raises:
      ValueError: classes are not those of `count` images.
    """
    width = 4 * config.block_out_channels[0]
    if not config.takes_classes:
        if classes is not None:
            raise ValueError(
                "cond is given, but this UNet2D takes no condition: pass None."
            )
        return None
    is_embedding = config.class_embed_type == "identity"
    expected = (count, width) if is_embedding else (count,)
    is_whole = jnp.issubdtype(getattr(classes, "dtype", None), jnp.integer)
    if getattr(classes, "shape", None) != expected or not (
        is_whole or config.class_embed_type
    ):
        described = "None" if classes is None else f"{classes.dtype} {classes.shape}"
        raise ValueError(
            f"cond is {described}; it must be the "
            f"{'embedding of the class' if is_embedding else 'class'} of each image, "
            f"{'numbers' if config.class_embed_type else 'integers'} of shape {expected}."
        )
    if is_embedding:
        return classes.astype(dtype)
    if config.class_embed_type == "timestep":
        return TimeEmbedding(config, dtype, name="class_embedding")(classes)
    embed = nn.Embed(config.num_class_embeds, width, name="class_embedding")
    # A negative index would count from the end; one beyond the end makes NaN.
    classes = jnp.where(classes < 0, config.num_class_embeds, classes)
    return embed(classes).astype(dtype)
