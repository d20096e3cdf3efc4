"""Coverage: a query's posterior variance under a subset, and its first-order scores."""

import dataclasses
import sys

import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.attribution import Damping, Scores, coverage
from dtrak_jax.config import AttributionConfig, Config, ReportConfig
from dtrak_jax.report.standing import standing
from dtrak_jax.report.summary import summary

J, N, Q, M = 2, 12, 3, 9


def features(k, seed=0):
    """Returns features of a training set [J, N, k] and of queries [J, Q, k]."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(J, n, k)).astype(np.float32) for n in (N, Q))


def variance(train, query, weights, pooled, value=2.0):
    """Returns sum_j g_j^T (sum_n w_n phi_n phi_n^T + lambda I)^-1 g_j, by definition."""
    train, query = train.astype(np.float64), query.astype(np.float64)
    grams = np.einsum("n,jnk,jnl->jkl", weights, train, train)
    grams = grams.sum(axis=0, keepdims=True) if pooled else grams
    inverses = np.linalg.inv(grams + value * np.eye(train.shape[-1]))
    inverses = np.broadcast_to(inverses, (J, *inverses.shape[1:]))
    return np.einsum("jqk,jkl,jql->q", query, inverses, query)


@pytest.fixture
def subsets():
    return np.random.default_rng(1).random((M, N)) < 0.5


@pytest.mark.parametrize("pooled", [False, True], ids=["apart", "pooled"])
@pytest.mark.parametrize("k", [4, 40], ids=["primal", "dual"])
def test_a_prediction_is_minus_the_variance_under_the_subset(k, pooled, subsets):
    train, query = features(k)
    given = {"damping": dtrak.absolute(2.0), "pooled": pooled}
    found = dtrak.predict(train, query, subsets, **given)
    expected = [-variance(train, query, subset, pooled) for subset in subsets]
    np.testing.assert_allclose(found.values, expected, rtol=2e-5)
    # Conjugate gradients need nothing decomposed, and nor do variances.
    if not pooled:
        kernels = dtrak.attribution.Kernels(train, solver="cg")
        again = dtrak.predict(kernels, query, subsets, **given)
        np.testing.assert_array_equal(again.values, found.values)


def test_lambda_is_in_units_of_the_whole_training_set(subsets):
    train, query = features(5)
    unit = np.einsum("jnk,jnk->", train, train) / 5
    found = dtrak.predict(train, query, subsets, damping=0.3, pooled=True)
    expected = [-variance(train, query, s, True, 0.3 * unit) for s in subsets]
    np.testing.assert_allclose(found.values, expected, rtol=2e-5)


@pytest.mark.parametrize("solver", ["eigh", "cg"])
def test_scores_are_the_derivative_of_coverage_by_a_weight(solver):
    train, query = features(6)
    kernels = dtrak.attribution.Kernels(train, solver=solver)
    found, step = coverage(kernels, query, dtrak.absolute(2.0)), 1e-4
    for n in range(N):
        change = step * np.eye(N)[n]
        more, less = (
            variance(train, query, 1 + sign * change, False) for sign in (1, -1)
        )
        np.testing.assert_allclose(found[:, n], (less - more) / 2 / step, rtol=1e-3)


def test_predictions_by_influence_are_sums_of_scores(subsets):
    train, query = features(6)
    found = dtrak.predict(train, query, subsets, by="influence")
    scores = dtrak.attribute(train, query, method="trak").scores
    np.testing.assert_allclose(found.values, subsets @ scores.T, rtol=1e-4)


def test_lambda_is_by_a_share_unless_it_is_given(subsets):
    """Coverage has its own default, wherever it is asked for; signed scores keep theirs."""
    train, query = features(40)
    own, signed = dtrak.effective(0.05), Damping(0.1)
    ways = (
        lambda **how: dtrak.attribute(train, query, method="coverage", **how).scores,
        lambda **how: coverage(train, query, **how),
        lambda **how: dtrak.predict(train, query, subsets, **how).values,
        lambda **how: (
            dtrak.removal_set(*(train, query, 3), objective="coverage", **how).predicted
        ),
    )
    for way in ways:
        np.testing.assert_array_equal(way(), way(damping=own))
        assert not np.allclose(way(), way(damping=signed), rtol=1e-2)
    for by, damping in (("influence", signed), ("coverage", own)):
        found = dtrak.predict(train, query, subsets, by=by).values
        same = dtrak.predict(train, query, subsets, by=by, damping=damping).values
        np.testing.assert_array_equal(found, same)
    for name, damping in (("trak", signed), ("coverage", own), ("gradient-dot", None)):
        assert dtrak.attribute(train, query, method=name).damping == damping
    chosen = dtrak.removal_set(train, query, 3)
    same = dtrak.removal_set(train, query, 3, damping=signed)
    np.testing.assert_array_equal(chosen.predicted, same.predicted)
    iterated = {"method": "coverage", "solver": "cg"}
    with pytest.raises(ValueError, match="solver must be 'eigh', or damping a number"):
        dtrak.attribute(train, query, **iterated)
    assert dtrak.attribute(train, query, damping=0.1, **iterated).damping == signed


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("damping", [1e-9, dtrak.effective(0.5)])
def test_rounding_errors_are_no_predictions(subsets, damping, pooled):
    """Each pair has the rank 1 of min(n, k) = 6."""
    train, query = features(6)
    options = {"damping": damping, "pooled": pooled, "subsets": subsets}
    train[:] = train[:1, :1]
    path = dtrak.damping_path(train, query, [damping, 0.1], pooled=pooled)
    assert [np.isnan(scores).all() for scores in path] == [True, False]
    for by in ("influence", "coverage"):
        with pytest.raises(ValueError, match="rounding errors of float32 features"):
            dtrak.predict(train, query, by=by, **options)


def test_pairs_are_read_one_after_the_other(subsets, monkeypatch):
    """The kernels of all pairs together may not fit in memory."""
    module = sys.modules["dtrak_jax.attribution.coverage"]
    each, variances, begun = module.query_pairs, module.variances, []

    def counted(*arguments):
        for pair in each(*arguments):
            begun.append(pair)
            yield pair

    def check(*arguments):
        assert len(begun) == 1 + len(seen) // M
        seen.append(arguments)
        return variances(*arguments)

    seen = []
    monkeypatch.setattr(module, "query_pairs", counted)
    monkeypatch.setattr(module, "variances", check)
    dtrak.predict(*features(6), subsets)
    assert len(seen) == J * M


def test_lds_of_predictions_matches_by_ids(subsets):
    train, query = features(6)
    found = dtrak.predict(train, query, subsets)
    truth = dtrak.RetrainedLosses(-found.values, subsets)
    assert dtrak.lds(found, truth).value == pytest.approx(1)
    order, rows = np.random.default_rng(2).permutation(N), [2, 0, 1]
    shuffled = dtrak.RetrainedLosses(
        -found.values[:, rows],
        subsets[:, order],
        found.query_ids[rows],
        found.train_ids[order],
    )
    assert dtrak.lds(found, shuffled).value == pytest.approx(1)
    with pytest.raises(ValueError, match="other subsets than the truth"):
        dtrak.lds(found._replace(subsets=~subsets), truth)
    for values in (found.values[:, 1:], found.values * np.nan):
        with pytest.raises(ValueError, match=r"predictions have shape"):
            dtrak.lds(found._replace(values=values), truth)
    with pytest.raises(ValueError, match="ids of queries differ"):
        dtrak.lds(found._replace(query_ids=np.array(["a", "b", "c"])), truth)


def test_scores_without_a_sign_say_so_and_are_not_reported(tmp_path):
    train, query = features(6)
    scores = dtrak.attribute(train, query, method="coverage")
    assert not scores.signed and (scores.scores >= 0).all()
    scores.save(tmp_path / "scores.npz")
    assert str(np.load(tmp_path / "scores.npz")["sign"]) == "none"
    assert not Scores.load(tmp_path / "scores.npz").signed
    config = Config(attribution=AttributionConfig(methods=("coverage", "dtrak")))
    assert config.shown_methods == ("dtrak",)
    with pytest.raises(ValueError, match=r"\('coverage',\), which have no sign"):
        AttributionConfig(methods=("coverage",))
    with pytest.raises(
        ValueError, match="report.methods has 'coverage', whose scores ha"
    ):
        ReportConfig(methods=("dtrak", "coverage"))


def test_nothing_opposes_without_a_sign(tmp_path):
    """An image that a query needs less than others do is no evidence against it."""
    rows = np.random.default_rng(3).exponential(size=(12, 30)).astype(np.float32) + 5
    rows[4, 7] = 0
    ids = np.arange(30).astype(str)
    column = {"of": np.array(["x"] * 20 + ["y"] * 10)}
    scores = Scores(rows, ids, ids[:12], "coverage", signed=False, columns=column)
    signed = dataclasses.replace(scores, signed=True)
    assert standing(signed, [], {}).opposing[4, 7]
    assert not standing(scores, [], {}).opposing.any()
    one, other = (list(summary({("coverage", "a"): s}))[1] for s in (signed, scores))
    assert other == one.replace("+", "") != one
    images = np.zeros((30, 2, 2, 1), np.float32)
    with pytest.raises(ValueError, match="scores coverage of query have no sign"):
        dtrak.write_report(tmp_path / "page.html", scores, images, images[:12])
    with pytest.raises(ValueError, match="give those of each method once"):
        dtrak.write_report(tmp_path / "page.html", [signed] * 2, images, images[:12])


def test_what_a_subset_holds_is_no_difference_of_rounding_errors():
    """A query in the span of a subset, at a small lambda."""
    train, _ = features(30)
    query = train[:, :2]
    given = {"damping": dtrak.absolute(1e-5)}
    everything = np.ones((1, N), bool)
    found = dtrak.predict(train, query, everything, **given).values[0]
    expected = -variance(train, query, everything[0], False, 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rows_too_much_alike_are_refused():
    train, query = np.ones((J, N, 4), np.float32), np.ones((J, Q, 4), np.float32)
    train[:, 6:] = np.random.default_rng(0).normal(size=(J, 6, 4))
    alike = np.arange(N)[None] < 6
    with pytest.raises(ValueError, match="lambda is 1e-30, which is less than"):
        dtrak.predict(train, query, alike, damping=dtrak.absolute(1e-30))


def test_what_does_not_fit_is_refused_by_name(subsets):
    train, query = features(6)

    def refused(match, masks=subsets, **options):
        with pytest.raises(ValueError, match=match):
            dtrak.predict(train, query, masks, **options)

    refused("by is 'loss'|by must be one of", by="loss")
    refused("they must be bool", subsets.astype(int))
    refused(rf"bool \[M, {N}\]", subsets[:, 1:])
    refused(r"subsets\[1\] is empty", np.stack([subsets[0], np.zeros(N, bool)]))
    refused("damping", damping=-1.0)
    with pytest.raises(TypeError, match="pooled is 'yes'; it must be bool"):
        dtrak.predict(train, query, subsets, pooled="yes")
