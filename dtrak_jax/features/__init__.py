"""Gradient features: tasks, gradients, projections and the store that keeps them."""

from dtrak_jax.features.curvature import Curvature, ekfac
from dtrak_jax.features.distortion import Distortion, distortion
from dtrak_jax.features.featurize import (
    StepPrograms,
    example_mesh,
    featurize,
    step_programs,
)
from dtrak_jax.features.measurements import probes
from dtrak_jax.features.merge import merge
from dtrak_jax.features.output_curvature import GaussNewton, gauss_newton
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import Features, Store
from dtrak_jax.features.task import Task

__all__ = [
    "Curvature",
    "Distortion",
    "Features",
    "GaussNewton",
    "Projection",
    "StepPrograms",
    "Store",
    "Task",
    "distortion",
    "ekfac",
    "example_mesh",
    "featurize",
    "gauss_newton",
    "merge",
    "probes",
    "step_programs",
]
