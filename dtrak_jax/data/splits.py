"""Choices of examples, which depend on a seed and on ids, and on nothing else.

A choice uses no random number generator, so that it stays the same under every version
of NumPy and JAX, and no positions, so that it does not depend on the order in which a
data set happens to be stored.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from dtrak_jax.checks import check_ids


def choose(
    ids: Sequence[str] | np.ndarray,
    labels: Sequence | np.ndarray | None,
    count: int,
    seed: int,
    stream: str,
) -> np.ndarray:
    """Returns the indices of `count` examples, with its share of every label.

    If m of n examples have a label, floor(count * m / n) with that label are chosen,
    or one more: the labels with the largest remainders get one more until
    the total is `count` (Hamilton's method, as in scikit-learn's stratified splits).
    Within a label the examples with the smallest hashes are chosen, and equal
    remainders are ordered by a hash of the label. The hash is blake2b of 8 bytes of
    "{seed}/{stream}/{id}".

    Args:
      ids: n different strings.
      labels: [n] integers or strings; None chooses by hash alone.
      count: the number of examples to choose, from 0 to n.
      seed: any integer.
      stream: the name of the choice; choices of different names are independent.

    Returns:
      [count] indices into `ids`, ascending.

    Raises:
      ValueError: an id is repeated.
    """
    n = len(ids)
    check_ids(ids, n)
    labels = np.zeros(n, int) if labels is None else np.asarray(labels)
    kinds, kind, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares, remainders = np.divmod(count * sizes, max(n, 1))
    ties = _hash(f"{seed}/{stream}/label", kinds)
    shares[np.lexsort((ties, -remainders))[: count - shares.sum()]] += 1

    order = np.lexsort((_hash(f"{seed}/{stream}", ids), kind))
    rank = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[rank < np.repeat(shares, sizes)])


def subset_mask(
    ids: Sequence[str] | np.ndarray,
    labels: Sequence | np.ndarray | None,
    seed: int,
    member: int,
    fraction: float = 0.5,
) -> np.ndarray:
    """Returns a mask, bool [n], of the examples that a member of an ensemble trains on.

    Subsets are independent stratified choices (`choose`) of round(fraction * n)
    examples, of the ensemble's seed and the member's number alone.
    """
    mask = np.zeros(len(ids), bool)
    count = round(fraction * len(ids))
    mask[choose(ids, labels, count, seed, f"subset/{member}")] = True
    return mask


def _hash(prefix: str, names: Iterable) -> np.ndarray:
    """Returns the hash of each "prefix/name", uint64 [n]."""
    texts = (f"{prefix}/{name}".encode() for name in names)
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
