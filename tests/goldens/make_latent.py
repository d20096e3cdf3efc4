"""Writes latent_*.npz: diffusers' conditional UNets and autoencoders, small and real.

    python tests/goldens/make_latent.py

Needs torch and diffusers (made with 2.13 and 0.42.1), which the tests do not. Each file
holds `config` (JSON, as in a config.json) and a `seed` of which `seeded` makes the
parameters and all inputs; the outputs, computed in float64; and `grads`, what
`seeded.along_directions` makes of the gradients of a weighted mean of the outputs.
latent_names.npz holds the names and shapes of the tensors of real sizes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging
from seeded import along_directions, parameters, values

SD1 = {
    "block_out_channels": [8, 12],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 5,
    "norm_num_groups": 4,
}
SD2 = {
    "block_out_channels": [8, 12],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 3],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 6,
    "norm_num_groups": 2,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UNUSUAL = {
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [6, 8],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": [2, 1],
    "attention_head_dim": [3, 1],
    "transformer_layers_per_block": [2, 1],
    "cross_attention_dim": 4,
    "center_input_sample": True,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1.7,
    "norm_num_groups": 2,
    "norm_eps": 1e-3,
    "resnet_time_scale_shift": "scale_shift",
}
AUTOENCODER = {
    "block_out_channels": [8, 12],
    "down_block_types": 2 * ["DownEncoderBlock2D"],
    "up_block_types": 2 * ["UpDecoderBlock2D"],
    "norm_num_groups": 4,
}
PLAIN_AUTOENCODER = {
    "in_channels": 1,
    "out_channels": 2,
    "latent_channels": 3,
    "block_out_channels": [6],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
UNETS = {"sd1": SD1, "sd2": SD2, "unusual": UNUSUAL}
AUTOENCODERS = {"vae": AUTOENCODER, "plain_vae": PLAIN_AUTOENCODER}
REAL = {
    "sd1": (UNet2DConditionModel, {"cross_attention_dim": 768}),
    "sd2": (
        UNet2DConditionModel,
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
    ),
    "vae": (
        AutoencoderKL,
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": 4 * ["DownEncoderBlock2D"],
            "layers_per_block": 2,
            "up_block_types": 4 * ["UpDecoderBlock2D"],
        },
    ),
}
TIMESTEPS = (0, 1, 417, 999)
# Images are not square, so that height and width cannot be confused.
SIZE = (4, 8)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def tensor(*args):
    return torch.from_numpy(values(*args)).double()


def unet_outputs(model, seed):
    batch, config = len(TIMESTEPS), model.config
    x = tensor(seed, "x", (batch, config.in_channels, *SIZE))
    context = tensor(seed, "context", (batch, 7, config.cross_attention_dim))
    return {"output": model(x, torch.tensor(TIMESTEPS), context).sample}


def autoencoder_outputs(model, seed):
    config = model.config
    posterior = model.encode(tensor(seed, "x", (2, config.in_channels, 8, 16)))
    z = tensor(seed, "z", (2, config.latent_channels, *SIZE))
    return {
        "mean": posterior.latent_dist.mean,
        "log_variance": posterior.latent_dist.logvar,
        "decoded": model.decode(z).sample,
    }


def write(name, model, config, seed, outputs_of):
    params = parameters(seed, shapes(model))
    model.load_state_dict({key: torch.from_numpy(params[key]) for key in params})
    outputs = outputs_of(model.double().eval(), seed)
    means = [
        (tensor(seed, f"weights of {key}", tuple(value.shape)) * value).mean()
        for key, value in outputs.items()
    ]
    sum(means).backward()
    grads = {key: p.grad.numpy() for key, p in model.named_parameters()}
    path = Path(__file__).with_name(f"latent_{name}.npz")
    np.savez_compressed(
        path,
        config=json.dumps({"_class_name": type(model).__name__, **config}),
        seed=seed,
        grads=along_directions(seed, grads),
        **{key: value.detach().float().numpy() for key, value in outputs.items()},
    )
    print(path.name, path.stat().st_size)


def main():
    logging.set_verbosity_error()
    for seed, (name, config) in enumerate(UNETS.items()):
        write(name, UNet2DConditionModel(**config), config, seed, unet_outputs)
    for seed, (name, config) in enumerate(AUTOENCODERS.items(), len(UNETS)):
        write(name, AutoencoderKL(**config), config, seed, autoencoder_outputs)
    names = {}
    for name, (network, config) in REAL.items():
        with torch.device("meta"):
            names[name] = json.dumps([config, shapes(network(**config))])
    path = Path(__file__).with_name("latent_names.npz")
    np.savez_compressed(path, **names)
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
