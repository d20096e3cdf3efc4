"""The work that both sides are given: the UNet and the images of configs/digits.py, or
adapters of a small Stable Diffusion's UNet."""

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
from dtrak_jax.models import lora
from dtrak_jax.models.conditional_unet import ConditionalConfig, UNet2DCondition
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.lora_files import write_diffusers

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


class Adapted(NamedTuple):
    """A UNet with adapters, as JAX and diffusers load them from folders of diffusers."""

    folder: Path
    """The UNet's; its subfolder "lora" has the adapters. `peers.adapted` reads them."""
    apply: Callable
    params: dict
    """The adapters."""
    frozen: dict
    images: np.ndarray
    """Latents [n, H, W, C]."""
    cond: np.ndarray
    """Text embeddings [n, S, D]."""
    schedule: dtrak.Schedule

    def settings(self, **more) -> dict:
        """For the JSON file."""
        return {
            "parameters": models.parameter_count(self.params),
            "base": models.parameter_count(self.frozen),
            "latents": list(self.images.shape),
            "text": list(self.cond.shape),
        } | more


def adapted(small: bool, count: int) -> Adapted:
    """A UNet of two levels at random weights, latents and texts, with adapters of the
    paper's layers."""
    channels, rank = ((4, 8), 2) if small else ((32, 64), 8)
    model = UNet2DCondition(
        ConditionalConfig(
            sample_size=8,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=channels[0],
            norm_num_groups=channels[0] // 4,
        )
    )
    folder = Path(tempfile.mkdtemp())
    models.to_diffusers(model, models.init(model, jax.random.key(0)), folder)
    model, frozen = models.from_diffusers(folder, UNet2DCondition)

    settings, rng = lora.LoRAConfig(rank=rank), np.random.default_rng(0)
    shapes, scales = parameter_shapes(model), lora.scales_of(settings, frozen)
    adapters = {
        path: {
            side: rng.normal(size=part.shape).astype(np.float32) / len(part)
            for side, part in pair.items()
        }
        for path, pair in lora.init(settings, shapes, jax.random.key(0)).items()
    }
    write_diffusers(folder / "lora", shapes, adapters, scales)
    apply = lora.apply_fn(models.apply_fn(model), scales)
    latents = rng.normal(size=(count, 8, 8, 4)).astype(np.float32)
    cond = rng.normal(size=(count, 77, channels[0])).astype(np.float32)
    schedule = dtrak.diffusion.scaled_linear_schedule()
    return Adapted(folder, apply, adapters, frozen, latents, cond, schedule)


def task(work: Workload | Adapted, **options) -> dtrak.Task:
    """D-TRAK's gradient at ten timesteps unless `options` say otherwise."""
    return dtrak.Task(work.apply, work.schedule, **options)


def noised(work: Workload | Adapted, task: dtrak.Task) -> tuple[np.ndarray, np.ndarray]:
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
