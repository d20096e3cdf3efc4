"""The settings of the model, a UNet, and what all networks check of theirs."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dtrak_jax.checks import (
    at_least,
    between,
    check_choices,
    check_fields,
    one_of,
    positive,
)

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A UNet, in the field names of diffusers' `UNet2DModel`."""

    folder: str = ""
    """The folder of a diffusers `UNet2DModel`, or of a pipeline that has one in `unet`,
    which is taken instead of trained. It decides all fields below, which must be left as
    they are, and a scheduler_config.json in `scheduler`, there or beside it, decides
    `diffusion`; see `models.resolve`."""
    variance: Literal["refuse", "ignore"] = "refuse"
    """A network with twice as many channels out as in also predicts a variance (Nichol &
    Dhariwal 2021): refuse it, or ignore the variance and use the first half, the mean."""
    sample_size: int = 32
    """Height and width of the pictures."""
    in_channels: int = 3
    """Channels of the pictures: 1 for grey ones, 3 for colours."""
    out_channels: int = 3
    """Channels of the prediction: as many as in; or twice as many, see `variance`."""
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of each level; each level has half the height and width of the one
    before."""
    layers_per_block: int = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    down_block_types: tuple[DownBlock, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "DownBlock2D",
        "DownBlock2D",
    )
    """The levels on the way down, with or without attention."""
    up_block_types: tuple[UpBlock, ...] = (
        "UpBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    """The levels on the way up, from the lowest one on."""
    attention_head_dim: int | None = None
    """Channels of one attention head; None means a single head."""
    add_attention: bool = True
    """Give the middle block attention."""
    mid_attention_norm: bool = True
    """Normalise before that attention. Since 0.17 diffusers leaves this out under
    scale_shift, unless its attn_norm_num_groups is set."""
    resnet_time_scale_shift: Literal["scale_shift", "default"] = "scale_shift"
    """scale_shift, or default (the time embedding is added)."""
    flip_sin_to_cos: bool = False
    """Embed the timestep as (cos, sin) instead of (sin, cos)."""
    freq_shift: Literal[0, 1] = 1
    """The number that is subtracted from the number of frequencies of that embedding."""
    downsample_padding: Literal[0, 1] = 0
    """1 pads symmetrically; 0 pads right and bottom only."""
    center_input_sample: bool = False
    """Give the network 2x - 1 instead of x."""
    mid_block_scale_factor: float = 1.0
    """The residual blocks in the middle divide their output by it."""
    norm_num_groups: int = 32
    """Groups of the group normalisations; it divides all channels."""
    norm_eps: float = 1e-6
    """Added to the variance in normalisations."""
    dropout: float = 0.1
    """The share of activations that training drops in residual blocks."""
    num_class_embeds: int | None = None
    """The number of classes that the network is conditioned on, which are the labels of
    the data; None is without. See `class_embed_type`."""
    class_embed_type: Literal["timestep", "identity"] | None = None
    """None: an embedding is learned for each class. timestep: a class is a number that
    is embedded as a timestep is. identity: the condition is the embedding itself."""

    def __post_init__(self):
        for field in dataclasses.fields(self) if self.folder else ():
            value = getattr(self, field.name)
            if field.name not in ("folder", "variance") and value != field.default:
                raise ValueError(
                    f"model.{field.name} is {value!r}, but model.folder="
                    f"{self.folder!r} decides it; leave it at {field.default!r}."
                )
        check_network("model", self)
        channels = self.in_channels
        if self.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"model.out_channels is {self.out_channels}, but model.in_channels is "
                f"{channels}; they must be equal, as noise has the channels of pictures, "
                "or out twice in, where a variance is predicted beside the mean."
            )
        at_least("model.sample_size", self.sample_size, 1)
        at_least("model.layers_per_block", self.layers_per_block, 1)
        levels = len(self.block_out_channels)
        factor = 2 ** (levels - 1)
        if self.sample_size % factor:
            raise ValueError(
                f"model.sample_size is {self.sample_size}; {levels} levels halve it "
                f"{levels - 1} times, so it must be a multiple of {factor}."
            )
        self._check_heads()
        kinds = (None, "timestep", "identity")
        one_of("model.class_embed_type", self.class_embed_type, kinds)
        if self.num_class_embeds is not None:
            at_least("model.num_class_embeds", self.num_class_embeds, 1)
        if not self.mid_attention_norm and self.resnet_time_scale_shift == "default":
            raise ValueError(
                "model.mid_attention_norm is False, which diffusers has only for "
                "model.resnet_time_scale_shift='scale_shift'; it must be True."
            )

    @property
    def takes_classes(self) -> bool:
        """True if the network is conditioned on classes."""
        return (self.class_embed_type or self.num_class_embeds) is not None

    def check_variance(self):
        """Raises a ValueError if a variance is predicted, unless it is to be ignored."""
        if self.out_channels != self.in_channels and self.variance == "refuse":
            raise ValueError(
                f"model.out_channels is {self.out_channels}, twice model.in_channels="
                f"{self.in_channels}: the network predicts a variance beside the mean. "
                "Set model.variance='ignore' to use the mean alone, or make them equal."
            )

    def _check_heads(self):
        """Raises a ValueError unless the channels of attention divide into heads."""
        head_dim, widths = self.attention_head_dim, self.block_out_channels
        if head_dim is None:
            return
        at_least("model.attention_head_dim", head_dim, 1)
        mid = "Attn" if self.add_attention else ""
        kinds = (*self.down_block_types, *self.up_block_types, mid)
        for kind, channels in zip(kinds, (*widths, *widths[::-1], widths[-1])):
            if "Attn" in kind and channels % head_dim:
                raise ValueError(
                    f"model.block_out_channels has {channels}, which "
                    f"model.attention_head_dim={head_dim} does not divide."
                )


def check_network(section: str, config: Any) -> None:
    """Raises a ValueError unless blocks of `models.blocks` can be made of a configuration.

    An error calls its fields "section.field".
    """
    check_choices(section, config)
    for name in ("in_channels", "out_channels", "norm_num_groups"):
        at_least(f"{section}.{name}", getattr(config, name), 1)
    names = ("block_out_channels", "down_block_types", "up_block_types")
    counts = [len(getattr(config, name)) for name in names]
    if counts[0] == 0 or len(set(counts)) > 1:
        raise ValueError(
            f"{section}.{f', {section}.'.join(names)} have {counts} entries; they must "
            "have as many as each other, 1 or more."
        )
    for channels in config.block_out_channels:
        at_least(f"{section}.block_out_channels", channels, 1)
        if channels % config.norm_num_groups:
            raise ValueError(
                f"{section}.block_out_channels has {channels}, which "
                f"{section}.norm_num_groups={config.norm_num_groups} does not divide."
            )
    if config.freq_shift == 1 and config.block_out_channels[0] < 4:
        raise ValueError(
            f"{section}.block_out_channels begins with {config.block_out_channels[0]}; "
            f"with {section}.freq_shift=1 it must begin with 4 or more."
        )
    positive(f"{section}.mid_block_scale_factor", config.mid_block_scale_factor)
    positive(f"{section}.norm_eps", config.norm_eps)
    between(f"{section}.dropout", config.dropout, 0, 0.999)


AVERAGING = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
"""Fields without effect that averaging adds to a config.json."""

SQUARE = ("sample_size", "cross_attention_dim")
"""Fields that diffusers may have as a list, and networks here as one value."""


def known_fields(
    settings: Mapping,
    names: Collection[str],
    fixed: Mapping[str, tuple],
    ignored: Collection[str] = (),
) -> dict:
    """Returns the fields of a config.json that are in `names`, as a dataclass has them.

    Lists are tuples; one of equal values is that value in the fields of `SQUARE`.

    Args:
      fixed: fields that a network does not have, and the values that it implies, of
        which the first is diffusers' default.
      ignored: fields without effect, besides those of `AVERAGING`.

    Raises:
      ValueError: a field is unknown, or has none of its fixed values.
    """
    for name, allowed in fixed.items():
        one_of(f"config.json: {name}", settings.get(name, allowed[0]), allowed)
    check_fields("config.json", settings, {*names, *fixed, *ignored, *AVERAGING})
    fields = {name: value for name, value in settings.items() if name in names}
    for name, value in fields.items():
        if isinstance(value, list) and name not in SQUARE:
            fields[name] = tuple(value)
        elif isinstance(value, list) and len(set(value)) == 1:
            fields[name] = value[0]
    return fields
