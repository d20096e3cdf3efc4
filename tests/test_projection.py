"""Projections keep inner products, exactly as often as they promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.features import projection as projections

KINDS = ("sketch", "rademacher", "gaussian")


def project(projection, gradient):
    return projections.project_all(projection, {"": [gradient]})[""]


def matrix(kind, p, k, seed=0):
    """The p x k matrix of a projection, from the unit vectors."""
    identity = np.eye(p, dtype=np.float32)
    return np.asarray(project(dtrak.Projection(kind, k, seed), identity))


def inner_products(kind, k, seeds, pair):
    """<phi, phi'> of a pair of gradients for each seed, by one program for all."""

    def inner(seed):
        projection = dtrak.Projection(kind, k)
        object.__setattr__(projection, "seed", seed)
        return jnp.prod(project(projection, pair), axis=0).sum()

    return np.asarray(jax.jit(lambda s: jax.lax.map(inner, s))(np.arange(seeds)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("p", "k"), [(300, 64), (257, 33), (1, 5), (64, 64)])
def test_projecting_is_a_fixed_linear_map(kind, p, k):
    gradients = np.random.default_rng(0).normal(size=(3, p)).astype(np.float32)
    projected = project(dtrak.Projection(kind, k), gradients)
    assert projected.shape == (3, k)
    np.testing.assert_allclose(
        projected, gradients @ matrix(kind, p, k), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_the_promised_error(kind):
    """Mean error 0 and variance (1 + c^2) / k, or less, over seeds; c the cosine."""
    p, k, seeds = 500, 50, 400
    u, v = np.random.default_rng(1).normal(size=(2, p)).astype(np.float32)
    pair = np.stack([u / np.linalg.norm(u), v / np.linalg.norm(v)])
    exact = pair[0] @ pair[1]
    error = inner_products(kind, k, seeds, pair) - exact
    promised = (1 + exact**2) / k
    assert abs(error.mean()) < 4 * (promised / seeds) ** 0.5
    assert error.var() < 1.3 * promised
    if kind != "sketch":
        assert error.var() > 0.7 * promised


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_entries_do_not_depend_on_the_tile(kind, monkeypatch):
    whole = matrix(kind, 70, 40)
    monkeypatch.setattr(projections, "TILE_ENTRIES", 3 * 40)
    np.testing.assert_array_equal(matrix(kind, 70, 40), whole)


def test_entries_follow_their_law():
    signs = matrix("rademacher", 200, 300) * 300**0.5
    np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-6)
    normal = matrix("gaussian", 200, 300) * 300**0.5
    for entries in (signs, normal):
        n = entries.size
        assert abs(entries.mean()) < 4 / n**0.5
        assert abs(entries.var() - 1) < 4 * (2 / n) ** 0.5
        # Rows, and columns, are uncorrelated.
        for e in (entries, entries.T):
            correlation = np.corrcoef(e)
            off = correlation[np.triu_indices(len(e), 1)]
            assert np.abs(off).max() < 6 / e.shape[1] ** 0.5


@pytest.mark.parametrize("k", [1, 2, 3, 63, 64])
def test_a_sketch_has_one_sign_per_entry_and_no_meeting_within_a_row(k):
    p = 40 * 65  # more than one block of rows, and a rest
    m = matrix("sketch", p, k)
    assert (np.count_nonzero(m, axis=1) == 1).all()
    assert set(np.unique(m)) == ({-1, 0, 1} if k > 1 else {-1, 1})
    step = k + 1 - k % 2
    for start in range(0, p - step, step):
        columns = np.nonzero(m[start : start + k])[1]
        assert (columns == np.arange(k)).all()
    # Nothing is lost, and columns are filled evenly.
    per_column = np.count_nonzero(m, axis=0)
    assert per_column.max() - per_column.min() <= 1


def test_a_sketch_spreads_a_channel_that_holds_the_gradient():
    """For weights [640, 64] of which one output matters, with k = 64."""
    k, seeds = 64, 200
    weights = np.zeros((2, 640, 64), np.float32)
    weights[:, :, 5] = np.random.default_rng(0).normal(size=(2, 640))
    weights /= np.linalg.norm(weights, axis=(1, 2), keepdims=True)
    pair = weights.reshape(2, -1)
    error = inner_products("sketch", k, seeds, pair) - pair[0] @ pair[1]
    assert np.var(error) < 1.5 / k


def test_a_sketch_wider_than_the_gradient_loses_nothing():
    gradients = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    phi = np.asarray(project(dtrak.Projection("sketch", 100), gradients))
    np.testing.assert_allclose(phi @ phi.T, gradients @ gradients.T, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_differ_and_repeat(kind):
    np.testing.assert_array_equal(matrix(kind, 64, 64), matrix(kind, 64, 64))
    other = matrix(kind, 64, 64, seed=1)
    assert np.abs(np.corrcoef(matrix(kind, 64, 64).ravel(), other.ravel())[0, 1]) < 0.1


def test_distortion_is_measured_on_the_users_gradients(images):
    """Close to 1/sqrt(k), and 0 without a projection."""

    def apply(params, x, t, cond):
        hidden = jnp.tanh(jnp.einsum("bhwc,hwcd->bd", x, params[0]))
        return jnp.einsum("bd,hwcd->bhwc", hidden, params[1])

    params = np.random.default_rng(0).normal(size=(2, 8, 8, 1, 16)).astype(np.float32)
    task = dtrak.Task(apply, dtrak.linear_schedule(), timesteps=(100, 500))
    few = images[:6]

    def measured(projection, task=task):
        return dtrak.distortion(task, list(params / 4), few, projection, batch_size=2)

    dense = measured(dtrak.Projection("rademacher", dim=256))
    assert 0.2 / 16 < dense.rms < 2 / 16
    assert dense.rms <= dense.largest < 5 / 16
    assert measured(dtrak.Projection("none")).largest < 1e-5
    several = dataclasses.replace(task, measurement=("square", "loss"))
    assert measured(dtrak.Projection("none"), several).keys() == {"square", "loss"}
    with pytest.raises(ValueError, match="two or more images"):
        dtrak.distortion(task, list(params), few[:1], dtrak.Projection())
