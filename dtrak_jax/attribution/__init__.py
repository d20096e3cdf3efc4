"""From features to attribution scores.

A method is a function that returns scores as a float64 array [q, n]: positive means that
training on example n lowered the loss of query q. `dtrak_jax.methods` has all of them in
one table.
"""

from dtrak_jax.attribution.conjugate import gauss_newton_influence
from dtrak_jax.attribution.coverage import Predictions, coverage, predict
from dtrak_jax.attribution.damping import (
    DEFAULT_DAMPING,
    GRID,
    Damping,
    absolute,
    effective,
)
from dtrak_jax.attribution.das import das
from dtrak_jax.attribution.duplicates import near_duplicates
from dtrak_jax.attribution.ekfac import ekfac_influence
from dtrak_jax.attribution.errors import PairSum
from dtrak_jax.attribution.groups import group_scores
from dtrak_jax.attribution.influence import (
    damping_path,
    influence,
    relative_influence,
    renormalised_influence,
)
from dtrak_jax.attribution.kernel import Kernels
from dtrak_jax.attribution.layers import LayerWeights, layer_weights
from dtrak_jax.attribution.mean import ensemble_mean
from dtrak_jax.attribution.null import floor, group_floor
from dtrak_jax.attribution.retraining import (
    datamodels,
    empirical_influence,
    metagradient,
)
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.attribution.sets import RemovalSet, removal_set
from dtrak_jax.attribution.similarity import (
    embedding_cosine,
    embedding_dot,
    gas,
    gradient_cosine,
    gradient_dot,
    pixel_cosine,
    pixel_dot,
    random_scores,
    tracin,
)

__all__ = [
    "DEFAULT_DAMPING",
    "GRID",
    "Damping",
    "Kernels",
    "LayerWeights",
    "PairSum",
    "Predictions",
    "RemovalSet",
    "Scores",
    "absolute",
    "coverage",
    "damping_path",
    "das",
    "datamodels",
    "effective",
    "ekfac_influence",
    "embedding_cosine",
    "embedding_dot",
    "empirical_influence",
    "ensemble_mean",
    "floor",
    "gas",
    "gauss_newton_influence",
    "gradient_cosine",
    "gradient_dot",
    "group_floor",
    "group_scores",
    "influence",
    "layer_weights",
    "metagradient",
    "near_duplicates",
    "pixel_cosine",
    "pixel_dot",
    "predict",
    "random_scores",
    "relative_influence",
    "removal_set",
    "renormalised_influence",
    "tracin",
]
