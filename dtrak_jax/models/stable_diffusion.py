"""A whole Stable Diffusion folder: networks, tokenizer and schedule that fit each other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from dtrak_jax.checks import check_fields, one_of
from dtrak_jax.diffusion.schedule import Schedule, scaled_linear_schedule
from dtrak_jax.diffusion.scheduler_config import DIFFUSERS_FILE
from dtrak_jax.files import at, is_remote, read_json, write_json
from dtrak_jax.models import clip_folder, convert
from dtrak_jax.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    autoencoder_config,
)
from dtrak_jax.models.clip import CLIPText, CLIPTextConfig
from dtrak_jax.models.clip_folder import (
    from_transformers,
    text_config,
    to_transformers,
)
from dtrak_jax.models.conditional_unet import (
    ConditionalConfig,
    UNet2DCondition,
    conditional_config,
)
from dtrak_jax.models.convert import from_diffusers, to_diffusers
from dtrak_jax.models.tensors import CONFIG, INDEX, weight_names
from dtrak_jax.models.tokenizer import Tokenizer

LATENTS = "vae: latent_channels"

CLASSES = {
    "_class_name": ("StableDiffusionPipeline",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""The classes of diffusers' pipeline and its parts."""

LIBRARIES = {
    "unet": "diffusers",
    "vae": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
}
"""The packages of these classes."""

IGNORED = (
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "requires_safety_checker",
)
"""Parts that are not loaded, and the scheduler, whose own file names its class."""


class StableDiffusion(NamedTuple):
    """The contents of a Stable Diffusion folder, but for weights (Rombach et al. 2022)."""

    unet: UNet2DCondition
    vae: AutoencoderKL
    text: CLIPText
    tokenizer: Tokenizer
    schedule: Schedule
    scheduler: dict
    """All of scheduler_config.json, of which some say how diffusers samples."""


def resolve_stable_diffusion(folder: epath.PathLike) -> StableDiffusion:
    """Returns what a folder holds, without reading weights.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it is the folder of another pipeline, such as Stable Diffusion XL; a
        network does not have a field or value of its config.json; the parts do not fit
        each other; or weights are pickles or cut off.
    """
    folder = at(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} has no {INDEX}; it must be the folder of a Stable Diffusion "
            "pipeline of diffusers, with unet, vae, text_encoder, tokenizer and scheduler."
        )
    index = read_json(folder / INDEX)
    for part, allowed in CLASSES.items():
        value = index.get(part)
        name = value[-1] if isinstance(value, list) else value
        one_of(f"{folder / INDEX}: {part}", name, allowed)
    check_fields(str(folder / INDEX), index, {*CLASSES, *IGNORED})
    stems = {
        "unet": convert.STEM,
        "vae": convert.STEM,
        "text_encoder": clip_folder.STEM,
    }
    names = {part: weight_names(folder / part, stem) for part, stem in stems.items()}
    settings = {part: read_json(folder / part / CONFIG) for part in names}
    text = text_config(settings["text_encoder"], names["text_encoder"])
    unet = conditional_config(settings["unet"])
    vae = autoencoder_config(settings["vae"])
    for name, value, fixed_by, expected in (
        (
            "unet: cross_attention_dim",
            unet.cross_attention_dim,
            "text_encoder: hidden_size",
            text.hidden_size,
        ),
        ("unet: in_channels", unet.in_channels, LATENTS, vae.latent_channels),
        ("unet: out_channels", unet.out_channels, LATENTS, vae.latent_channels),
        ("vae: out_channels", vae.out_channels, "vae: in_channels", vae.in_channels),
    ):
        if value != expected:
            raise ValueError(
                f"{folder}: {name} is {value}, but {fixed_by} is {expected}; they must "
                "be equal."
            )
    schedule = Schedule.from_diffusers(folder)
    if schedule.prediction == "flow":
        raise ValueError(
            f"{folder}: the scheduler is one of flow matching, which Stable Diffusion 1 "
            "and 2 are not trained with."
        )
    return StableDiffusion(
        UNet2DCondition(unet),
        AutoencoderKL(vae),
        CLIPText(text),
        Tokenizer.from_folder(
            folder / "tokenizer", text.max_position_embeddings, text.vocab_size
        ),
        schedule,
        read_json(folder / "scheduler" / DIFFUSERS_FILE),
    )


def stable_diffusion_1() -> StableDiffusion:
    """Returns networks of the sizes of Stable Diffusion 1, without a tokenizer."""
    return StableDiffusion(
        UNet2DCondition(ConditionalConfig(sample_size=64, cross_attention_dim=768)),
        AutoencoderKL(
            AutoencoderConfig(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=4 * ("DownEncoderBlock2D",),
                up_block_types=4 * ("UpDecoderBlock2D",),
            )
        ),
        CLIPText(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12
            )
        ),
        tokenizer=None,
        schedule=scaled_linear_schedule(),
        scheduler={"steps_offset": 1, "set_alpha_to_one": False},
    )


def from_stable_diffusion(
    folder: epath.PathLike, dtype: jnp.dtype | None = jnp.float32
) -> tuple[StableDiffusion, dict]:
    """Returns what a folder holds, and the parameters of "unet", "vae" and "text".

    Args:
      dtype: the type of the parameters; None leaves each as it is in the folder.

    Raises:
      FileNotFoundError, ValueError: as `resolve_stable_diffusion`; or a tensor is
        missing, left over, misshapen or not of floating point.
    """
    parts = resolve_stable_diffusion(folder)
    return parts, {name: read_part(folder, name, dtype) for name in PARTS}


PARTS = {
    "unet": ("unet", from_diffusers, UNet2DCondition),
    "vae": ("vae", from_diffusers, AutoencoderKL),
    "text": ("text_encoder", from_transformers, CLIPText),
}
"""For each network its folder, and how it is read."""


def read_part(folder: epath.PathLike, name: str, dtype: jnp.dtype | None) -> dict:
    """Returns the parameters of one of `PARTS`, on the host."""
    place, read, network = PARTS[name]
    return jax.device_get(read(at(folder) / place, network, dtype)[1])


def to_stable_diffusion(
    pipeline: StableDiffusion, params: dict, folder: epath.PathLike
) -> None:
    """Writes a folder that `from_stable_diffusion` and diffusers' pipeline load.

    It appears complete: on a local disk by a rename, on gs:// by its model_index.json,
    which is written last.

    Args:
      params: the parameters of "unet", "vae" and "text".
      folder: it must not be there yet, or be empty.

    Raises:
      FileExistsError: the folder holds something.
    """
    folder = at(folder)
    if folder.exists() and any(folder.iterdir()) and not is_remote(folder):
        raise FileExistsError(
            f"{folder} holds something already; delete it, or name another folder."
        )
    partial = folder
    if not is_remote(folder):
        partial = folder.parent / f"{folder.name}.partial"
        if partial.exists():  # A killed write left it.
            partial.rmtree()
    to_diffusers(pipeline.unet, params["unet"], partial / "unet")
    to_diffusers(pipeline.vae, params["vae"], partial / "vae")
    to_transformers(pipeline.text, params["text"], partial / "text_encoder")
    pipeline.tokenizer.save(partial / "tokenizer")
    write_json(partial / "scheduler" / DIFFUSERS_FILE, pipeline.scheduler)
    kinds = {part: names[0] for part, names in CLASSES.items()}
    index = {"_class_name": kinds.pop("_class_name")}
    index |= {part: [LIBRARIES[part], kind] for part, kind in kinds.items()}
    index["scheduler"] = ["diffusers", pipeline.scheduler["_class_name"]]
    left_out = ("safety_checker", "feature_extractor", "image_encoder")
    index |= {part: [None, None] for part in left_out}
    write_json(partial / INDEX, {**index, "requires_safety_checker": False})
    if partial != folder:
        partial.rename(folder)
