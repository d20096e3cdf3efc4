"""Random numbers as functions of a seed and of stable indices.

Nothing here depends on a position in a batch, on the number of devices or on what was
drawn before, so results do not change when those do. Nor does it depend on JAX's switches
(jax_threefry_partitionable, jax_random_seed_offset, jax_default_prng_impl, jax_enable_x64):
with their defaults the draws are those of `jax.random`, bit for bit.
"""

import hashlib
import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

LARGEST_SEED = 2**32 - 1


def stream(seed: int | jax.Array, name: str) -> jax.Array:
    """Returns the key of one named use of a seed, such as "noise".

    It is Threefry's, whatever the platform's default generator: features that were
    computed on a TPU and on a CPU must have seen the same noise.
    """
    words = jnp.zeros(2, jnp.uint32).at[1].set(jnp.asarray(seed, jnp.uint32))
    return fold_in(_key(words), zlib.crc32(name.encode()))


def id_words(ids: Sequence[str]) -> np.ndarray:
    """Returns 64 bits of every id's BLAKE2 hash, uint32 [n, 2], to fold into a key."""
    digests = (hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(b"".join(digests), dtype="<u4").reshape(-1, 2)


def fold_in(key: jax.Array, *indices: int | jax.Array) -> jax.Array:
    """Returns the key with each of the indices folded in, in this order."""
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def split(key: jax.Array, count: int) -> jax.Array:
    """Returns so many keys that are independent of each other [count]."""
    return _key(jnp.stack(threefry(key, *_counter((count,))), axis=-1))


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns random uint32 numbers of a shape."""
    first, second = threefry(key, *_counter(shape))
    return first ^ second


def uniform(
    key: jax.Array, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> jax.Array:
    """Returns float32 numbers that are uniform in [low, high), 2^23 different ones."""
    # The bits are the mantissas of numbers in [1, 2).
    ones = (random_bits(key, shape) >> 9) | jnp.uint32(0x3F800000)
    share = jax.lax.bitcast_convert_type(ones, jnp.float32) - 1
    low, high = np.float32(low), np.float32(high)
    return jnp.maximum(low, share * (high - low) + low)


def normal(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Returns standard normal numbers, float32."""
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform(key, shape, lowest, 1.0))


def bernoulli(
    key: jax.Array, share: float = 0.5, shape: tuple[int, ...] = ()
) -> jax.Array:
    """Returns booleans of which this share is True."""
    return uniform(key, shape) < np.float32(share)


def below(key: jax.Array, count: int) -> jax.Array:
    """Returns one of 0 to count - 1, int32."""
    high, low = (random_bits(part, ()) for part in split(key, 2))
    span = jnp.uint32(count)
    # high 2^32 + low modulo the span, without numbers of 64 bits.
    unit = jnp.uint32(2**16) % span
    unit = unit * unit % span
    return (((high % span) * unit + low % span) % span).astype(jnp.int32)


def threefry(
    key: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns Threefry's two words for each counter of two words, all uint32."""
    # Keys of RBG have two more words.
    words = jax.random.key_data(key)
    return tuple(threefry2x32_p.bind(words[0], words[1], first, second))


def _key(words: jax.Array) -> jax.Array:
    """Returns the key or keys of words [..., 2]."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _counter(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns two words that count the entries of an array."""
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return jnp.zeros_like(index), index
