"""Writes bfloat16.npz: how far diffusers' UNets in bfloat16 are from those in float64.

    python tests/goldens/make_bfloat16.py

Needs torch and diffusers (made with 2.13 and 0.42.1), which the tests do not. For each of
some golden files of `make_models.py` and `make_latent.py` it holds the root mean square
of the error of the output, over that of the output. Parameters and inputs are rounded to
bfloat16, and all of the network computes in it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.utils import logging
from seeded import parameters, values

FOLDER = Path(__file__).parent
UNETS = ("unet_attention_everywhere", "unet_one_level")
CONDITIONAL = ("latent_sd1", "latent_sd2")
TIMESTEPS = (0, 1, 417, 999)


def bfloat16(array):
    return torch.from_numpy(array.astype(np.float32)).bfloat16()


def unet(golden):
    """The output of an unconditional network whose file has its parameters."""
    model = UNet2DModel(**json.loads(str(golden["config"])))
    names = (name for name in golden if name.startswith("param/"))
    state = {name.removeprefix("param/"): bfloat16(golden[name]) for name in names}
    model.load_state_dict(state)
    model = model.bfloat16().eval()
    return model(bfloat16(golden["x"]), torch.from_numpy(golden["t"])).sample


def conditional(golden):
    """The output of a conditional network whose file has a seed."""
    settings, seed = json.loads(str(golden["config"])), int(golden["seed"])
    del settings["_class_name"]
    model = UNet2DConditionModel(**settings)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    params = parameters(seed, shapes)
    model.load_state_dict({name: bfloat16(params[name]) for name in params})
    model = model.bfloat16().eval()
    x = bfloat16(values(seed, "x", (len(TIMESTEPS), model.config.in_channels, 4, 8)))
    width = model.config.cross_attention_dim
    context = bfloat16(values(seed, "context", (len(TIMESTEPS), 7, width)))
    return model(x, torch.tensor(TIMESTEPS), context).sample


def main():
    logging.set_verbosity_error()
    errors = {}
    for name in UNETS + CONDITIONAL:
        golden = dict(np.load(FOLDER / f"{name}.npz"))
        with torch.no_grad():
            output = (unet if name in UNETS else conditional)(golden).float().numpy()
        rms = np.sqrt(np.mean(golden["output"] ** 2))
        errors[name] = np.sqrt(np.mean((output - golden["output"]) ** 2)) / rms
        print(name, errors[name])
    np.savez_compressed(FOLDER / "bfloat16.npz", **errors)


if __name__ == "__main__":
    main()
