"""Random numbers as functions of a seed and of stable indices.

Nothing here depends on a position in a batch, on the number of devices or on what was
drawn before, so results do not change when those do.
"""

import hashlib
import zlib
from collections.abc import Sequence

import jax
import numpy as np


def stream(seed: int | jax.Array, name: str) -> jax.Array:
    """Returns the key of one named use of a seed, such as "noise" or "batches".

    It is Threefry's, whatever the platform's default generator: features that were
    computed on a TPU and on a CPU must have seen the same noise.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def id_words(ids: Sequence[str]) -> np.ndarray:
    """Returns 64 bits of every id's BLAKE2 hash, uint32 [n, 2], to fold into a key."""
    digests = (hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(b"".join(digests), dtype="<u4").reshape(-1, 2)


def fold_in(key: jax.Array, *indices: int | jax.Array) -> jax.Array:
    """Returns the key with each of the indices folded in, in this order."""
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
