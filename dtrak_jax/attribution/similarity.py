"""Baselines that look at images and not at the model: similarity, and chance."""

from collections.abc import Sequence

import jax
import numpy as np

from dtrak_jax import streams
from dtrak_jax.data.checks import check_images


def pixel_dot(train_images: np.ndarray, query_images: np.ndarray) -> np.ndarray:
    """x_q . x_n of the pixels, float64 [q, n]: the D-TRAK paper's "raw pixel (dot)".

    Args:
      train_images: float32 [n, H, W, C] in [-1, 1].
      query_images: float32 [q, H, W, C] in [-1, 1].
    """
    train, query = _pixels(train_images, query_images)
    return query @ train.T


def pixel_cosine(train_images: np.ndarray, query_images: np.ndarray) -> np.ndarray:
    """x_q . x_n / (||x_q|| ||x_n||), float64 [q, n]; arguments as in `pixel_dot`.

    The D-TRAK paper's "raw pixel (cos)". An image of zeros has similarity 0.
    """
    return embedding_cosine(*_pixels(train_images, query_images))


def embedding_cosine(train: np.ndarray, query: np.ndarray) -> np.ndarray:
    """e_q . e_n / (||e_q|| ||e_n||), float64 [q, n], of any embeddings.

    With the embeddings of CLIP's image encoder (arXiv 2103.00020) this is the D-TRAK
    paper's "CLIP similarity". An embedding of zeros has similarity 0.

    Args:
      train: [n, d].
      query: [q, d].

    Raises:
      ValueError: other shapes.
    """
    if train.ndim != 2 or query.ndim != 2 or train.shape[1] != query.shape[1]:
        raise ValueError(
            f"train embeddings have shape {train.shape} and query embeddings "
            f"{query.shape}; they must be [n, d] and [q, d]."
        )
    return unit_rows(query) @ unit_rows(train).T


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Every row of [n, d] over its Euclidean norm, in float64; zeros stay zeros."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def random_scores(
    train_ids: Sequence[str], query_ids: Sequence[str], seed: int = 0
) -> np.ndarray:
    """Standard normal scores, float64 [q, n]: what a method must beat.

    A pair's score is a function of the seed and of its two ids: it does not change
    with what else is scored, nor in which order.
    """
    train, query = streams.id_words(train_ids), streams.id_words(query_ids)
    key = streams.stream(seed, "random scores")
    return np.asarray(_normals(key, train, query), np.float64)


@jax.jit
def _normals(key: jax.Array, train: np.ndarray, query: np.ndarray) -> jax.Array:
    def row(query_words):
        of_query = streams.fold_in(key, *query_words)
        return jax.vmap(
            lambda words: jax.random.normal(streams.fold_in(of_query, *words))
        )(train)

    return jax.lax.map(row, query)


def _pixels(train_images, query_images) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 rows of pixels."""
    check_images(train_images)
    check_images(query_images)
    if train_images.shape[1:] != query_images.shape[1:]:
        raise ValueError(
            f"train images have shape {train_images.shape} and query images "
            f"{query_images.shape}; they may differ in the number of images only."
        )
    train, query = (
        np.asarray(images, np.float64).reshape(len(images), -1)
        for images in (train_images, query_images)
    )
    return train, query
