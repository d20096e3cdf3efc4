"""Data attribution for diffusion models in JAX."""

from importlib import metadata

from dtrak_jax import models
from dtrak_jax.attribution import Scores, absolute, damping_path
from dtrak_jax.diffusion import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
)
from dtrak_jax.features import (
    Features,
    Projection,
    Task,
    distortion,
    featurize,
    merge,
)
from dtrak_jax.methods import attribute
from dtrak_jax.models.tags import layer

__version__ = metadata.version("dtrak-jax")

__all__ = [
    "Features",
    "Projection",
    "Schedule",
    "Scores",
    "Task",
    "absolute",
    "attribute",
    "cosine_schedule",
    "damping_path",
    "distortion",
    "featurize",
    "layer",
    "linear_schedule",
    "merge",
    "models",
    "scaled_linear_schedule",
]
