"""Results do not depend on JAX's switches, or the switch is named."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax import rng
from dtrak_jax.attribution import random_scores
from dtrak_jax.digests import digest_program
from dtrak_jax.files import differences
from dtrak_jax.switches import standard

SWITCHES = {
    "threefry_partitionable": False,
    "enable_x64": True,
    "numpy_dtype_promotion": "strict",
    "numpy_rank_promotion": "raise",
    "disable_jit": True,
    "debug_nans": True,
    "transfer_guard": "disallow",
}
COUNTS = 2, 1000, 2**31 - 1
TASK = dtrak.Task(
    lambda params, x, t, cond: jnp.tanh(x @ params) / (1 + t.reshape(-1, 1, 1, 1)),
    dtrak.linear_schedule(),
    timesteps=(3, 600),
    noise="independent",
)


def equal(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a, b)


def test_draws_are_those_of_jax_bit_for_bit():
    @jax.jit
    def ours():
        key = rng.stream(2**32 - 1, "x")
        keys = rng.split(key, 300)
        return (
            jax.random.key_data(keys),
            rng.random_bits(key, (3, 5)),
            rng.normal(key, (3, 99)),
            rng.bernoulli(key, 0.3, (99,)),
            rng.uniform(key, (99,), -1, 3),
            [jax.vmap(lambda k, n=n: rng.below(k, n))(keys) for n in COUNTS],
        )

    @jax.jit
    def theirs():
        key = jax.random.key(2**32 - 1, impl="threefry2x32")
        key = jax.random.fold_in(key, zlib.crc32(b"x"))
        keys = jax.random.split(key, 300)
        return (
            jax.random.key_data(keys),
            jax.random.bits(key, (3, 5), jnp.uint32),
            jax.random.normal(key, (3, 99)),
            jax.random.bernoulli(key, 0.3, (99,)),
            jax.random.uniform(key, (99,), minval=-1, maxval=3),
            [
                jax.vmap(lambda k, n=n: jax.random.randint(k, (), 0, n))(keys)
                for n in COUNTS
            ],
        )

    with standard():
        jax.tree.map(equal, ours(), theirs())


def test_keys_of_the_default_generator_are_accepted():
    """A switch chooses it; RBG's keys have more words."""
    with standard():
        keys = [jax.random.key(5, impl=impl) for impl in ("rbg", "threefry2x32")]
        equal(*(rng.normal(key, (3,)) for key in keys))


def results():
    images = np.random.default_rng(0).uniform(-1, 1, (6, 2, 2, 3)).astype(np.float32)
    params = np.eye(3, dtype=np.float32)
    phi = dtrak.featurize(TASK, params, images, dtrak.Projection(dim=8), role="train")
    path = dtrak.damping_path(phi, phi, (1e-12, 1.0))
    return phi.fingerprint, np.asarray(phi), path, random_scores(phi.ids, phi.ids)


@pytest.fixture(scope="module")
def expected():
    return results()


@pytest.mark.parametrize("name", SWITCHES)
def test_results_do_not_depend_on_switches(expected, name):
    with getattr(jax, name)(SWITCHES[name]):
        fingerprint, *arrays = results()
    assert fingerprint == expected[0]
    for array, reference in zip(arrays, expected[1:], strict=True):
        equal(array, reference)


def test_the_precision_of_products_is_named(expected):
    """It may be meant, so it is not changed."""
    with jax.default_matmul_precision("highest"):
        fingerprint, *_ = results()
    clauses = differences(expected[0], fingerprint)
    assert clauses[0] == "jax_default_matmul_precision is None there and 'highest' here"


def test_constants_of_a_program_are_noticed_however_it_holds_them():
    """With this switch they are not in the program's text."""
    simplified = "jax_use_simplified_jaxpr_constants"
    before = getattr(jax.config, simplified)
    tables = (jnp.arange(99.0) * factor for factor in (1, 2, 1))
    try:
        jax.config.update(simplified, True)
        first, other, again = (
            digest_program(jax.jit(lambda i, table=table: table[i]), np.int32(0))
            for table in tables
        )
    finally:
        jax.config.update(simplified, before)
    assert first == again != other
