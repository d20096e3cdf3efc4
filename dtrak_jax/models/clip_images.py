"""Pictures as CLIP's vision network takes them."""

from dataclasses import dataclass

import numpy as np
from etils import epath
from PIL import Image

from dtrak_jax.checks import at_least, check_fields, one_of
from dtrak_jax.files import at, read_json

FILE = "preprocessor_config.json"
WHOLE_FILE = "processor_config.json"
"""The file of transformers 5, which holds the settings of pictures and of text."""

DEFAULTS = {
    "size": 224,
    "crop_size": 224,
    "rescale_factor": 1 / 255,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
"""The values that transformers gives to fields that the file leaves out."""

KINDS = (None, "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")

FIXED = {
    "image_processor_type": KINDS,
    "feature_extractor_type": KINDS,
    "do_resize": (True,),
    "resample": (Image.Resampling.BICUBIC.value,),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "default_to_square": (False,),
    "data_format": ("channels_first",),
}
"""Fields that have the same value in every CLIP, and the values that mean it."""


@dataclass(frozen=True)
class CLIPImages:
    """The preprocessing that a folder's preprocessor_config.json describes.

    Called with a Pillow image, it returns pixels [size, size, 3], float32, equal to
    those of transformers' `CLIPImageProcessorPil`: transparent parts become white, the
    shorter side is resized to `short_side` by Pillow's bicubic filter, the square in
    the centre is cut out, and its values v become (scale v - mean) / std.
    """

    short_side: int
    size: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_folder(cls, folder: epath.PathLike) -> "CLIPImages":
        """Returns the preprocessing of a folder of transformers.

        Raises:
          FileNotFoundError: the folder has no preprocessor_config.json, nor has it a
            processor_config.json, which transformers 5 writes.
          ValueError: CLIP does not have a field or its value.
        """
        folder = at(folder)
        if (folder / FILE).exists() or not (folder / WHOLE_FILE).exists():
            settings = read_json(folder / FILE)
        else:
            settings = read_json(folder / WHOLE_FILE).get("image_processor", {})
        settings = {k: v for k, v in settings.items() if v is not None}
        for name, allowed in FIXED.items():
            one_of(f"{FILE}: {name}", settings.get(name, allowed[0]), allowed)
        check_fields(FILE, settings, {*DEFAULTS, *FIXED, "processor_class"})
        fields = {name: settings.get(name, value) for name, value in DEFAULTS.items()}
        short_side, size = fields["size"], fields["crop_size"]
        if isinstance(short_side, dict) and list(short_side) == ["shortest_edge"]:
            short_side = short_side["shortest_edge"]
        if isinstance(size, dict) and set(size) == {"height", "width"}:
            size = size["height"] if size["height"] == size["width"] else size
        at_least(f"{FILE}: crop_size", size, 1)
        at_least(f"{FILE}: size", short_side, size)
        mean, std = (tuple(fields[name]) for name in ("image_mean", "image_std"))
        return cls(short_side, size, fields["rescale_factor"], mean, std)

    def __call__(self, picture: Image.Image) -> np.ndarray:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        picture = picture.convert("RGB")
        short = min(picture.size)
        sides = [int(self.short_side * side / short) for side in picture.size]
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in sides)
        picture = picture.crop((left, top, left + self.size, top + self.size))
        # transformers rounds the product once, and mean and std before they are used.
        scaled = (np.float64(self.scale) * np.asarray(picture)).astype(np.float32)
        return (scaled - np.float32(self.mean)) / np.float32(self.std)
