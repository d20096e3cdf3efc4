"""Distances between images: of their pixels, and of embeddings."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from dtrak_jax import models, parallel
from dtrak_jax.diffusion import Schedule
from dtrak_jax.network import Params

Embedding = Callable[[np.ndarray], np.ndarray]
"""A map of images [n, H, W, C] in [-1, 1] to vectors [n, d]."""


def distances(
    original: np.ndarray, images: np.ndarray, embeddings: Mapping[str, Embedding]
) -> dict[str, np.ndarray]:
    """Returns how far images [Q, H, W, C] are from the original ones, by metric [Q].

    "pixel_l2" is the Euclidean distance of the flattened pixels in [-1, 1]. For each
    embedding f, "NAME_cosine" is <f(a), f(b)> / (|f(a)| |f(b)|), and 0 where one of
    them is the zero vector.
    """
    flat = (images - original).reshape(len(images), -1).astype(np.float64)
    metrics = {"pixel_l2": np.linalg.norm(flat, axis=1)}
    for name, embed in embeddings.items():
        a, b = (np.asarray(embed(x), np.float64) for x in (original, images))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        products = np.einsum("qd,qd->q", a, b)
        metrics[f"{name}_cosine"] = products / np.where(norms == 0, 1, norms)
    return metrics


def bottleneck(
    model: models.UNet2D,
    params: Params,
    schedule: Schedule,
    images: np.ndarray,
    batch_size: int = 64,
) -> Embedding:
    """Returns the embedding by the network's lowest level, see `models.bottleneck_fn`.

    Images are shown without noise, as if at the timestep T // 100, where there is
    hardly any. The mean over `images` is subtracted: what all of them share would make
    every cosine almost 1.

    Args:
      model: the network.
      params: the original model's, so that all images are seen by the same network.
      schedule: the noise schedule that the model was trained with.
      images: the training images [n, H, W, C].
      batch_size: images at once.
    """
    features = models.bottleneck_fn(model)
    t = schedule.steps // 100

    def embed(images: np.ndarray) -> np.ndarray:
        size = min(batch_size, len(images))
        blocks = []
        for start in range(0, len(images), size):
            x = parallel.pad(images[start : start + size], size)
            blocks.append(np.asarray(features(params, x, jnp.full(size, t))))
        return np.concatenate(blocks)[: len(images)]

    mean = embed(images).mean(axis=0)
    return lambda images: embed(images) - mean
