"""From features to attribution scores."""

from dtrak_jax.attribution.gradient import (
    gas,
    gradient_cosine,
    gradient_dot,
    relative_influence,
    renormalised_influence,
    tracin,
)
from dtrak_jax.attribution.methods import attribute, damping_path
from dtrak_jax.attribution.retraining import datamodels, empirical_influence
from dtrak_jax.attribution.scores import Scores, Top, ensemble_mean
from dtrak_jax.attribution.similarity import (
    embedding_cosine,
    pixel_cosine,
    pixel_dot,
    random_scores,
)
from dtrak_jax.attribution.solver import GRID, Damping, Kernel, absolute, factorize

__all__ = [
    "GRID",
    "Damping",
    "Kernel",
    "Scores",
    "Top",
    "absolute",
    "attribute",
    "damping_path",
    "datamodels",
    "embedding_cosine",
    "empirical_influence",
    "ensemble_mean",
    "factorize",
    "gas",
    "gradient_cosine",
    "gradient_dot",
    "pixel_cosine",
    "pixel_dot",
    "random_scores",
    "relative_influence",
    "renormalised_influence",
    "tracin",
]
