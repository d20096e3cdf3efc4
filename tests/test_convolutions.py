"""Gradients of weights as matrix products are the gradients of weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtrak_jax.features.convolutions import weight_gradients_as_products

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolution(x, weight, **options):
    given = {"window_strides": (1, 1), "padding": "SAME"} | options
    return jax.lax.conv_general_dilated(
        x, weight, **given, dimension_numbers=DIMENSIONS
    )


def inputs(x_shape, weight_shape):
    """Random x and weight."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in (x_shape, weight_shape)]


def both(network, weight, x):
    """Every example's own gradient, by `vmap`, as it is and rewritten."""

    def gradient(x, rewrite):
        y, pull_back = jax.vjp(lambda weight: network(x[None], weight), weight)
        return rewrite(pull_back)(jnp.sin(y))[0]

    return [
        jax.vmap(lambda x, f=f: gradient(x, f))
        for f in (lambda f: f, weight_gradients_as_products)
    ]


def operations(function, x):
    """The program, as JAX prints it."""
    return str(jax.make_jaxpr(function)(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "VALID"},
        {"padding": [(2, 0), (1, 3)]},
        {"padding": [(-1, 0), (0, -1)]},
        {"window_strides": (2, 1)},
        {"window_strides": (3, 2), "padding": "VALID"},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (1, 2), "padding": [(0, 0), (1, 1)]},
        {
            "window_strides": (2, 2),
            "rhs_dilation": (1, 2),
            "lhs_dilation": (3, 1),
            "padding": [(0, 2), (1, 0)],
        },
    ],
)
@pytest.mark.parametrize("window", [(3, 3), (1, 1), (2, 4), (5, 4)])
def test_any_convolution(window, options):
    x, weight = inputs((4, 6, 7, 2), (*window, 2, 3))

    def network(x, weight):
        return convolution(x, weight, **options)

    positions = math.prod(network(x, weight).shape[1:3])
    plain, rewritten = both(network, weight, x)
    np.testing.assert_allclose(rewritten(x), plain(x), rtol=1e-4, atol=1e-4)
    assert "feature_group_count=4" in operations(plain, x)
    if math.prod(window) <= positions:
        assert "feature_group_count=4" not in operations(rewritten, x)


def test_inside_of_jit_and_checkpoint():
    """Found in a jitted layer; one that is recomputed, or in a loop, stays right."""
    x, weight = inputs((4, 6, 6, 2), (3, 3, 2, 2))

    def looped(x, weight):
        step = lambda x, _: (jnp.tanh(convolution(x, weight)), None)
        return jax.lax.scan(step, x, None, length=2)[0]

    for network in (
        jax.jit(convolution),
        jax.checkpoint(lambda x, weight: jnp.tanh(convolution(x, weight))),
        looped,
    ):
        plain, rewritten = both(network, weight, x)
        np.testing.assert_allclose(rewritten(x), plain(x), rtol=1e-4, atol=1e-5)
    _, rewritten = both(jax.jit(convolution), weight, x)
    assert "feature_group_count=4" not in operations(rewritten, x)


def test_groups_stay():
    """A convolution with groups is left as it is."""
    x, weight = inputs((4, 6, 6, 4), (3, 3, 2, 6))

    def network(x, weight):
        return convolution(x, weight, feature_group_count=2)

    plain, rewritten = both(network, weight, x)
    np.testing.assert_allclose(rewritten(x), plain(x), rtol=1e-4, atol=1e-5)
