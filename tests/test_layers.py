"""Features by layer, and weights of layers that are learnt without labels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.config import FeaturesConfig
from dtrak_jax.features.projection import DENSE

RNG = np.random.default_rng(0)
PARAMS = {
    "deep": {"w": RNG.normal(size=(16, 24)), "b": RNG.normal(size=(1, 24))},
    "last": {"w": RNG.normal(size=(24, 16))},
    "scale": np.ones(1),
}
GROUPS = {"inner": "^deep", "outer": "last|scale"}


def apply(params, x, t, cond):
    """A network whose two products are tagged, and whose scale is not."""
    flat = x.reshape(len(x), -1)
    w, v = params["deep"]["w"], params["last"]["w"]
    h = jnp.tanh(dtrak.layer(w, flat, flat @ w) + params["deep"]["b"])
    out = dtrak.layer(v, h, h @ v) * params["scale"].reshape(1, 1)
    return out.reshape(x.shape)


def task_of(**settings):
    settings = {"measurement": "loss", "timesteps": (100, 500), "draws": 2} | settings
    return dtrak.Task(apply, dtrak.linear_schedule(), **settings)


def pictures(n, seed=1):
    shape = n, 4, 4, 1
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def sets():
    """Features of the training set; of queries; and of these by block."""
    task, projection = task_of(), dtrak.Projection("sketch", 64)
    train, query = pictures(30), pictures(5, 2)
    return (
        dtrak.featurize(task, PARAMS, train, projection, role="train"),
        dtrak.featurize(task, PARAMS, query, projection, role="query"),
        dtrak.featurize(task, PARAMS, query, projection, role="query", layers="blocks"),
    )


def assert_close(actual, expected, tolerance=2e-6):
    expected = np.asarray(expected)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, atol=tolerance * scale)


@pytest.mark.parametrize(
    "kind", ["sketch", "rademacher", "gaussian", "factorized", "none"]
)
@pytest.mark.parametrize("apart", [True, False])
def test_features_by_layer_add_up_to_those_of_the_whole(kind, apart):
    """As do squared norms; each one is the projection of a gradient without the others."""
    task = task_of(measurement=("loss", "square"), draws=1, per_timestep=apart)
    images, projection = pictures(3), dtrak.Projection(kind, 64)
    whole = dtrak.featurize(task, PARAMS, images, projection)
    shared = {"proj_devices": 2 if kind in DENSE else 1, "layers": GROUPS}
    parts = dtrak.featurize(task, PARAMS, images, projection, **shared)
    assert parts.keys() == whole.keys()
    for name, features in whole.items():
        assert list(parts[name]) == ["inner", "outer"]
        assert_close(sum(map(np.asarray, parts[name].values())), features)
        norms = sum(f.squared_norms for f in parts[name].values())
        assert_close(norms, features.squared_norms)
        if kind == "none":
            # The parameters of "deep" come first, 24 and 384.
            inner, outer = map(np.asarray, parts[name].values())
            assert not inner[..., 408:].any()
            assert not outer[..., :408].any()


def test_groups_have_every_parameter_once(tmp_path):
    def featurize(layers, **settings):
        projection = dtrak.Projection("none")
        how = task_of(**settings), PARAMS, pictures(2), projection
        return dtrak.featurize(*how, layers=layers)

    blocks = featurize("blocks")
    assert list(blocks) == ["deep", "last", "scale"]
    # All of these paths begin alike.
    assert list(featurize("blocks", parameters="^deep")) == ["b", "w"]
    for layers, words in (
        ({"inner": "^deep"}, "the parameter last/w is in 0 groups"),
        (GROUPS | {"all": "w"}, "deep/w is in 2 groups, 'inner', 'all'"),
        (
            GROUPS | {"none": "middle"},
            r"layers\['none'\] is 'middle', which finds none",
        ),
        ({"a/b": "."}, "a group called 'a/b'"),
        ({"a": "("}, r"layers\['a'\] is '\('; it must be a regular expression"),
        ({}, "or 'blocks'"),
        ("block", "or 'blocks'"),
    ):
        with pytest.raises(ValueError, match=words):
            featurize(layers)


def test_a_store_of_features_by_layer(tmp_path):
    """It is continued by the same groups alone."""
    how = task_of(), PARAMS, pictures(2), dtrak.Projection("sketch", 16)
    made = dtrak.featurize(*how, layers=GROUPS, store=tmp_path)
    read = dtrak.Features.load(tmp_path, "loss/outer")
    np.testing.assert_array_equal(read, made["outer"])
    other = {"inner": "deep/w", "outer": "deep/b|last|scale"}
    with pytest.raises(ValueError, match="holds other features: measurements"):
        dtrak.featurize(*how, layers=other, store=tmp_path)


def test_weighted_scores_are_linear_in_the_weights(sets):
    """So they have errors, groups and draws like all scores."""
    train, query, by_layer = sets
    fitted = dtrak.layer_weights(train, by_layer, ridge=0)
    assert fitted.names == ("deep", "last", "scale")
    assert abs(fitted.weights.mean() - 1) < 1e-6
    assert abs(fitted.shares.sum() - 1) < 1e-9
    assert np.ptp(fitted.weights) > 0.1
    scores = dtrak.attribute(train, fitted.query)
    each = [dtrak.attribute(train, np.asarray(f)).scores for f in by_layer.values()]
    assert_close(scores.scores, np.einsum("m,mqn->qn", fitted.weights, each))
    assert (scores.method, scores.freedom > 0) == ("trak", True)
    assert list(scores.query_ids) == list(query.ids)
    # Groups are of different parameters, whose gradients are orthogonal.
    squares = [f.squared_norms for f in by_layer.values()]
    expected = np.einsum("m,mjq->jq", fitted.weights**2, squares)
    assert_close(fitted.query.squared_norms, expected)


def test_equal_weights_change_nothing(sets):
    train, query, by_layer = sets
    equal = dtrak.layer_weights(train, by_layer, ridge=1e6)
    np.testing.assert_allclose(equal.weights, 1, atol=1e-3)
    expected = dtrak.attribute(train, query).scores
    assert_close(dtrak.attribute(train, equal.query).scores, expected, 1e-3)
    plain = {name: np.asarray(f) for name, f in by_layer.items()}
    of_arrays = dtrak.layer_weights(np.asarray(train), plain, ridge=1e6)
    np.testing.assert_allclose(of_arrays.query, equal.query, rtol=1e-6)


def test_the_fit_finds_the_layer_that_sets_images_apart():
    """In one group a query is close to three training images; two others are noise."""
    rng = np.random.default_rng(0)
    k, n = 90, 60
    train = rng.normal(size=(1, n, k)).astype(np.float32)
    noise = rng.normal(size=(2, 1, 8, k)).astype(np.float32)
    close = np.array([train[:, 3 * q : 3 * q + 3].sum(axis=1)[0] for q in range(8)])
    by_layer = {"a": noise[0], "planted": close[None], "b": noise[1]}
    fitted = dtrak.layer_weights(train, by_layer, top=3, ridge=0.0)
    assert fitted.weights.argmax() == 1
    assert fitted.weights[1] > 2
    assert fitted.shares[1] > 0.9
    few = dtrak.layer_weights(train, by_layer, top=3, ridge=0.1)
    assert 1 < few.weights[1] < fitted.weights[1]
    assert "planted" in repr(few)


def test_what_does_not_belong_together(sets):
    train, query, by_layer = sets
    weigh = dtrak.layer_weights
    fitted = weigh(train, by_layer)
    last = by_layer["last"]
    # As of groups of these names with other parameters.
    groups = dict.fromkeys(last.fingerprint["groups"], "other")
    other_groups = dataclasses.replace(
        last, fingerprint=last.fingerprint | {"groups": groups}
    )
    with pytest.raises(ValueError, match="layer_weights is {'deep'"):
        dtrak.attribute(fitted.query, query)
    with pytest.raises(ValueError, match="layers give dtrak_jax.layer_weights"):
        dtrak.attribute(train, by_layer["deep"])
    for given, words in (
        ({}, "by_layer is {}"),
        ({"all": query}, "features of 'loss'; they must be those of one measurement"),
        (by_layer | {"scale": np.ones((4, 2, 64))}, "all must have one and the same"),
        # Without a part of the gradient, or with one twice.
        ({k: by_layer[k] for k in ("deep", "last")}, "each group once.*, scale:"),
        (by_layer | {"more": by_layer["last"]}, "groups deep, last, scale, last;"),
        (by_layer | {"last": other_groups}, r"by_layer\['last'\].*groups is {'deep'"),
    ):
        with pytest.raises(ValueError, match=words):
            weigh(train, given)
    foreign = dataclasses.replace(
        by_layer["last"], fingerprint=by_layer["last"].fingerprint | {"draws": 7}
    )
    with pytest.raises(ValueError, match=r"by_layer\['last'\].*draws is 2 there"):
        weigh(train, by_layer | {"last": foreign})
    for settings, words in (
        ({"top": 31}, "top is 31"),
        ({"top": 0}, "top is 0"),
        ({"ridge": -1.0}, "ridge is -1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            weigh(train, by_layer, **settings)
    other = dataclasses.replace(
        train, fingerprint=train.fingerprint | {"noise_seed": 3}
    )
    with pytest.raises(ValueError, match="noise_seed is 3 there"):
        weigh(other, by_layer)


def test_groups_of_a_config():
    assert FeaturesConfig().layer_groups == "blocks"
    two = FeaturesConfig(layers=("a=^conv", "b=x=y"))
    assert two.layer_groups == {"a": "^conv", "b": "x=y"}
    for layers, words in (
        (("a",), "has 'a'; it must be NAME=PATTERN"),
        (("a=b", "a=c"), "'a' twice"),
        (("a b=c",), "a group called 'a b'"),
    ):
        with pytest.raises(ValueError, match=words):
            FeaturesConfig(layers=layers)
