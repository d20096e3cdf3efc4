"""Features and kernels: what scores were made of."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.methods import METHODS
from dtrak_jax.report.charts import spectrum
from dtrak_jax.report.text import grouped

if TYPE_CHECKING:
    from dtrak_jax.run import Run


def features(run: "Run", scores: Mapping[str, list[Scores]]) -> dict | None:
    """Returns what the features are, and the spectra of the kernels.

    None if no method needs features. The scores are {method: those of every set}.
    """
    users = grouped(scores, lambda method: METHODS[method].measurement)
    users.pop(None, None)
    if not users:
        return None
    task = run.task()
    draw = ", draw {}" if task.draws > 1 else ""
    kernels = [f"t = {t}{draw.format(d)}" for t, d in task.pairs]
    return {
        "users": users,
        "timesteps": task.grid,
        "distortion": run.json("features/distortion"),
        "spectra": [
            _spectrum(s, kernels if task.per_timestep else ["average"])
            # Kernels are of the training images, and the same for every set of queries.
            for s, *_ in scores.values()
            if s.eigenvalues is not None
        ],
    }


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
