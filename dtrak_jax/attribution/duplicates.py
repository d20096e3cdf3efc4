"""Near-duplicates among the training images, which rankings count once.

A contributor who gave one picture five times has not given five. Two images are the same
picture where their pixels are equal, or where the model learns the same from them: where
the cosine of their features is close to 1.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dtrak_jax.attribution.inputs import Array, as_features, by_pair, example_ids
from dtrak_jax.checks import between
from dtrak_jax.features.store import Features, chunks_of
from dtrak_jax.progress import progress

COUNTED_ONCE = frozenset(
    (
        *("gradient-dot", "gradient-cosine", "tracin", "gas", "relative-influence"),
        *("pixel-dot", "pixel-cosine", "clip-dot", "clip-cosine"),
    )
)
"""The methods whose scores do not shrink where there is another copy of an image.

Their cluster has the score of its highest member. In a kernel a copy takes from the other:
with the leverage h = phi^T (Phi^T Phi + lambda I)^-1 phi of an image, its score falls to
1 / (1 + h) of what it was once there is a copy of it. Both together have 2 / (1 + h) of it,
from what one would have (h = 1) to twice that (h = 0), which is what removing both is
estimated to do. Their cluster has the sum. On 1,000 digits h is .22 (`square`) and .46
(`loss`) in the median, so that each of two copies keeps 82% and 68%.
"""

THRESHOLD = 0.97
"""The least cosine of near-duplicates.

Of 1,000 digits under their trained model with 5 timesteps, a single pair reaches it (.988
of `square`, .973 of `loss`), of the same numeral drawn almost alike; no other reaches .962
and .938. Copies were planted of 50 of them. All exact copies reach it, and all with one
pixel changed by a sixteenth of its range; of those with noise of 1.5% of the range, 100%
(`square`) and 98% (`loss`); with a pixel changed by half its range 20% and 6%; and none
that was shifted by a pixel, which is another picture to the model.
"""

LEAST_DIMENSION = 16
"""The least effective dimension of features that tell pictures apart; digits have 28."""

SAMPLE = 1024
"""Images whose cosines tell the effective dimension."""

ENTRIES = 2**26
"""Cosines that are added up at one time."""


def near_duplicates(
    train: Array, digests: Sequence[str] | None = None, threshold: float = THRESHOLD
) -> np.ndarray:
    """Returns for each training image the id of the first one of its near-duplicates.

    An image without any has its own id. The cosine of two images is that of their
    features less the training set's mean, over all pairs j of a timestep and a draw,

      c(m, n) = sum_j a_j(m) . a_j(n) / sqrt(sum_j ||a_j(m)||^2 sum_j ||a_j(n)||^2),
      a_j(n) = phi_j(n) - (1/N) sum_i phi_j(i).

    Near-duplicates are the connected components of all c(m, n) >= threshold and of all
    equal digests. Features tell of nothing but exact copies where noise is not shared,
    as those of one picture differ then; and where they have an effective dimension, that
    of independent normal numbers with the same median of c^2, below `LEAST_DIMENSION`.
    It takes n^2 k J / 2 multiplications, and twice the memory of `ENTRIES` cosines and of
    one pair's features.

    Args:
      train: features of the training set, [J, n, k] or [n, k].
      digests: of the images' pixels [n], such as `Dataset.digests`, if they are known.
      threshold: from 0 to 1.

    Returns:
      str [n], to be `Scores.copies`.

    Raises:
      ValueError: features of another shape, digests of other images, or a threshold
        that is not from 0 to 1.
    """
    copies, why = found(train, digests, threshold)
    warn_of(why)
    return copies


def warn_of(why: str) -> None:
    """Warns that near-duplicates were not looked for, if there is a reason."""
    if why:
        warnings.warn(
            f"Of near-duplicates only copies with the same pixels are found: {why}, and "
            f"cannot tell (common noise and a dimension of {LEAST_DIMENSION} can).",
            stacklevel=3,
        )


class Found(NamedTuple):
    """Near-duplicates, and whether features could tell them."""

    copies: np.ndarray
    """See `near_duplicates`, str [n]."""
    why: str
    """The reason why there are exact copies alone; "" if features were compared."""


def found(
    train: Array, digests: Sequence[str] | None = None, threshold: float = THRESHOLD
) -> Found:
    """Returns the near-duplicates of `near_duplicates`, and no warning but the reason."""
    train, threshold = as_features(train), between("threshold", threshold, 0, 1)
    if len(train.shape) not in (2, 3) or 0 in train.shape:
        raise ValueError(
            f"train features have shape {tuple(train.shape)}; it must be [J, n, k] or "
            "[n, k], with nothing empty."
        )
    ids, edges, why = example_ids(train), [], "features do not share their noise"
    if digests is not None:
        edges.append(_equal(ids, digests))
    if not isinstance(train, Features) or train.fingerprint["noise"] == "common":
        alike, why = _alike(train, threshold)
        edges += alike
    return Found(_first_of_each(ids, edges), why)


def exact_copies(ids: Sequence[str], digests: Sequence[str]) -> np.ndarray:
    """Returns for each image the id of the first one with the same digest, str [n]."""
    ids = np.asarray(ids)
    return _first_of_each(ids, [_equal(ids, digests)])


def _first_of_each(ids: np.ndarray, edges: list[np.ndarray]) -> np.ndarray:
    """Returns the id of the first image of each one's connected component."""
    a, b = np.concatenate([np.empty((2, 0), int), *edges], axis=1)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(ids), len(ids)))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return ids[first[component]]


def _equal(ids: np.ndarray, digests: Sequence[str]) -> np.ndarray:
    """Returns pairs of images, [2, pairs], that join all whose digests are equal."""
    if len(digests) != len(ids):
        raise ValueError(
            f"digests has {len(digests)} entries; it must have one for each of the "
            f"{len(ids)} training images."
        )
    _, first, index = np.unique(digests, return_index=True, return_inverse=True)
    return np.stack([first[index], np.arange(len(ids))])


def _alike(train: Array, threshold: float) -> tuple[list[np.ndarray], str]:
    """Returns pairs of images with such a cosine, [2, pairs] for each block of rows, or
    the reason why cosines do not tell."""
    n, means, squares, sizes = train.shape[-2], [], 0.0, 0.0
    for phi in by_pair(train):
        means.append(phi.mean(axis=0, dtype=np.float64).astype(np.float32))
        squares = squares + _squares(phi - means[-1])
        sizes = sizes + _squares(phi)
    # What is left of equal features is rounding.
    varies = squares > 1e-10 * sizes
    scale = (1 / np.sqrt(np.where(varies, squares, np.inf))).astype(np.float32)
    edges, chunks = [], chunks_of(n, max(1, ENTRIES // n))
    for rows in progress(chunks, "near-duplicates", unit="block", delay=2):
        height, later = rows.stop - rows.start, slice(rows.start, n)
        cosines = np.zeros((height, n - rows.start), np.float32)
        for phi, mean in zip(by_pair(train), means, strict=True):
            differences = phi[later] - mean
            cosines += differences[:height] @ differences.T
        cosines *= scale[rows, None]
        cosines *= scale[later]
        if not rows.start:
            dimension = _dimension(cosines[:SAMPLE, :SAMPLE])
            if dimension < LEAST_DIMENSION:
                return [], f"features have an effective dimension of {dimension:.3g}"
        edges.append(np.argwhere(cosines >= threshold).T + rows.start)
    return edges, ""


def _squares(rows: np.ndarray) -> np.ndarray:
    """Returns the squared norm of every row, float64 [n]."""
    return np.einsum("nk,nk->n", rows, rows, dtype=np.float64)


def _dimension(cosines: np.ndarray) -> float:
    """Returns d, of the median of squared cosines between different images: for normal
    numbers the square of a cosine is chi^2 / d, whose median is .455 / d."""
    squares = cosines[~np.eye(len(cosines), cosines.shape[1], dtype=bool)] ** 2
    return 0.455 / max(np.median(squares), 1e-12) if squares.size else 0.0


def merge(
    rows: np.ndarray, copies: np.ndarray, function: np.ufunc
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices [m] of the first image of each cluster, ascending, and a
    function of each cluster's scores, such as the sum or the highest [q, m]."""
    _, first, index, sizes = np.unique(
        copies, return_index=True, return_inverse=True, return_counts=True
    )
    starts = np.cumsum(sizes) - sizes
    by_cluster = rows[:, np.argsort(index, kind="stable")]
    values = function.reduceat(by_cluster, starts, axis=1)
    order = np.argsort(first)
    return first[order], values[:, order]


def members(ids: np.ndarray, copies: np.ndarray) -> dict[str, list[str]]:
    """Returns the ids of the images of each cluster of two or more, by the first's id."""
    clusters: dict[str, list[str]] = {}
    for first, name in zip(copies.tolist(), ids.tolist(), strict=True):
        clusters.setdefault(first, []).append(name)
    return {first: names for first, names in clusters.items() if len(names) > 1}


def once_in_each_group(
    rows: np.ndarray, column: np.ndarray, copies: np.ndarray
) -> np.ndarray:
    """Returns scores [q, n] of which a group's sum counts each picture once: the first of
    a group's copies has the highest of their scores, and all others have 0."""
    _, group = np.unique(column, return_inverse=True)
    _, cluster = np.unique(copies, return_inverse=True)
    first, highest = merge(rows, group * len(copies) + cluster, np.maximum)
    counted = np.zeros_like(rows)
    counted[:, first] = highest
    return counted
