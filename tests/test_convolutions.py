"""Kernel gradients as matrix products are the kernel gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtrak_jax.features.convolutions import kernel_gradients_as_products

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolution(x, kernel, **options):
    given = {"window_strides": (1, 1), "padding": "SAME"} | options
    return jax.lax.conv_general_dilated(
        x, kernel, **given, dimension_numbers=DIMENSIONS
    )


def inputs(x_shape, kernel_shape):
    """Random x and kernel."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in (x_shape, kernel_shape)]


def both(network, kernel, x):
    """Every example's own gradient, by `vmap`, as it is and rewritten."""

    def own(x, rewrite):
        y, pull_back = jax.vjp(lambda kernel: network(x[None], kernel), kernel)
        return rewrite(pull_back)(jnp.sin(y))[0]

    return [
        jax.vmap(lambda x, f=f: own(x, f))
        for f in (lambda f: f, kernel_gradients_as_products)
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
    x, kernel = inputs((4, 6, 7, 2), (*window, 2, 3))

    def network(x, kernel):
        return convolution(x, kernel, **options)

    positions = math.prod(network(x, kernel).shape[1:3])
    plain, rewritten = both(network, kernel, x)
    np.testing.assert_allclose(rewritten(x), plain(x), rtol=1e-4, atol=1e-4)
    assert "feature_group_count=4" in operations(plain, x)
    if math.prod(window) <= positions:
        assert "feature_group_count=4" not in operations(rewritten, x)


def test_inside_of_jit_and_checkpoint():
    """Found in a jitted layer; one that is recomputed, or in a loop, stays right."""
    x, kernel = inputs((4, 6, 6, 2), (3, 3, 2, 2))

    def looped(x, kernel):
        step = lambda x, _: (jnp.tanh(convolution(x, kernel)), None)
        return jax.lax.scan(step, x, None, length=2)[0]

    for network in (
        jax.jit(convolution),
        jax.checkpoint(lambda x, kernel: jnp.tanh(convolution(x, kernel))),
        looped,
    ):
        plain, rewritten = both(network, kernel, x)
        np.testing.assert_allclose(rewritten(x), plain(x), rtol=1e-4, atol=1e-5)
    _, rewritten = both(jax.jit(convolution), kernel, x)
    assert "feature_group_count=4" not in operations(rewritten, x)


def test_groups_stay():
    """A convolution with groups is left as it is."""
    x, kernel = inputs((4, 6, 6, 4), (3, 3, 2, 6))

    def network(x, kernel):
        return convolution(x, kernel, feature_group_count=2)

    plain, rewritten = both(network, kernel, x)
    np.testing.assert_allclose(rewritten(x), plain(x), rtol=1e-4, atol=1e-5)
