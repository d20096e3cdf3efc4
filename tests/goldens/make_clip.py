"""Writes clip_*.npz: small CLIP networks of transformers, with outputs and gradients.

    python tests/goldens/make_clip.py

Needs torch and transformers (made with 2.13 and 5.24), which the tests do not. A file
holds `config` (JSON, as in a config.json), the inputs `ids` or `pixels` [B, C, H, W],
`output/NAME` and `weights/NAME` of every output, the `shapes` of all tensors (JSON), and
these one after another, flat: `params` and `grads`, the gradient of the sum over
outputs of mean(weights * output), 0 where there is none. Arrays are in PyTorch's
layout. Parameters and inputs are exact in float16; outputs and gradients are computed
in float64, so that a comparison shows the error of one side only. clip_images.npz holds
pictures and what becomes of them; clip_embeddings.npz pictures [n, size, size, channels]
and their embeddings by clip_whole.npz, with the preprocessing `config` (JSON).
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

FOLDER = Path(__file__).parent
TEXT = {
    "vocab_size": 29,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
    "projection_dim": 5,
    "bos_token_id": 27,
    "eos_token_id": 28,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 6,
}
ONE = {"num_hidden_layers": 1}
GELU = {"hidden_act": "gelu", "layer_norm_eps": 1e-2}
# The last row and column of the pictures belong to no patch.
ODD = {"image_size": 7, "patch_size": 3, "num_channels": 1, "num_attention_heads": 4}
WHOLE = {
    "projection_dim": 7,
    "text_config": TEXT | ONE,
    "vision_config": VISION | ONE,
}
MODELS = {
    "text": (transformers.CLIPTextModel, TEXT),
    "text_projection": (transformers.CLIPTextModelWithProjection, TEXT | ONE | GELU),
    "vision": (
        transformers.CLIPVisionModelWithProjection,
        VISION | ONE | GELU | ODD,
    ),
    "whole": (transformers.CLIPModel, WHOLE),
}


def parameter(rng, name, shape):
    """Values of about the size of PyTorch's own initialisation, norms included."""
    if "norm" in name or "layrnorm" in name:
        return name.endswith("weight") + 0.3 * rng.standard_normal(shape)
    if "embedding" in name and "patch" not in name:
        return rng.standard_normal(shape)
    return rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:]))


def inputs(rng, config):
    """Ids [3, 7] that end early, late and twice; and pictures."""
    arrays = {}
    if "text_config" in config or "vocab_size" in config:
        ids = rng.integers(0, 27, (3, 7))
        ids[:, 0], ids[0, 3:], ids[1, 6], ids[2, [2, 4]] = 27, 28, 28, 28
        arrays["ids"] = ids.astype(np.int32)
    vision = config.get("vision_config", config)
    if "image_size" in vision:
        size, channels = vision["image_size"], vision.get("num_channels", 3)
        pixels = rng.standard_normal((2, channels, size, size))
        arrays["pixels"] = pixels.astype(np.float16)
    return arrays


def outputs(model, ids=None, pixels=None):
    """All that the networks compute, by our names."""
    if isinstance(model, transformers.CLIPModel):
        return {
            "embeds": model.get_text_features(ids).pooler_output,
            "image_embeds": model.get_image_features(pixels.double()).pooler_output,
        }
    if pixels is not None:
        return {"image_embeds": model(pixels.double()).image_embeds}
    found = model(ids, output_hidden_states=True)
    named = {f"state{i}": state for i, state in enumerate(found.hidden_states)}
    named["last"] = found.last_hidden_state
    if hasattr(found, "text_embeds"):
        return named | {"embeds": found.text_embeds}
    return named | {"pooled": found.pooler_output}


def write(rng, name, kind, config):
    """Writes the file of one network."""
    model = kind(kind.config_class(**config)).double().eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
    params = {}
    for key, tensor in model.named_parameters():
        value = parameter(rng, key, tuple(tensor.shape))
        params[key] = np.asarray(value, np.float16)
        tensor.data.copy_(torch.from_numpy(params[key]))
    loss, arrays = 0, inputs(rng, config)
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    for key, value in outputs(model, **tensors).items():
        weights = rng.standard_normal(value.shape).astype(np.float16)
        loss += (torch.from_numpy(weights).double() * value).mean()
        arrays[f"weights/{key}"] = weights
        arrays[f"output/{key}"] = value.detach().numpy().astype(np.float32)
    loss.backward()
    grads = [
        torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for tensor in model.parameters()
    ]
    save(
        f"clip_{name}",
        config=json.dumps(saved),
        shapes=json.dumps({key: value.shape for key, value in params.items()}),
        params=np.concatenate([value.ravel() for value in params.values()]),
        grads=torch.cat([grad.ravel() for grad in grads]).numpy().astype(np.float32),
        **arrays,
    )


def save(name, **arrays):
    """Writes an .npz and prints its size."""
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size)


def write_images(rng):
    """Writes pictures of several shapes and modes, and what becomes of them."""
    processor = CLIPImageProcessorPil(size=15, crop_size=14)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 4), dtype=np.uint8))
    pictures = {
        "wide": smooth.convert("RGB").resize((41, 23)),
        "tall": smooth.convert("RGB").resize((9, 20)),
        "clear": smooth.resize((30, 29)),
        "grey": smooth.convert("L").resize((15, 15)),
    }
    arrays = {"config": json.dumps(processor.to_dict())}
    for name, picture in pictures.items():
        arrays[f"picture/{name}"] = np.asarray(picture)
        arrays[f"pixels/{name}"] = processor(picture)["pixel_values"][0]
    save("clip_images", **arrays)


def write_embeddings(rng):
    """Writes colour and grey pictures with their embeddings by the whole model."""
    golden = np.load(FOLDER / "clip_whole.npz")
    config = transformers.CLIPConfig(**json.loads(str(golden["config"])))
    model = transformers.CLIPModel(config).double().eval()
    start = 0
    for tensor in model.parameters():
        values = golden["params"][start : start + tensor.numel()]
        tensor.data.copy_(torch.from_numpy(values).reshape(tensor.shape))
        start += tensor.numel()
    processor = CLIPImageProcessorPil(size=9, crop_size=8)
    arrays = {"config": json.dumps(processor.to_dict())}
    for name, channels in (("colour", 3), ("grey", 1)):
        images = rng.integers(0, 256, (11, 12, 12, channels), dtype=np.uint8)
        pictures = [Image.fromarray(image.squeeze()) for image in images]
        pixels = torch.from_numpy(np.stack(processor(pictures)["pixel_values"]))
        embeds = model.get_image_features(pixels.double()).pooler_output
        arrays[f"images/{name}"] = images
        arrays[f"embeddings/{name}"] = embeds.detach().numpy().astype(np.float32)
    save("clip_embeddings", **arrays)


def main():
    transformers.logging.set_verbosity_error()
    for seed, (name, (kind, config)) in enumerate(MODELS.items()):
        write(np.random.default_rng(seed), name, kind, config)
    write_images(np.random.default_rng(len(MODELS)))
    write_embeddings(np.random.default_rng(len(MODELS) + 1))


if __name__ == "__main__":
    main()
