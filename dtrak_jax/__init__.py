"""Data attribution for diffusion models in JAX."""

from importlib import metadata
from typing import TYPE_CHECKING

from dtrak_jax import models
from dtrak_jax.attribute import attribute
from dtrak_jax.attribution import (
    Scores,
    absolute,
    damping_path,
    effective,
    ekfac_influence,
    ensemble_mean,
    gauss_newton_influence,
    layer_weights,
    near_duplicates,
    predict,
    removal_set,
)
from dtrak_jax.data import load_images
from dtrak_jax.diffusion import (
    Schedule,
    cosine_schedule,
    flow_schedule,
    linear_schedule,
    scaled_linear_schedule,
)
from dtrak_jax.evaluation.metagradient import metagradients
from dtrak_jax.evaluation.outputs import QueryLosses
from dtrak_jax.evaluation.trust import lds, retrain
from dtrak_jax.evaluation.truth import RetrainedLosses
from dtrak_jax.evaluation.without import counterfactual
from dtrak_jax.features import (
    Features,
    Projection,
    Task,
    distortion,
    ekfac,
    featurize,
    gauss_newton,
    merge,
    probes,
)
from dtrak_jax.models.tags import layer

if TYPE_CHECKING:
    from dtrak_jax.report import write_report

__version__ = metadata.version("dtrak-jax")

__all__ = [
    "Features",
    "Projection",
    "QueryLosses",
    "RetrainedLosses",
    "Schedule",
    "Scores",
    "Task",
    "absolute",
    "attribute",
    "cosine_schedule",
    "counterfactual",
    "damping_path",
    "distortion",
    "effective",
    "ekfac",
    "ekfac_influence",
    "ensemble_mean",
    "featurize",
    "flow_schedule",
    "gauss_newton",
    "gauss_newton_influence",
    "layer",
    "layer_weights",
    "lds",
    "linear_schedule",
    "load_images",
    "merge",
    "metagradients",
    "models",
    "near_duplicates",
    "predict",
    "probes",
    "removal_set",
    "retrain",
    "scaled_linear_schedule",
    "write_report",
]


def __getattr__(name: str):
    """Imports `write_report` when it is first used: drawing takes seconds to import."""
    if name == "write_report":
        from dtrak_jax.report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
