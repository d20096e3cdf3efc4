"""Writes unet_*.npz: small diffusers UNets with their outputs and gradients.

    python tests/goldens/make_models.py [NAME ...]

Needs torch and diffusers (made with 2.13 and 0.42), which the tests do not. Each file
holds `config` (JSON, as in a config.json), `x` and `t`, perhaps `classes`, `weights` of
the outputs,
`output`, and for every parameter `param/NAME` and `grad/NAME`, the gradient of
mean(weights * output). Arrays are in PyTorch's layout. Parameters and inputs are
exact in float16; outputs and gradients are computed in float64, so that a comparison
shows the error of one side only.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.utils import logging
from seeded import parameter

CIFAR = {
    "sample_size": 16,
    "block_out_channels": [8, 12, 12, 12],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"] + 2 * ["DownBlock2D"],
    "up_block_types": 2 * ["UpBlock2D"] + ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
}
CELEBA = {
    "sample_size": 32,
    "block_out_channels": [4, 4, 6, 6, 8, 8],
    "down_block_types": 4 * ["DownBlock2D"] + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + 4 * ["UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 2,
}
ATTENTION_EVERYWHERE = {
    "sample_size": 8,
    "out_channels": 6,
    "block_out_channels": [8, 12],
    "down_block_types": 2 * ["AttnDownBlock2D"],
    "up_block_types": 2 * ["AttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
NO_ATTENTION = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "block_out_channels": [9, 6],
    "down_block_types": 2 * ["DownBlock2D"],
    "up_block_types": 2 * ["UpBlock2D"],
    "layers_per_block": 3,
    "add_attention": False,
    "center_input_sample": True,
    "freq_shift": 1,
    "norm_num_groups": 3,
    "norm_eps": 1e-2,
}
ONE_LEVEL = {
    "sample_size": 8,
    "block_out_channels": [8],
    "down_block_types": ["AttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "mid_block_scale_factor": 1.7,
    "norm_num_groups": 2,
    "resnet_time_scale_shift": "scale_shift",
}
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "add_attention": False,
    "norm_num_groups": 2,
}
# Images are not square, so that height and width cannot be confused.
MODELS = {
    "cifar": (CIFAR, (16, 24)),
    "celeba": (CELEBA, (32, 64)),
    "attention_everywhere": (ATTENTION_EVERYWHERE, (8, 4)),
    "no_attention": (NO_ATTENTION, (6, 8)),
    "one_level": (ONE_LEVEL, (5, 8)),
    "classes": (SMALL | {"num_class_embeds": 5}, (3, 4)),
    "class_numbers": (SMALL | {"class_embed_type": "timestep"}, (3, 4)),
}
TIMESTEPS = (0, 417, 999)
CLASSES = (4, 0, 2)


def run(model, x, t, weights, classes):
    """The output, and the gradient of mean(weights * output)."""
    # What embeds time makes numbers of 32 bits; classes go the same way.
    if model.config.class_embed_type:
        # diffusers makes the type of time that of the network, but not that of classes.
        model.class_embedding.register_forward_pre_hook(lambda _, x: x[0].double())
    output = model.double()(x.double(), t, classes).sample
    (weights.double() * output).mean().backward()
    grads = {f"grad/{name}": p.grad for name, p in model.named_parameters()}
    tensors = {"output": output.detach(), **grads}
    return {name: value.numpy().astype(np.float32) for name, value in tensors.items()}


def main():
    logging.set_verbosity_error()
    for seed, (name, (config, size)) in enumerate(MODELS.items()):
        if sys.argv[1:] and name not in sys.argv:
            continue
        rng = np.random.default_rng(seed)
        model = UNet2DModel(**config).eval()
        inputs = {
            f"param/{key}": parameter(rng, key, tuple(value.shape))
            for key, value in model.state_dict().items()
        }
        batch, channels = len(TIMESTEPS), model.config.out_channels
        inputs["x"] = rng.uniform(-1, 1, (batch, model.config.in_channels, *size))
        inputs["weights"] = rng.standard_normal((batch, channels, *size))
        inputs = {key: value.astype(np.float16) for key, value in inputs.items()}
        state = {
            key.removeprefix("param/"): torch.from_numpy(value)
            for key, value in inputs.items()
            if key.startswith("param/")
        }
        model.load_state_dict(state)
        x, weights = (torch.from_numpy(inputs[key]) for key in ("x", "weights"))
        t = torch.tensor(TIMESTEPS)

        classes = torch.tensor(CLASSES) if name.startswith("class") else None
        results = run(model, x, t, weights, classes)
        if classes is not None:
            results["classes"] = classes.numpy()
        path = Path(__file__).with_name(f"unet_{name}.npz")
        np.savez_compressed(
            path, config=json.dumps(config), t=t.numpy(), **inputs, **results
        )
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
