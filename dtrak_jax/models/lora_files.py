"""Files of adapters: five layouts are read, those of diffusers and PEFT are written.

    1  unet.MODULE.lora.down.weight                 a diffusers pipeline
    2  MODULE.lora_A.weight                         a diffusers model
    3  base_model.model.MODULE.lora_A.weight        PEFT, with adapter_config.json
    4  [unet.]ATTENTION.processor.to_q_lora.down.weight     diffusers up to 0.20
    5  lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight   kohya, with .alpha

What would compute something else than x W + s (x A) B is refused.
"""

import collections
import json
import re
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax.checks import positive
from dtrak_jax.files import at, read_json, write_json
from dtrak_jax.models.lora import Adapters, Scales, matrix_shape, weight_shapes
from dtrak_jax.models.lora_settings import check_settings, scale_of, settings_of
from dtrak_jax.models.tensors import PICKLES, read_header, read_tensors, write_tensors
from dtrak_jax.network import Params

DIFFUSERS = "pytorch_lora_weights.safetensors"
PEFT = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""The field of a safetensors header in which diffusers keeps what PEFT has in a file."""

NAME = re.compile(
    r"(?:base_model\.model\.|unet\.|(?P<kohya>lora_unet_))?(?P<module>.+?)"
    r"(?:\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.|\.lora\.|\.lora_)"
    r"(?P<side>down|up|A|B)\.weight"
)
ALPHA = re.compile(r"lora_unet_(?P<module>[^.]+)\.alpha")
SIDES = {"A": "down", "B": "up"}
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?text_(encoder|model)|lora_te\d?_")

OTHER_METHODS = {
    r"lora_magnitude_vector|dora_scale": "DoRA",
    r"\.hada_": "LoHa (LyCORIS)",
    r"\.lokr_": "LoKr (LyCORIS)",
    r"\.lora_mid\.": "LoCon with a Tucker core (LyCORIS)",
    r"\.lora_embedding_": "an adapter of an embedding",
    r"\.bias$|\.diff_b$": "a bias",
}
"""Parts of tensors' names, and what they tell of."""


def read_lora(
    path: epath.PathLike, base: Params, leave_out_text_encoder: bool = False
) -> tuple[dict, dict[str, float]]:
    """Returns the adapters and the scales in a file or a folder.

    Args:
      path: a .safetensors file, or the folder that holds it.
      base: the parameters of the UNet that it belongs to, or their shapes.
      leave_out_text_encoder: whether adapters of the text encoder are left out, instead
        of refused.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is a pickle or damaged; a tensor or a setting is of another
        method than LoRA, or does not fit the base.
    """
    path = _weights_file(at(path))
    tensors = read_tensors(path)
    text = [name for name in tensors if TEXT_ENCODER.match(name)]
    if text and not leave_out_text_encoder:
        raise ValueError(
            f"{path} has {len(text)} tensors of an adapter of the text encoder, such as "
            f"{text[0]}; only the UNet's can be used here. They can be left out, but "
            "then the model is another one (lora.leave_out_text_encoder)."
        )
    tensors = {name: tensors[name] for name in tensors if name not in text}
    modules = _modules(path, tensors, weight_shapes(base))
    settings = _settings(path, tensors)
    if not settings and not any("alpha" in parts for parts in modules.values()):
        warnings.warn(
            f"{path} tells no alpha: its adapters are taken at scale 1, as diffusers does. "
            "If they were trained with another one, give the file its alpha.",
            stacklevel=2,
        )
    adapters, scales = {}, {}
    for name, parts in sorted(modules.items()):
        alpha = parts.pop("alpha", None)
        rank = parts["down"].shape[1]
        scales[name] = alpha / rank if alpha else scale_of(path, settings, name, rank)
        adapters[name] = parts
    return adapters, scales


def _weights_file(path: epath.Path) -> epath.Path:
    """Returns the file at a path or in a folder."""
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir())
    else:
        names = [path.name] if path.is_file() else []
    folder = path if path.is_dir() else path.parent
    files = [name for name in names if name.endswith(".safetensors")]
    # These two are names of adapters alone; beside them there may be other files.
    files = [name for name in (PEFT, DIFFUSERS) if name in files] or files
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise ValueError(
            f"{path} has {', '.join(files)}; name the file that is to be read."
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"{folder} has no safetensors but {', '.join(pickles)}. These are pickles, "
            "which may run any program when they are read, so they are not. If you trust "
            "the adapter's, do in PyTorch: safetensors.torch.save_file(torch.load(PICKLE,"
            f" weights_only=True), {DIFFUSERS!r})."
        )
    raise FileNotFoundError(
        f"{path} is no .safetensors file, and no folder with {DIFFUSERS} or {PEFT}."
    )


def _modules(path, tensors, shapes) -> dict[str, dict]:
    """Returns {module: {"down": [in, r], "up": [r, out], and "alpha" where given}}.

    Raises:
      ValueError: a tensor is not of LoRA, or the base has no place for it.
    """
    modules, kohya = collections.defaultdict(dict), set()
    # "a_b.c" cannot be told from "a_b_c" but by what there is.
    underscored = {name.replace(".", "_"): name for name in shapes}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name) or ALPHA.fullmatch(name)
        if match is None:
            _refuse_tensor(path, name)
        fields = match.groupdict()
        module, side = fields["module"], fields.get("side", "alpha")
        side = SIDES.get(side, side)
        if fields.get("layer"):
            layer = fields["layer"]
            module += ".to_out.0" if layer == "to_out" else f".{layer}"
        if fields.get("kohya") or side == "alpha":
            module = underscored.get(module, module)
            kohya.add(module)
        if side in modules[module]:
            raise ValueError(f"{path} has two tensors {side!r} for {module}.")
        modules[module][side] = tensor
    if not modules:
        raise ValueError(f"{path} has no adapters of a UNet.")
    _check_modules(path, modules, shapes)
    _check_alphas(path, {name: modules[name] for name in kohya})
    return {
        name: _checked_parts(path, name, parts, matrix_shape(shapes[name]))
        for name, parts in modules.items()
    }


def _refuse_tensor(path, name):
    """Raises a ValueError that says of what a tensor is."""
    for part, method in OTHER_METHODS.items():
        if re.search(part, name):
            raise ValueError(
                f"{path} has a tensor {name}: that is {method}, not LoRA, and cannot be "
                "represented."
            )
    raise ValueError(
        f"{path} has a tensor {name}, which belongs to none of the layouts of LoRA "
        "that are known: of diffusers, PEFT and kohya."
    )


def _check_modules(path, modules, shapes):
    """Raises a ValueError unless the base has all of the modules, as matrix products."""
    unknown = sorted(modules.keys() - shapes.keys())
    if unknown:
        all_or_some = "none" if len(unknown) == len(modules) else "not all"
        raise ValueError(
            f"{path} is an adapter of another base: this one has {all_or_some} of its "
            f"{len(modules)} modules, and lacks {', '.join(unknown[:3])}. Its own are "
            f"such as {', '.join(sorted(shapes)[:3])}."
        )
    for name in modules:
        if matrix_shape(shapes[name]) is None:
            raise ValueError(
                f"{path} has an adapter of {name}, a convolution with a window of "
                f"{shapes[name][:-2]}; only those by one pixel can be adapted."
            )


def _check_alphas(path, modules):
    """Raises a ValueError unless all or none of kohya's modules have an alpha."""
    without = sorted(name for name, parts in modules.items() if "alpha" not in parts)
    if 0 < len(without) < len(modules):
        raise ValueError(
            f"{path} has no alpha for {without[0]}, but for others. Programs read this "
            "in two ways; give it the alpha that it was trained with."
        )


def _checked_parts(path, name, parts, shape) -> dict:
    """Returns a module's A and B [in, r] and [r, out], float32, and its alpha."""
    checked = {}
    for side in ("down", "up"):
        if side not in parts:
            raise ValueError(f"{path} has no tensor {side!r} for {name}.")
        tensor = parts[side]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{path}: {side!r} of {name} is {tensor.dtype}; it must be of floating "
                "point."
            )
        if tensor.shape[2:] not in ((), (1, 1)) or tensor.ndim < 2:
            raise ValueError(
                f"{path}: {side!r} of {name} has shape {tensor.shape}; only matrices "
                "and convolutions by one pixel can be represented."
            )
        checked[side] = tensor.reshape(tensor.shape[:2]).astype(np.float32).T
        if not np.isfinite(checked[side]).all():
            raise ValueError(f"{path}: {side!r} of {name} is not finite.")
    (inputs, rank), (up_rank, outputs) = checked["down"].shape, checked["up"].shape
    if rank != up_rank or not rank:
        raise ValueError(
            f"{path}: {name} has rank {rank} in A and {up_rank} in B; they must be equal."
        )
    if (inputs, outputs) != shape:
        raise ValueError(
            f"{path} is an adapter of another base: {name} maps {inputs} channels to "
            f"{outputs} there and {shape[0]} to {shape[1]} here."
        )
    if "alpha" in parts:
        if parts["alpha"].size != 1:
            raise ValueError(f"{path}: alpha of {name} must be a single number.")
        checked["alpha"] = parts["alpha"].item()
        positive(f"{path}: alpha of {name}", checked["alpha"])
    return checked


def _settings(path: epath.Path, tensors: Mapping) -> dict:
    """Returns the configuration that comes with a file's tensors, or {}.

    Raises:
      ValueError: it describes another method, or it is missing and necessary.
    """
    source = path
    if any(name.startswith("base_model.model.") for name in tensors):
        source = path.parent / PEFT_CONFIG
        if not source.is_file():
            raise ValueError(
                f"{path} is of PEFT and needs {PEFT_CONFIG} beside it, which has its "
                "scale."
            )
        settings = read_json(source)
    else:
        settings = json.loads(read_header(path)[1].get(METADATA, "{}"))
    settings = {
        name.removeprefix("unet."): value
        for name, value in settings.items()
        if not TEXT_ENCODER.match(name)
    }
    check_settings(source, settings)
    return settings


def write_diffusers(
    folder: epath.PathLike, base: Params, adapters: Adapters, scales: Scales
) -> None:
    """Writes what `load_lora_weights` of diffusers' pipelines loads (layout 1).

    Scales other than 1 stand in the file's metadata, which old versions do not read.

    Raises:
      ValueError: the adapters do not fit the base.
      OSError: as `files.write_bytes`.
    """
    tensors = _tensors(
        base, adapters, "unet.{}.lora.down.weight", "unet.{}.lora.up.weight"
    )
    settings = {f"unet.{k}": v for k, v in settings_of(adapters, scales).items()}
    write_tensors(at(folder) / DIFFUSERS, tensors, {METADATA: json.dumps(settings)})


def write_peft(
    folder: epath.PathLike, base: Params, adapters: Adapters, scales: Scales
) -> None:
    """Writes what `PeftModel.from_pretrained` of PEFT loads (layout 3).

    Raises:
      ValueError, OSError: as `write_diffusers`.
    """
    name = "base_model.model.{}.lora_%s.weight"
    tensors = _tensors(base, adapters, name % "A", name % "B")
    write_tensors(at(folder) / PEFT, tensors)
    write_json(at(folder) / PEFT_CONFIG, settings_of(adapters, scales))


def _tensors(base, adapters, down, up) -> dict[str, np.ndarray]:
    """Returns adapters as tensors in PyTorch's axes, with names of these two patterns."""
    shapes, tensors = weight_shapes(base), {}
    for module, parts in jax.device_get(dict(adapters)).items():
        (inputs, outputs), rank = matrix_shape(shapes[module]), parts["down"].shape[-1]
        for name, part, shape in (
            (down, parts["down"], (inputs, rank)),
            (up, parts["up"], (rank, outputs)),
        ):
            if part.shape != shape:
                raise ValueError(
                    f"{name.format(module)} has shape {part.shape}; in this base it must "
                    f"be {shape}."
                )
            pixel = (1,) * (len(shapes[module]) - 2)
            tensors[name.format(module)] = part.T.reshape(*shape[::-1], *pixel)
    return tensors
