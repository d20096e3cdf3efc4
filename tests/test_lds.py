"""The linear datamodeling score against scipy, closed forms and simulations."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from dtrak_jax.evaluation import datamodeling, lds
from dtrak_jax.evaluation.statistics import resamples, spearman
from dtrak_jax.evaluation.truth import RetrainedLosses


def make_truth(rng, subsets=32, seeds=2, queries=30, train=40, noise=0.5):
    """Losses that are linear in the masks, and the scores that make them."""
    scores = rng.normal(size=(queries, train))
    masks = rng.random((subsets, train)) < 0.5
    losses = -(masks @ scores.T)[:, None]
    losses = losses + noise * np.sqrt(train) * rng.normal(
        size=(subsets, seeds, queries)
    )
    ids = np.arange(queries).astype(str), np.arange(train).astype(str)
    return RetrainedLosses(losses, masks, *ids), scores


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_spearman_is_scipys(rng):
    a = np.round(rng.normal(size=(20, 9)), 1)  # with ties
    b = a + rng.normal(size=a.shape)
    expected = [scipy.stats.spearmanr(a[:, i], b[:, i])[0] for i in range(9)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-6)


def test_weights_are_repetitions(rng):
    a = np.round(rng.normal(size=(20, 5)), 1)
    b = a + rng.normal(size=a.shape)
    weights = resamples(20, 7, 0)
    found = spearman(a, b, weights)
    for w, row in zip(weights, found, strict=True):
        at = np.repeat(np.arange(20), w)
        expected = [scipy.stats.spearmanr(a[at, i], b[at, i])[0] for i in range(5)]
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_a_constant_correlates_with_nothing(rng):
    a = np.ones((20, 3))
    assert (spearman(a, rng.normal(size=a.shape)) == 0).all()
    assert (spearman(a, rng.normal(size=a.shape), resamples(20, 4, 0)) == 0).all()


def test_resamples_are_samples_with_replacement():
    counts = resamples(50, 2000, 3)
    assert (counts.sum(axis=1) == 50).all()
    np.testing.assert_allclose(counts.mean(), 1)
    # Binomial(50, 1/50).
    np.testing.assert_allclose(counts.var(), 49 / 50, rtol=0.03)


def test_true_scores_reach_1_and_random_ones_0(rng):
    truth, scores = make_truth(rng, noise=0)
    assert datamodeling.lds(truth.predict(scores), truth) == pytest.approx(1, abs=1e-6)
    assert datamodeling.lds(truth.predict(-scores), truth) == pytest.approx(
        -1, abs=1e-6
    )
    guess = rng.normal(size=scores.shape)
    estimate, _ = datamodeling.bootstrap(truth.predict(guess), truth)
    assert estimate.low < 0 < estimate.high


def test_the_order_of_subsets_is_nothing_and_the_value_lies_within(rng):
    truth, scores = make_truth(rng)
    order = rng.permutation(len(truth.masks))
    shuffled = dataclasses.replace(
        truth, outputs=truth.outputs[order], masks=truth.masks[order]
    )
    value = datamodeling.lds(truth.predict(scores), truth)
    assert datamodeling.lds(shuffled.predict(scores), shuffled) == pytest.approx(value)
    estimate, samples = datamodeling.bootstrap(truth.predict(scores), truth)
    assert estimate.low < value == estimate.value < estimate.high
    assert samples.shape == (lds.RESAMPLES,)


def test_the_interval_holds_the_value_of_endless_subsets(rng):
    """At least 85 of 100 intervals of 95%, from 24 subsets each."""
    scores = rng.normal(size=(12, 40))

    def draw(subsets):
        masks = rng.random((subsets, 40)) < 0.5
        losses = -(masks @ scores.T) + 4 * rng.normal(size=(subsets, 12))
        ids = np.arange(12).astype(str), np.arange(40).astype(str)
        return RetrainedLosses(losses[:, None], masks, *ids)

    many = draw(4000)
    target = datamodeling.lds(many.predict(scores), many)
    held = 0
    for _ in range(100):
        few = draw(24)
        estimate, _ = datamodeling.bootstrap(few.predict(scores), few)
        held += estimate.low <= target <= estimate.high
    assert held >= 85


def test_the_ceiling_is_what_the_truth_itself_reaches(rng):
    for seeds in (2, 3, 4):
        truth, scores = make_truth(rng, subsets=150, seeds=seeds, queries=60)
        reached = datamodeling.lds(truth.predict(scores), truth)
        found = datamodeling.ceiling(truth)
        assert found.value == pytest.approx(reached, abs=0.02)
        assert found.low < found.value < found.high
    alone = dataclasses.replace(truth, outputs=truth.outputs[:, :1])
    assert datamodeling.ceiling(alone) is None


def test_a_difference_is_sharper_than_its_parts(rng):
    """Paired: the same subsets and queries for both."""
    truth, scores = make_truth(rng)
    near = truth.predict(scores + 0.3 * rng.normal(size=scores.shape))
    compared = {
        name: lds.predicted_row(name, predictions, truth)
        for name, predictions in (("exact", truth.predict(scores)), ("near", near))
    }
    (found,) = lds.differences(compared)
    exact, other = (row for row, _ in compared.values())
    assert (found["a"], found["b"]) == ("exact", "near")
    assert found["value"] == exact["lds"] - other["lds"] > 0
    assert 0 < found["low"] < found["value"] < found["high"]
    width = exact["high"] - exact["low"]
    assert found["high"] - found["low"] < 0.7 * width


def test_the_row_of_predictions(rng):
    truth, scores = make_truth(rng)
    predictions = truth.predict(scores)
    row, _ = lds.predicted_row("trak", predictions, truth, "oracle", 0.5)
    estimate, _ = datamodeling.bootstrap(predictions, truth)
    assert row == {
        "method": "trak",
        "damping_rule": "oracle",
        "damping": 0.5,
        "transform": "linear",
        "lds": datamodeling.lds(predictions, truth),
        "low": estimate.low,
        "high": estimate.high,
        "reference": datamodeling.reference_interval(predictions, truth),
    }


def test_the_table_shows_every_row():
    def row(method, *described):
        estimate = lds.Estimate(0.25, 0.125, 0.5)
        return {"method": method} | lds.row(estimate, *described)

    rows = [
        row("trak", "label-free", 0.1),
        row("trak", "label-free", 0.1) | {"transform": "squared"},
        row("trak", "cross-fitted", [0.01, 2.0]),
        row("datamodels", "halves"),
        row("random"),
    ]
    ceiling = {"value": 0.75, "low": 0.5, "high": 1.0}
    table = lds.table({"queries": {"generated": {"ceiling": ceiling, "rows": rows}}})
    lines = [line.split("  ") for line in table.splitlines() if line]
    assert [(line[1], line[-1].strip()) for line in lines[1:]] == [
        ("noise ceiling", "0.750 [0.500, 1.000]"),
        *(
            (label, "0.250 [0.125, 0.500]")
            for label in (
                "trak (label-free, 0.1)",
                "trak squared (label-free, 0.1)",
                "trak (cross-fitted, 0.01, 2)",
                "datamodels (halves)",
                "random",
            )
        ),
    ]


def test_the_reference_interval_is_scipys_and_narrower(rng):
    truth, scores = make_truth(rng)
    predicted = truth.predict(scores)
    found = datamodeling.reference_interval(predicted, truth)

    def loop(subsets):
        columns = zip(predicted[subsets].T, truth.target[subsets].T, strict=True)
        return np.mean([scipy.stats.spearmanr(a, b)[0] for a, b in columns])

    expected = scipy.stats.bootstrap(
        (np.arange(32),), loop, vectorized=False, n_resamples=64, random_state=42
    )
    assert found["low"] == pytest.approx(expected.confidence_interval.low, abs=1e-6)
    assert found["high"] == pytest.approx(expected.confidence_interval.high, abs=1e-6)
    estimate, _ = datamodeling.bootstrap(predicted, truth)
    assert found["high"] - found["low"] < estimate.high - estimate.low


def test_cross_fitting_never_sees_what_it_is_scored_on(rng):
    truth, scores = make_truth(rng)
    # One guess for each damping: the best of 50 on all subsets flatters itself.
    guesses = rng.normal(size=(50, *scores.shape))
    path = np.stack([truth.predict(guess) for guess in guesses])
    values = [datamodeling.lds(predictions, truth) for predictions in path]
    honest, chosen = datamodeling.cross_fitted(path, truth)
    assert max(values) > honest.value + 0.02
    assert abs(honest.value) < 0.1
    # Where one damping is right, it is found by both halves.
    path[17] = truth.predict(scores)
    found, chosen = datamodeling.cross_fitted(path, truth)
    assert chosen == [17, 17]
    assert found.low < datamodeling.lds(path[17], truth) < found.high


def test_learning_from_halves_is_not_remembering(rng):
    """Losses that depend on no example cannot be predicted."""
    truth, _ = make_truth(rng)
    noise = dataclasses.replace(truth, outputs=rng.normal(size=truth.outputs.shape))

    def remember(masks, losses):
        return -(losses - losses.mean(axis=0)).T @ (masks - masks.mean(axis=0))

    seen = remember(noise.masks, -noise.target)
    assert datamodeling.lds(noise.predict(seen), noise) > 0.3
    assert abs(datamodeling.from_halves(remember, noise).value) < 0.15
    assert datamodeling.from_halves(remember, truth).value > 0.15


def test_wrong_truths(rng):
    truth, scores = make_truth(rng)
    few = {"outputs": truth.outputs[:7], "masks": truth.masks[:7]}
    with pytest.raises(ValueError, match="7 subsets; an interval needs at least 8"):
        dataclasses.replace(truth, **few)
    with pytest.raises(ValueError, match="not all finite"):
        dataclasses.replace(truth, outputs=truth.outputs * np.nan)
    few = {"outputs": truth.outputs[:10], "masks": truth.masks[:10]}
    small = dataclasses.replace(truth, **few)
    with pytest.raises(ValueError, match="needs 16"):
        datamodeling.cross_fitted(small.predict(scores)[None], small)
