"""The settings of text-to-image: the frozen base, and CLIP."""

from dataclasses import dataclass
from typing import Literal

from dtrak_jax.checks import at_least, check_choices, free


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The Stable Diffusion that stays as it is while adapters are trained beside it."""

    folder: str = ""
    """A Stable Diffusion folder of diffusers. It decides sizes, noise schedule and
    prediction; the settings in `model` and `diffusion` must be left as they are."""
    dtype: Literal["folder", "float32", "bfloat16", "float16"] = "float32"
    """The type of its weights and of its arithmetic; folder: as they are stored.
    Adapters and their gradients are always float32."""
    resolution: int = 0
    """The height and width of pictures; 0: as a given folder says of its UNet, and 16
    beside a small base."""
    pictures: int = 0
    """Instead of a folder: train a small base in this run first, on so many digits by
    anonymous hands."""
    autoencoder_steps: int = 800
    """The steps that the small base's autoencoder is trained."""
    steps: int = 1300
    """The steps that the small base's UNet is trained."""
    batch_size: int = free(8)
    """Pictures that are encoded or decoded at once on each device."""

    def __post_init__(self):
        check_choices("base", self)
        at_least("base.resolution", self.resolution, 0)
        at_least("base.pictures", self.pictures, 0)
        if self.folder and self.pictures:
            raise ValueError(
                f"base.folder is {self.folder!r} and base.pictures {self.pictures}: a "
                "base is given or trained; leave one of them out."
            )
        for name in ("autoencoder_steps", "steps", "batch_size"):
            at_least(f"base.{name}", getattr(self, name), 1)
        if self.pictures and self.resolution % 4:
            raise ValueError(
                f"base.resolution is {self.resolution}; it must be a multiple of 4: the autoencoder "
                "halves it, and the UNet does again."
            )

    @property
    def small_resolution(self) -> int:
        """The height and width of the small base's pictures."""
        return self.resolution or 16


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A CLIP network, which compares pictures."""

    folder: str = free("")
    """A folder of transformers with a CLIPVisionModelWithProjection or a CLIPModel."""
