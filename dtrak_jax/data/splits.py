"""Which examples: choices that depend on a seed and on ids, and on nothing else.

They use no random number generator, so that they stay what they are under every
version of NumPy and JAX, and no positions, so that they do not depend on the order in
which a data set happens to be stored.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from dtrak_jax.data.checks import check_ids


def choose(
    ids: Sequence[str] | np.ndarray,
    labels: Sequence | np.ndarray | None,
    count: int,
    seed: int,
    stream: str,
) -> np.ndarray:
    """Chooses `count` examples, and of every label its share.

    Of n examples, m of which have some label, floor(count * m / n) with that label
    are chosen, or one more: the labels with the largest remainders get one more until
    the total is `count` (Hamilton's method, as in scikit-learn's stratified splits).
    Within a label the examples with the smallest hashes are chosen, and equal
    remainders are ordered by a hash of the label. The hash is blake2b of 8 bytes of
    "{seed}/{stream}/{id}".

    Args:
      ids: n different strings.
      labels: [n], integers or strings; None chooses by hash alone.
      count: how many, from 0 to n.
      seed: any integer.
      stream: what the choice is for; different streams are independent.

    Returns:
      [count] indices into `ids`, ascending.

    Raises:
      ValueError: repeated ids, as many labels as there are not ids, or a count that
        is out of range.
    """
    n = len(ids)
    check_ids(ids, n)
    labels = np.zeros(n, int) if labels is None else np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"labels have shape {labels.shape}; there are {n} ids.")
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} examples cannot be chosen.")
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
    """Which examples a member of a retraining ensemble is trained on.

    Members are independent stratified choices (`choose`) of round(fraction * n)
    examples; a member does not change when others are added.

    Args:
      ids: n different strings.
      labels: [n], or None.
      seed: of the whole ensemble.
      member: number of the member, from 0.
      fraction: of the examples, strictly between 0 and 1.

    Returns:
      bool [n].

    Raises:
      ValueError: as `choose`, or a fraction or member out of range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be between 0 and 1.")
    if member < 0:
        raise ValueError(f"member is {member}; members are numbered from 0.")
    mask = np.zeros(len(ids), bool)
    count = round(fraction * len(ids))
    mask[choose(ids, labels, count, seed, f"subset/{member}")] = True
    return mask


def _hash(prefix: str, names: Iterable) -> np.ndarray:
    """uint64 [n]: one number for each "prefix/name"."""
    digests = (
        hashlib.blake2b(f"{prefix}/{name}".encode(), digest_size=8).digest()
        for name in names
    )
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
