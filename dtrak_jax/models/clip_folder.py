"""CLIP's networks in folders of transformers, without PyTorch."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from dtrak_jax.checks import check_fields, one_of
from dtrak_jax.files import at, read_json, write_json
from dtrak_jax.models.clip import (
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.tensors import (
    CONFIG,
    model_folder,
    read_weights,
    tensor_name,
    to_params,
    to_tensors,
    write_tensors,
)

STEM = "model"

WHOLE = (
    "text_config",
    "text_config_dict",
    "vision_config",
    "vision_config_dict",
    "projection_dim",
    "logit_scale_init_value",
)
"""The fields of a whole `CLIPModel` of text and vision."""

_IGNORED = """
add_cross_attention architectures attention_dropout bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id gradient_checkpointing id2label initializer_factor
initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
min_length model_type no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_scores
pad_token_id prefix problem_type projection_dim pruned_heads remove_invalid_values
repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
torchscript transformers_version typical_p use_bfloat16
"""
IGNORED = frozenset(_IGNORED.split())
"""Fields without effect on CLIP's output: those of all networks of transformers, most
of them of text generation, and those of training."""


def text_config(settings: Mapping, tensors: Collection[str]) -> CLIPTextConfig:
    """Returns the text network of a config.json and of the names of its tensors.

    Raises:
      ValueError: this network does not have a field or its value.
    """
    settings = dict(_part(settings, "text"))
    # Networks without a projection have a size of it in config.json, too.
    if "text_projection.weight" not in tensors:
        settings["projection_dim"] = None
    return _config(CLIPTextConfig, settings)


def vision_config(settings: Mapping, tensors: Collection[str] = ()) -> CLIPVisionConfig:
    """Returns the vision network of a config.json, as `text_config`."""
    return _config(CLIPVisionConfig, _part(settings, "vision"))


def _part(settings: Mapping, part: str) -> Mapping:
    """Returns the settings of "text" or "vision", also of a whole CLIPModel's."""
    kinds = (f"clip_{part}_model", "clip")
    one_of(f"{CONFIG}: model_type", settings.get("model_type"), kinds)
    if settings["model_type"] != "clip":
        return settings
    check_fields(CONFIG, settings, {*WHOLE, *IGNORED})
    # Old files state a part twice, and transformers takes the second one.
    repeated = settings.get(f"{part}_config_dict")
    chosen = settings.get(f"{part}_config") if repeated is None else repeated
    return {**(chosen or {}), "projection_dim": settings.get("projection_dim", 512)}


def _config(kind: type, settings: Mapping) -> CLIPTextConfig | CLIPVisionConfig:
    """Returns the settings that a network has, or raises a ValueError."""
    names = {field.name for field in dataclasses.fields(kind)}
    check_fields(CONFIG, settings, names | IGNORED)
    return kind(**{name: settings[name] for name in names if name in settings})


class Format(NamedTuple):
    """A network in transformers."""

    config: Callable
    """A function from config.json and the tensors' names to the settings."""
    folder: str
    """The folder of the network in one of a pipeline."""
    prefix: str
    """The beginning of its tensors' names, at least in old files and in a whole `CLIPModel`."""
    left_out: tuple[str, ...]
    """The beginnings of the names of a whole `CLIPModel`'s other tensors."""


FORMATS = {
    CLIPText: Format(
        text_config,
        "text_encoder",
        "text_model.",
        ("vision_model.", "visual_projection.", "logit_scale"),
    ),
    CLIPVision: Format(
        vision_config,
        "image_encoder",
        "vision_model.",
        ("text_model.", "text_projection.", "logit_scale"),
    ),
}


def from_transformers(
    folder: epath.PathLike,
    network: type[CLIPText | CLIPVision],
    dtype: jnp.dtype | None = jnp.float32,
) -> tuple[CLIPText | CLIPVision, dict]:
    """Returns the network in a folder of transformers and its parameters.

    The folder has config.json and model.safetensors (or shards of it, with their index)
    of a `CLIPTextModel`, with or without projection, of a
    `CLIPVisionModelWithProjection` or of a whole `CLIPModel`. It may be that of a
    pipeline, whose folder `text_encoder` or `image_encoder` is then taken.

    Args:
      network: CLIPText or CLIPVision.
      dtype: the type of the parameters; None leaves each as it is in the folder.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the network does not have a field or value of config.json; a tensor is
        missing, left over, misshapen or not of floating point; or a file is damaged or
        a pickle.
    """
    form = FORMATS[network]
    folder = model_folder(folder, form.folder)
    settings = read_json(folder / CONFIG)
    left_out = form.left_out if settings.get("model_type") == "clip" else ()
    tensors = {
        name.removeprefix(form.prefix): tensor
        for name, tensor in read_weights(folder, STEM).items()
        if not name.startswith(left_out)
    }
    # A row of counting numbers, which old files hold.
    tensors.pop("embeddings.position_ids", None)
    model = network(form.config(settings, tensors))
    shapes = parameter_shapes(model)
    params = to_params(shapes, tensors, folder, clip_tensor_name, dtype)
    return model, jax.device_put(params)


def to_transformers(model: CLIPText, params: dict, folder: epath.PathLike) -> None:
    """Writes a folder that `from_pretrained` of transformers' `CLIPTextModel` loads.

    The folder is made if it is missing. Its config.json and model.safetensors are
    replaced, each in one step. A network with a projection is a
    `CLIPTextModelWithProjection`.
    """
    settings = dataclasses.asdict(model.config)
    projected = "" if settings["projection_dim"] is None else "WithProjection"
    kind = {
        "architectures": [f"CLIPTextModel{projected}"],
        "model_type": "clip_text_model",
        "bos_token_id": None,  # Its default may lie beyond the vocabulary.
    }
    if not projected:
        del settings["projection_dim"]
    tensors = {
        name if name.startswith("text_projection.") else f"text_model.{name}": tensor
        for name, tensor in to_tensors(params, clip_tensor_name).items()
    }
    write_tensors(at(folder) / f"{STEM}.safetensors", tensors)
    write_json(at(folder) / CONFIG, kind | settings)


def clip_tensor_name(path: tuple[str, ...]) -> str:
    """Returns PyTorch's name of a parameter."""
    alone = path[-1] == "class_embedding"
    return ".".join(path) if alone else tensor_name(path)
