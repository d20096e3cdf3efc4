"""How far a projection distorts the inner products of somebody's own gradients."""

from typing import NamedTuple

import numpy as np

from dtrak_jax.features.loop import featurize
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.task import Task


class Distortion(NamedTuple):
    """Errors of normalised inner products, (<phi, phi'> - <g, g'>) / (|g| |g'|).

    A random projection to k dimensions has a root mean square error of about
    1/sqrt(k) where gradients are unrelated, and more where they are alike.
    """

    rms: float
    """Root mean square over pairs of different examples, and over timesteps."""
    largest: float
    """Largest absolute error of such a pair."""
    norm_rms: float
    """Root mean square of |phi|^2 / |g|^2 - 1."""
    examples: int
    """Number of examples compared."""


def distortion(
    task: Task, params, images: np.ndarray, projection: Projection, **options
) -> Distortion | dict[str, Distortion]:
    """Measures the distortion of a projection on the gradients of some images.

    Holds their whole gradients in memory: len(images) x p numbers for each pair of a
    timestep and a draw, so give it a handful of images.

    Args:
      task: see `featurize`.
      params: the network's parameters.
      images: two or more [n, H, W, C].
      projection: to be judged.
      **options: as `featurize` takes them: ids, cond, batch_size, proj_devices.

    Returns:
      The errors; or {measurement: errors} if the task has a tuple of them.
    """
    if len(images) < 2:
        raise ValueError("distortion compares pairs: give two or more images.")
    options = {"description": "distortion"} | options
    exact = featurize(task, params, images, Projection("none"), **options)
    ours = featurize(task, params, images, projection, **options)
    if not isinstance(exact, dict):
        return _compare(exact.kernels(), ours.kernels())
    return {m: _compare(exact[m].kernels(), ours[m].kernels()) for m in exact}


def _compare(exact, ours) -> Distortion:
    """Compares Gram matrices, one for each pair of a timestep and a draw."""
    off, diagonal = [], []
    for g, phi in zip(exact, ours, strict=True):
        g, phi = g.astype(np.float64), phi.astype(np.float64)
        norms = np.linalg.norm(g, axis=1)
        if not norms.all():
            raise ValueError("a gradient is exactly 0, so nothing can be compared.")
        error = (phi @ phi.T - g @ g.T) / np.outer(norms, norms)
        off.append(error[np.triu_indices(len(g), 1)])
        diagonal.append(np.diag(error))
    off, diagonal = np.concatenate(off), np.concatenate(diagonal)
    return Distortion(
        rms=float(np.sqrt(np.mean(off**2))),
        largest=float(np.abs(off).max()),
        norm_rms=float(np.sqrt(np.mean(diagonal**2))),
        examples=len(norms),
    )
