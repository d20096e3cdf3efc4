"""From features to attribution scores."""

from dtrak_jax.attribution.methods import attribute, damping_path
from dtrak_jax.attribution.scores import Scores, Top
from dtrak_jax.attribution.solver import Damping, Kernel, absolute, factorize

__all__ = [
    "Damping",
    "Kernel",
    "Scores",
    "Top",
    "absolute",
    "attribute",
    "damping_path",
    "factorize",
]
