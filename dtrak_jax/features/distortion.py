"""The distortion of inner products by a projection, measured on a user's gradients."""

from typing import NamedTuple

import numpy as np

from dtrak_jax.features.featurize import featurize
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import Features
from dtrak_jax.features.task import Task


class Distortion(NamedTuple):
    """Errors of normalised inner products, (<phi, phi'> - <g, g'>) / (|g| |g'|).

    A random projection to k dimensions has a root mean square error of about
    1/sqrt(k) where gradients are unrelated, and more where they are alike.
    """

    rms: float  # root mean square over pairs of different examples, and over timesteps
    largest: float  # largest absolute error of such a pair
    norm_rms: float  # root mean square of |phi|^2 / |g|^2 - 1
    examples: int  # number of examples compared


def distortion(
    task: Task, params, images: np.ndarray, projection: Projection, **options
) -> Distortion | dict[str, Distortion]:
    """Measures the distortion of a projection on the gradients of some images.

    It holds their whole gradients in memory, len(images) x p numbers for each pair of a
    timestep and a draw: give it a handful of images, two or more. The arguments are those
    of `featurize`; a tuple of measurements gives {measurement: errors}.
    """
    exact = featurize(task, params, images, Projection("none"), **options)
    projected = featurize(task, params, images, projection, **options)
    if isinstance(exact, Features):
        return _compare(exact, projected)
    return {name: _compare(exact[name], projected[name]) for name in exact}


def _compare(exact: Features, projected: Features) -> Distortion:
    """Compares Gram matrices, one for each pair of a timestep and a draw."""
    if len(exact.ids) < 2:
        raise ValueError("distortion compares pairs: give two or more images.")
    off, diagonal = [], []
    for g, phi in zip(exact.by_pair(), projected.by_pair(), strict=True):
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
        examples=len(exact.ids),
    )
