"""Makes diffusion.npz with torch and diffusers: `python make_diffusion.py`."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear"}
SCHEDULES["cosine"] = "squaredcos_cap_v2"
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


def network(x, t):
    """Something that looks like a network and is the same in every library."""
    return 0.8 * torch.sin(1.3 * x + t / 500) + 0.1 * x


def settings(schedule, prediction):
    return {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": SCHEDULES[schedule],
        "prediction_type": PREDICTIONS[prediction],
        "clip_sample": True,
    }


def main():
    x = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(1, 2, 2, 3)
    eps = torch.cos(7 * x)
    arrays = {"x": x.numpy(), "eps": eps.numpy()}
    for schedule in SCHEDULES:
        scheduler = DDPMScheduler(**settings(schedule, "v"))
        arrays[f"{schedule}/alpha_bar"] = scheduler.alphas_cumprod.numpy()
        t = torch.tensor([123])
        noised = scheduler.add_noise(x, eps, t)
        arrays[f"{schedule}/x_123"] = noised.numpy()
        arrays[f"{schedule}/v_123"] = scheduler.get_velocity(x, eps, t).numpy()
    for prediction in PREDICTIONS:
        for eta in (0.0, 0.7):
            scheduler = DDIMScheduler(
                **settings("linear", prediction), set_alpha_to_one=True
            )
            scheduler.set_timesteps(50)
            for t in (980, 500, 0):
                step = scheduler.step(
                    network(x, t), t, x, eta=eta, variance_noise=eps if eta else None
                )
                arrays[f"ddim/{prediction}/{eta}/{t}"] = step.prev_sample.numpy()
        scheduler = DDPMScheduler(**settings("linear", prediction))
        scheduler.set_timesteps(50)
        for t in (980, 500, 0):
            # The mean of the ancestral step; its noise follows from the variance.
            scheduler._get_variance = lambda *_, **__: torch.zeros((), dtype=x.dtype)
            step = scheduler.step(network(x, t), t, x)
            arrays[f"ancestral/{prediction}/{t}"] = step.prev_sample.numpy()
    np.savez_compressed(Path(__file__).parent / "diffusion.npz", **arrays)


if __name__ == "__main__":
    main()
