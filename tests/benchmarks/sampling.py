"""50 steps of DDIM, images/s, against diffusers' pipeline on the same UNet."""

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import diffusion
from dtrak_jax.diffusion.sampling import sampling_step
from tests.benchmarks import peers
from tests.benchmarks.rows import Row, in_turn
from tests.benchmarks.workload import Workload, digits


def measure(small: bool, repetitions: int) -> list[Row]:
    """64 images in one batch, eta 0, clipped."""
    work = digits(small, 4 if small else 64)
    count, steps = len(work.images), 5 if small else 50
    pipeline = peers.sampler(peers.unet(work))

    def ours():
        return diffusion.sample(
            work.apply,
            work.params,
            diffusion.Sampler(work.schedule, steps=steps),
            np.arange(count),
            work.images.shape[1:],
        )

    return [
        Row(
            name="sampling",
            ours="diffusion.sample",
            theirs="diffusers' DDIMPipeline, a generator for each image",
            goal=("at least", 2),
            settings=work.settings(steps=steps, batch=count),
            agreement={"largest pixel difference": pixel_error(work, pipeline)},
            items=count,
            unit="images/s",
            **in_turn(ours, lambda: pipeline(count, steps), repetitions),
        )
    ]


def pixel_error(work: Workload, pipeline) -> float:
    """Of four images from the same noise, with pixels in [0, 1], in ten steps.

    In fifty a network with random weights makes of rounding whatever it likes: its
    predictions are far off, and every step divides them by sqrt(alpha_bar) and clips.
    """
    steps = 10
    sampler = diffusion.Sampler(work.schedule, steps=steps)

    @jax.jit
    def step(x, t, s):
        prediction = work.apply(work.params, x, jnp.full(len(x), t), None)
        return sampling_step(sampler, prediction, x, t, s, None)[0]

    x = jnp.asarray(peers.initial_noise(4, work.images.shape[1:]))
    for t in diffusion.sampling_timesteps(work.schedule, steps):
        x = step(x, t, t - work.schedule.steps // steps)
    error = float(np.abs(np.clip(x / 2 + 0.5, 0, 1) - pipeline(4, steps)).max())
    assert error < 1e-3, f"the two sides' images differ by {error:.1e}"
    return error
