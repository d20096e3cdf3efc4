"""Writes stable_diffusion.npz: a tiny Stable Diffusion folder and what it computes.

    python tests/goldens/make_stable_diffusion.py

Needs torch, diffusers and transformers (made with 2.13, 0.42 and 5.24), which the tests
do not. `file/NAME` are the bytes of the files that `StableDiffusionPipeline` saves, in
float16. In float64 the pipeline then computes: `ids` and `context` of the `prompts`; of
`latents` [2, 4, 4, 4] the UNet's `prediction` at the timesteps `t` and the decoded
`image`; the `mean` of the latents of `picture`; and `sample`, what two steps of DDIM
with guidance 3 and `negative` prompts make of `latents`.
"""

import json
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

LENGTH = 12
PROMPTS = ["a Post impressionism painting", "the ukiyo-e of the sea, the sea, the sea"]
NEGATIVE = ["", "blurry"]
MERGES = [
    ("t", "h"),
    ("th", "e</w>"),
    ("i", "n"),
    ("in", "g</w>"),
    ("s", "e"),
    ("o", "n"),
]
TIMESTEPS = (17, 801)
UNET = {
    "sample_size": 4,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "norm_num_groups": 2,
}
VAE = {
    "sample_size": 8,
    "block_out_channels": (2, 4),
    "down_block_types": 2 * ("DownEncoderBlock2D",),
    "up_block_types": 2 * ("UpDecoderBlock2D",),
    "latent_channels": 4,
    "norm_num_groups": 2,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tokenizer():
    """The bytes and a few merges of them."""
    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters]
    tokens += ["".join(pair) for pair in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab, MERGES, model_max_length=LENGTH)


def save(folder):
    """A pipeline with random weights, in its folder."""
    words = tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        **TEXT,
    )
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE).half(),
        text_encoder=transformers.CLIPTextModel(text).half(),
        tokenizer=words,
        unet=diffusers.UNet2DConditionModel(**UNET).half(),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return {
        f"file/{path.relative_to(folder)}": np.frombuffer(path.read_bytes(), np.uint8)
        for path in sorted(Path(folder).rglob("*.*"))
    }


def compute(folder):
    """The numbers that the file's docstring lists."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float64
    )
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.standard_normal((2, 4, 4, 4)).astype(np.float16),
        "picture": rng.uniform(-1, 1, (2, 3, 8, 8)).astype(np.float16),
    }
    latents, picture = (torch.from_numpy(x).double() for x in inputs.values())
    t = torch.tensor(TIMESTEPS)
    ids = pipe.tokenizer(
        PROMPTS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    context = pipe.text_encoder(ids)[0]
    sampled = pipe(
        PROMPTS,
        negative_prompt=NEGATIVE,
        latents=latents,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
    )
    results = {
        "context": context,
        "prediction": pipe.unet(latents, t, context).sample,
        "image": pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample,
        "mean": pipe.vae.encode(picture).latent_dist.mode(),
        "sample": sampled.images,
    }
    results = {
        name: value.numpy().astype(np.float32) for name, value in results.items()
    }
    return inputs | results | {"ids": ids.numpy().astype(np.int32), "t": t.numpy()}


def main():
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = save(folder)
        arrays = compute(folder)
    prompts = {"prompts": json.dumps(PROMPTS), "negative": json.dumps(NEGATIVE)}
    path = Path(__file__).with_name("stable_diffusion.npz")
    np.savez_compressed(path, **files, **prompts, **arrays)
    print(path.name, path.stat().st_size)
    for name, content in files.items():
        print(name, len(content))


if __name__ == "__main__":
    main()
