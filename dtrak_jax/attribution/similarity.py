"""Similarity of gradients, of images and of embeddings; and chance.

Of pair j, phi_j(n) are the features of a training example, [T, n, k] or [n, k], and
g_j(q) those of a query, of the same task, parameters and projection. What is 0 has
similarity 0 to everything. What does not belong together raises a ValueError. A `total`
that is given is what adds up the pairs, and knows the standard errors then.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dtrak_jax import rng
from dtrak_jax.attribution.errors import PairSum
from dtrak_jax.attribution.inputs import Array, by_pair, check_features, example_ids
from dtrak_jax.checks import check_images
from dtrak_jax.switches import standard


def gradient_dot(
    train: Array, query: Array, total: PairSum | None = None
) -> np.ndarray:
    """Returns (1/T) sum_j g_j(q) . phi_j(n), float64 [q, n].

    TracIn (arXiv 2002.08484) with one checkpoint; with averaged features the D-TRAK
    paper's "gradient (dot)".
    """
    return _mean_over_pairs(embedding_dot, [train], [query], total)


def gradient_cosine(
    train: Array, query: Array, total: PairSum | None = None
) -> np.ndarray:
    """Returns (1/T) sum_j g_j(q) . phi_j(n) / (||g_j(q)|| ||phi_j(n)||), float64 [q, n].

    With features kept apart and common noise this is the score of DMin (arXiv
    2412.08637) and of MOTIVE (arXiv 2601.08828), of projected gradients; with averaged
    features the D-TRAK paper's "gradient (cos)".
    """
    return _mean_over_pairs(embedding_cosine, [train], [query], total)


def tracin(
    trains: Sequence[Array], queries: Sequence[Array], total: PairSum | None = None
) -> np.ndarray:
    """Returns (1/C) sum_c gradient_dot at checkpoint c, float64 [q, n].

    TracInCP of Pruthi et al., "Estimating Training Data Influence by Tracing Gradient
    Descent" (arXiv 2002.08484), with every checkpoint at the same weight; with the
    learning rates that their equation has, this is the case of a constant one.
    """
    return _mean_over_pairs(embedding_dot, trains, queries, total)


def gas(
    trains: Sequence[Array], queries: Sequence[Array], total: PairSum | None = None
) -> np.ndarray:
    """Returns (1/C) sum_c gradient_cosine at checkpoint c, float64 [q, n].

    GAS of Hammoudeh and Lowd, "Identifying a Training-Set Attack's Target Using
    Renormalized Influence Estimation" (arXiv 2201.10055), with every checkpoint at the
    same weight.
    """
    return _mean_over_pairs(embedding_cosine, trains, queries, total)


def pixel_dot(train_images: np.ndarray, query_images: np.ndarray) -> np.ndarray:
    """Returns x_q . x_n of the pixels of images, or of their latents, float64 [q, n].

    It is the D-TRAK paper's "raw pixel (dot)", which for Stable Diffusion is of the mode
    of the autoencoder's posterior.
    """
    return embedding_dot(*_pixels(train_images, query_images))


def pixel_cosine(train_images: np.ndarray, query_images: np.ndarray) -> np.ndarray:
    """Returns x_q . x_n / (||x_q|| ||x_n||) of the same, float64 [q, n].

    It is the D-TRAK paper's "raw pixel (cos)".
    """
    return embedding_cosine(*_pixels(train_images, query_images))


def embedding_dot(train: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Returns e_q . e_n, float64 [q, n], of embeddings [q, d] and [n, d].

    With the embeddings of CLIP's image encoder (arXiv 2103.00020), not normalised, it is
    the D-TRAK paper's "CLIP similarity (dot)".
    """
    train, query = np.asarray(train), np.asarray(query)
    if train.ndim != 2 or query.ndim != 2 or train.shape[1] != query.shape[1]:
        raise ValueError(
            f"train embeddings have shape {train.shape} and query embeddings "
            f"{query.shape}; they must be [n, d] and [q, d]."
        )
    return query.astype(np.float64) @ train.astype(np.float64).T


def embedding_cosine(train: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Returns e_q . e_n / (||e_q|| ||e_n||), float64 [q, n], of embeddings [q, d], [n, d].

    With the embeddings of CLIP's image encoder it is the D-TRAK paper's "CLIP similarity
    (cos)".
    """
    return embedding_dot(_unit_rows(train), _unit_rows(query))


@standard()
def random_scores(
    train_ids: Sequence[str], query_ids: Sequence[str], seed: int = 0
) -> np.ndarray:
    """Returns standard normal scores, float64 [q, n]: what a method must beat.

    The score of a query and a training example is a function of the seed and of the two
    ids: it does not change with what else is scored, nor in which order.
    """
    train, query = rng.id_words(train_ids), rng.id_words(query_ids)
    key = rng.stream(seed, "random scores")
    return np.asarray(_normals(key, train, query), np.float64)


@jax.jit
def _normals(key: jax.Array, train: np.ndarray, query: np.ndarray) -> jax.Array:
    def normal(query_key, words):
        return rng.normal(rng.fold_in(query_key, *words))

    def row(query_words):
        query_key = rng.fold_in(key, *query_words)
        return jax.vmap(normal, (None, 0))(query_key, train)

    return jax.lax.map(row, query)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    """Returns every row of [n, d] over its Euclidean norm, in float64; zeros stay zeros."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _mean_over_pairs(
    score: Callable,
    trains: Sequence[Array],
    queries: Sequence[Array],
    total: PairSum | None,
) -> np.ndarray:
    """Returns the mean of score(phi [n, k], g [q, k]) over pairs and checkpoints.

    The checkpoints' scores are added up pair by pair, since they share the noise.
    """
    if len(trains) != len(queries) or not len(trains):
        raise ValueError(
            f"trains has {len(trains)} checkpoints and queries has {len(queries)}; they "
            "must have the same number, one or more."
        )
    checked = list(map(check_features, trains, queries))
    _check_checkpoints("trains", [train for train, _ in checked])
    _check_checkpoints("queries", [query for _, query in checked])
    pairs = math.prod(checked[0][0].shape[:-2])
    total, weight = total or PairSum(), 1 / (pairs * len(checked))
    by_checkpoint = [zip(*map(by_pair, both), strict=True) for both in checked]
    for checkpoints in zip(*by_checkpoint, strict=True):
        total.add(weight * sum(score(phi, g) for phi, g in checkpoints))
    return total.total


def _check_checkpoints(name: str, sets: Sequence[Array]) -> None:
    """Raises a ValueError unless features are of the same examples and pairs."""
    ids, pairs = example_ids(sets[0]), math.prod(sets[0].shape[:-2])
    for index, features in enumerate(sets):
        same = np.array_equal(example_ids(features), ids)
        if not same or math.prod(features.shape[:-2]) != pairs:
            raise ValueError(
                f"{name}[{index}] and {name}[0] have different ids or numbers of pairs; "
                "all checkpoints must have features of the same examples, in the same "
                "order, at the same timesteps."
            )


def _pixels(train_images, query_images) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as float64 rows of pixels."""
    # The range is checked where images are read, and latents have none.
    anything = -math.inf, math.inf
    train_images = check_images(train_images, anything)
    query_images = check_images(query_images, anything)
    if train_images.shape[1:] != query_images.shape[1:]:
        raise ValueError(
            f"train images have shape {train_images.shape} and query images "
            f"{query_images.shape}; they may differ in the number of images only."
        )
    both = train_images, query_images
    return tuple(rows.reshape(len(rows), -1).astype(np.float64) for rows in both)
