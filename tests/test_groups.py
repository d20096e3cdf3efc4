"""Groups and near-duplicates: what counts once, and what rankings are made of."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.attribution import duplicates, groups
from dtrak_jax.methods import METHODS

RNG = np.random.default_rng(0)


def dense(params, x, t, cond):
    """A network whose gradients tell pictures apart."""
    return jnp.tanh(x.reshape(len(x), -1) @ params).reshape(x.shape)


def features(n=40, pairs=2, k=64):
    return RNG.normal(size=(pairs, n, k)).astype(np.float32)


@pytest.mark.parametrize("entries", [2**26, 100])
def test_planted_near_duplicates_are_found_and_nothing_else(entries, monkeypatch):
    """Also a chain of them, far from the origin, and a few rows at a time."""
    monkeypatch.setattr(duplicates, "ENTRIES", entries)
    phi = features()
    phi[:, 7] = phi[:, 3]
    phi[:, 11] = phi[:, 3] + 0.2 * features(1)[:, 0]
    phi[:, 30] = phi[:, 11] + 0.2 * features(1)[:, 0]
    phi[:, 20] = phi[:, 25] + 0.5 * features(1)[:, 0]  # a cosine of .9
    digests = [*map(str, range(39)), "5"]
    expected = np.array([str(i) for i in range(40)])
    expected[[7, 11, 30]], expected[39] = "3", "5"
    assert duplicates.near_duplicates(100 + phi, digests).tolist() == expected.tolist()


def test_where_features_cannot_tell_pictures_apart_only_exact_copies_are(
    images, one_device
):
    """Of few dimensions, all the same, of one image, and with noise of their own."""
    digests = ["a", "b", "a", *"cdefghijk"]
    expected = ["0", "1", "0", *map(str, range(3, 12))]
    for phi in (features(12, 2, 3), np.ones((2, 12, 64))):
        assert duplicates.near_duplicates(phi, digests).tolist() == expected
        assert len(set(duplicates.near_duplicates(phi))) == 12
    assert duplicates.near_duplicates(features(1)).tolist() == ["0"]
    twice = np.concatenate([images, images])
    task = dtrak.Task(dense, dtrak.linear_schedule(), timesteps=1)
    shared = dtrak.featurize(task, jnp.eye(64) / 2, twice, dtrak.Projection(dim=512))
    assert len(set(duplicates.near_duplicates(shared))) == 12
    noise = shared.fingerprint | {"noise": "independent"}
    apart = dataclasses.replace(shared, fingerprint=noise)
    assert len(set(duplicates.near_duplicates(apart))) == 24
    for wrong, message in ((digests[1:], "digests has 11"), (None, "threshold is 2")):
        with pytest.raises(ValueError, match=message):
            duplicates.near_duplicates(features(12), wrong, 0.9 if wrong else 2)


def test_copies_share_influence_or_have_all_of_it():
    """The scores of an image, once it is there twice, are those of `COUNTED_ONCE`."""
    phi, query = features(12, 1, 8), features(3, 1, 8)
    twice = np.concatenate([phi, phi[:, :1]], axis=1)
    value = dtrak.absolute(2.0)
    inverse = np.linalg.inv(phi[0].T @ phi[0] + 2 * np.eye(8))
    leverage = phi[0, 0] @ inverse @ phi[0, 0]
    names = [n for n in METHODS if n.startswith(("trak", "dtrak", "gradient", "re"))]
    for name in (n for n in names if "ensemble" not in n):
        alone, both = (
            dtrak.attribute(train, query, method=name, damping=value).scores
            for train in (phi, twice)
        )
        share = 1 if name in duplicates.COUNTED_ONCE else 1 / (1 + leverage)
        for copy in (0, 12):
            np.testing.assert_allclose(both[:, copy], share * alone[:, 0], rtol=1e-4)
    assert duplicates.COUNTED_ONCE < METHODS.keys()


def test_a_cluster_is_one_entry():
    rows = np.array([[1.0, 5, 2, -7, 3], [0, 1, -1, 2, 0.5]])
    copies = np.array(["a", "b", "a", "b", "e"])
    first, sums = duplicates.merge(rows, copies, "trak")
    assert first.tolist() == [0, 1, 4]
    assert sums.tolist() == [[3, -2, 3], [-1, 3, 0.5]]
    _, highest = duplicates.merge(rows, copies, "pixel-cosine")
    assert highest.tolist() == [[2, 5, 3], [0, 2, 0.5]]
    ids = np.array(list("abcde"))
    assert duplicates.members(ids, copies) == {"a": ["a", "c"], "b": ["b", "d"]}
    # The picture b counts once for each of the groups that have it, and a once for x.
    column = np.array(["x", "x", "x", "y", "y"])
    counted = duplicates.once_in_each_group(rows, column, copies, "gas")
    _, of_groups = groups.group_scores(counted, column)
    assert of_groups.tolist() == [[7, -4], [1, 2.5]]
    assert duplicates.once_in_each_group(rows, column, copies, "trak") is rows


def test_shares_add_up_and_say_what_they_leave_out():
    sums = np.array([[3.0, 1, -2], [-1, 0, -4], [0, 0, 5]])
    shares, left_out = groups.shares(sums)
    np.testing.assert_array_equal(shares[[0, 2]], [[0.75, 0.25, 0], [0, 0, 1]])
    assert np.isnan(shares[1]).all()
    assert left_out.tolist() == [0.5, np.inf, 0]


def test_over_all_queries_each_counts_alike():
    sums = np.array([[3.0, 1, -2], [-100, 0, 50], [0, 0, 0]])
    np.testing.assert_allclose(groups.overall(sums), [0, 1 / 9, (-2 / 3 + 0.5) / 3])
    scaled = groups.overall(sums * [[7], [0.01], [1]])
    np.testing.assert_allclose(groups.overall(sums), scaled, atol=1e-15)
