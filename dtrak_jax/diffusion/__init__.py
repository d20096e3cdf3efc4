"""Noise schedules, noising, the training loss and samplers."""

from dtrak_jax.diffusion.loss import denoising_loss
from dtrak_jax.diffusion.sampling import sample, sampling_timesteps
from dtrak_jax.diffusion.schedule import (
    Schedule,
    build,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
)

__all__ = [
    "Schedule",
    "build",
    "cosine_schedule",
    "denoising_loss",
    "linear_schedule",
    "sample",
    "sampling_timesteps",
    "scaled_linear_schedule",
]
