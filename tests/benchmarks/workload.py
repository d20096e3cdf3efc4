"""The work that both sides are given: the UNet and the images of configs/digits.py."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import cli, data, models
from dtrak_jax.config import Config

DIGITS = Path(__file__).parent.parent.parent / "configs" / "digits.py"


class Workload(NamedTuple):
    """A network, as JAX and PyTorch load it from one diffusers folder, and images."""

    config: Config
    folder: Path
    """config.json and weights; `peers.unet` reads them."""
    apply: Callable
    params: dict
    images: np.ndarray
    """[n, H, W, C]"""
    schedule: dtrak.Schedule

    def settings(self, **more) -> dict:
        """For the JSON file."""
        return {
            "parameters": models.parameter_count(self.params),
            "images": list(self.images.shape),
            "channels": list(self.config.model.block_out_channels),
        } | more


def digits(small: bool, count: int) -> Workload:
    """The digits job's UNet at random weights, and its first training images.

    Times do not depend on the weights.
    """
    config = cli.load_config(str(DIGITS))
    if small:
        tiny = dataclasses.replace(
            config.model, block_out_channels=(4, 8), norm_num_groups=2
        )
        config = dataclasses.replace(config, model=tiny)
    folder = Path(tempfile.mkdtemp())
    model = models.build(config.model)
    models.to_diffusers(model, models.init(model, jax.random.key(0)), folder)
    model, params = models.from_diffusers(folder)
    images = data.load(config.data, 8, 1).train.images[:count]
    return Workload(
        config, folder, models.apply_fn(model), params, images, dtrak.linear_schedule()
    )


def task(work: Workload, **options) -> dtrak.Task:
    """D-TRAK's gradient at ten timesteps unless `options` say otherwise."""
    return dtrak.Task(work.apply, work.schedule, **options)


def noised(work: Workload, task: dtrak.Task) -> tuple[np.ndarray, np.ndarray]:
    """All that the network sees: x_t [T, n, H, W, C], and the timesteps [T]."""
    t = np.array([t for t, _ in task.pairs], np.int32)
    shape = work.images.shape[1:]
    words = jnp.zeros(2, jnp.uint32)
    eps = [task.eps(jnp.int32(pair), words, 0, shape) for pair in range(len(t))]
    x_t = [
        work.schedule.add_noise(
            work.images,
            jnp.broadcast_to(e, work.images.shape),
            jnp.full(len(work.images), s),
        )
        for e, s in zip(eps, t, strict=True)
    ]
    return np.stack(x_t), t
