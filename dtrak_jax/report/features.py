"""Features and kernels: what scores were made of."""

from collections.abc import Mapping

import numpy as np

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.methods import METHODS
from dtrak_jax.report.charts import spectrum
from dtrak_jax.report.record import Recipe
from dtrak_jax.report.text import grouped


def features(recipe: Recipe | None, scores: Mapping[str, list[Scores]]) -> dict | None:
    """Returns what the features are, and the spectra of the kernels.

    None if no method needs features, or nobody says how they were made. The scores are
    {method: those of every set}.
    """
    users = grouped(scores, measurement)
    users.pop(None, None)
    if not users or recipe is None:
        return None
    return {
        "users": users,
        "recipe": recipe,
        "spectra": [
            _spectrum(s, recipe.kernels)
            # Kernels are of the training images, and the same for every set of queries.
            for s, *_ in scores.values()
            if s.eigenvalues is not None and len(s.eigenvalues) == len(recipe.kernels)
        ],
    }


def layers(scores: Mapping[str, Mapping[str, Scores]]) -> list[dict]:
    """Returns the weight and share of each group of layers, of the methods that weigh them.

    The scores are {set: {method: those}}.
    """
    return [
        {
            "method": s.method,
            "set": name,
            "rows": [(group, *map(float, pair)) for group, pair in s.layers.items()],
        }
        for name, of_set in scores.items()
        for s in of_set.values()
        if s.layers
    ]


def measurement(method: str) -> str | None:
    """Returns the measurement of a method; one of a user's own has a method's name."""
    return METHODS[method].measurement if method in METHODS else method


def _spectrum(scores: Scores, kernels: list[str]) -> dict:
    """Returns a method's spectra, with λ and effective dimension of every kernel."""
    eigenvalues, lambdas = scores.eigenvalues, scores.lambdas
    dims = np.sum(eigenvalues / (eigenvalues + lambdas[:, None]), axis=1)
    return {
        "method": scores.method,
        "chart": spectrum(scores, kernels),
        "size": eigenvalues.shape[1],
        "range": list(dict.fromkeys(f"{dim:.0f}" for dim in (min(dims), max(dims)))),
        "kernels": list(zip(kernels, lambdas, dims, strict=True)),
    }
