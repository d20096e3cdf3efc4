"""The settings of the model, a UNet."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from dtrak_jax.checks import at_least, between, check_choices, positive

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A UNet, in the field names of diffusers' `UNet2DModel`."""

    folder: str = ""
    """The folder of a diffusers `UNet2DModel` that is taken instead of trained. It
    decides all other fields, which must be left as they are; see `models.resolve`."""
    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    down_block_types: tuple[DownBlock, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "DownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[UpBlock, ...] = (
        "UpBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
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
    freq_shift: Literal[0, 1] = 1
    downsample_padding: Literal[0, 1] = 0
    """1 pads symmetrically; 0 pads right and bottom only."""
    center_input_sample: bool = False
    mid_block_scale_factor: float = 1.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.1

    def __post_init__(self):
        for field in dataclasses.fields(self) if self.folder else ():
            value = getattr(self, field.name)
            if field.name != "folder" and value != field.default:
                raise ValueError(
                    f"model.{field.name} is {value!r}, but model.folder="
                    f"{self.folder!r} decides it; leave it at {field.default!r}."
                )
        check_choices("model", self)
        for name in (
            "sample_size",
            "in_channels",
            "out_channels",
            "layers_per_block",
            "norm_num_groups",
        ):
            at_least(f"model.{name}", getattr(self, name), 1)
        self._check_levels()
        self._check_heads()
        if not self.mid_attention_norm and self.resnet_time_scale_shift == "default":
            raise ValueError(
                "model.mid_attention_norm is False, which diffusers has only for "
                "model.resnet_time_scale_shift='scale_shift'; it must be True."
            )
        if self.freq_shift == 1 and self.block_out_channels[0] < 4:
            raise ValueError(
                f"model.block_out_channels begins with {self.block_out_channels[0]}; "
                "with model.freq_shift=1 it must begin with 4 or more."
            )
        positive("model.mid_block_scale_factor", self.mid_block_scale_factor)
        positive("model.norm_eps", self.norm_eps)
        between("model.dropout", self.dropout, 0, 0.999)

    def _check_levels(self):
        """Raises a ValueError unless levels fit to each other and to the image."""
        names = ("block_out_channels", "down_block_types", "up_block_types")
        counts = [len(getattr(self, name)) for name in names]
        levels = counts[0]
        if levels == 0 or len(set(counts)) > 1:
            raise ValueError(
                f"model.{', model.'.join(names)} have {counts} entries; they must have "
                "as many as each other, 1 or more."
            )
        factor = 2 ** (levels - 1)
        if self.sample_size % factor:
            raise ValueError(
                f"model.sample_size is {self.sample_size}; {levels} levels halve it "
                f"{levels - 1} times, so it must be a multiple of {factor}."
            )
        for channels in self.block_out_channels:
            at_least("model.block_out_channels", channels, 1)
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"model.block_out_channels has {channels}, which "
                    f"model.norm_num_groups={self.norm_num_groups} does not divide."
                )

    def _check_heads(self):
        """Raises a ValueError unless the channels of attention divide into heads."""
        if self.attention_head_dim is None:
            return
        at_least("model.attention_head_dim", self.attention_head_dim, 1)
        widths = self.block_out_channels
        blocks = (
            *zip(self.down_block_types, widths),
            *zip(self.up_block_types, widths[::-1]),
            ("AttnMid" if self.add_attention else "Mid", widths[-1]),
        )
        for kind, channels in blocks:
            if kind.startswith("Attn") and channels % self.attention_head_dim:
                raise ValueError(
                    f"model.block_out_channels has {channels}, which "
                    f"model.attention_head_dim={self.attention_head_dim} does not "
                    "divide."
                )
