"""Noise schedules, the training loss and samplers."""

from dtrak_jax.diffusion.loss import denoising_loss
from dtrak_jax.diffusion.sampling import (
    Sampler,
    guided,
    sample,
    sample_program,
    sampling_timesteps,
)
from dtrak_jax.diffusion.schedule import (
    Schedule,
    cosine_schedule,
    flow_schedule,
    linear_schedule,
    scaled_linear_schedule,
)

__all__ = [
    "Sampler",
    "Schedule",
    "cosine_schedule",
    "denoising_loss",
    "flow_schedule",
    "guided",
    "linear_schedule",
    "sample",
    "sample_program",
    "sampling_timesteps",
    "scaled_linear_schedule",
]
