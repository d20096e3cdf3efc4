"""Gradient features: what is differentiated, projected and kept."""

from dtrak_jax.features.distortion import Distortion, distortion
from dtrak_jax.features.loop import featurize
from dtrak_jax.features.merge import merge
from dtrak_jax.features.projection import Projection, project
from dtrak_jax.features.store import Features
from dtrak_jax.features.task import Task

__all__ = [
    "Distortion",
    "Features",
    "Projection",
    "Task",
    "distortion",
    "featurize",
    "merge",
    "project",
]
