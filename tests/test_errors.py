"""Standard errors against the jackknife by hand, and against many more draws."""

import dataclasses

import conftest
import jax
import numpy as np
import pytest
import scipy.stats
from test_attribution import as_features

import dtrak_jax as dtrak
from dtrak_jax import attribution
from dtrak_jax.attribution import PairSum
from dtrak_jax.attribution.groups import names_hash

T, R, N, Q, K = 2, 3, 9, 4, 14
COLUMN = np.array(["b", "a", "b", "c", "a", "a", "c", "b", "b"])


def pairs(count=T * R, seed=0):
    """Features [pairs, N, K] and [pairs, Q, K] of which every pair has the same part."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(N + Q, K)) + rng.normal(size=(count, N + Q, K))
    return np.split(rows.astype(np.float32), [N], axis=1)


def jackknife(scores_of, mean):
    """SE by leaving out a draw at a time within its timestep, in which the others then
    count R / (R - 1) times; of the scores, and of those of groups."""
    every = np.arange(T * R).reshape(T, R)

    def added(rows):
        scores = scores_of(rows.ravel()).astype(np.float64)
        return scores * len(rows.ravel()) if mean else scores

    variances = [0.0, 0.0]
    for t in range(T):
        others = added(np.delete(every, t, axis=0))
        without = [
            others + R / (R - 1) * added(np.delete(every[t], draw)) for draw in range(R)
        ]
        without = np.array(without) / (T * R if mean else 1)
        groups = [attribution.group_scores(scores, COLUMN)[1] for scores in without]
        for i, estimates in enumerate((without, np.array(groups))):
            deviations = estimates - estimates.mean(axis=0)
            variances[i] = variances[i] + (R - 1) / R * (deviations**2).sum(axis=0)
    return np.sqrt(variances[0]), np.sqrt(variances[1])


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ("dtrak", "eigh"),
        ("dtrak", "cg"),
        ("relative-influence", "eigh"),
        ("renormalised-influence", "eigh"),
        ("gradient-dot", "eigh"),
        ("gradient-cosine", "eigh"),
    ],
)
def test_errors_are_those_of_leaving_out_a_draw_at_a_time(method, solver):
    train, query = pairs()
    options = {"method": method, "solver": solver, "damping": 0.3}
    groups = {"of": COLUMN}
    scores = dtrak.attribute(train, query, **options, draws=R, groups=groups)
    plain = dtrak.attribute(train, query, **options)
    np.testing.assert_array_equal(scores.scores, plain.scores)
    assert np.isnan(plain.errors).all() and plain.freedom == 0
    assert R - 1 < scores.freedom < T * (R - 1)
    expected = jackknife(
        lambda rows: dtrak.attribute(train[rows], query[rows], **options).scores,
        mean=method.startswith("gradient"),
    )
    tolerance = {"rtol": 1e-3, "atol": 1e-5 * scores.errors.max()}
    np.testing.assert_allclose(scores.errors, expected[0], **tolerance)
    found = scores.group("of")
    np.testing.assert_allclose(found.errors, expected[1], **tolerance)
    names, sums = attribution.group_scores(scores.scores, COLUMN)
    np.testing.assert_array_equal(found.scores, sums)
    alone = dtrak.attribute(
        train, {"a": query, "b": query[:, :2]}, **options, draws=R, groups=groups
    )["b"]
    np.testing.assert_allclose(alone.errors, scores.errors[:2], **tolerance)
    np.testing.assert_allclose(alone.group("of").errors, found.errors[:2], **tolerance)
    assert alone.freedom == pytest.approx(
        dtrak.attribute(train, query[:, :2], **options, draws=R).freedom
    )
    assert (found.names.tolist(), found.sizes.tolist()) == (names.tolist(), [3, 4, 2])
    # Sums within a draw: images that vary together are not taken for independent.
    assert not np.allclose(
        found.errors[:, 2] ** 2, (scores.errors[:, [3, 6]] ** 2).sum(1)
    )
    np.testing.assert_array_equal(scores.group(COLUMN).errors, found.errors)
    # Errors of a grouping are of no other one that takes its name.
    others = dataclasses.replace(scores, columns={"of": np.roll(COLUMN, 1)})
    assert np.isnan(others.group("of").errors).all()


@pytest.mark.parametrize("method", [attribution.tracin, attribution.gas])
def test_checkpoints_are_added_within_a_draw(method):
    trains, queries = zip(pairs(), pairs(seed=1), strict=True)
    total = PairSum(R, {"of": COLUMN})
    scores = method(trains, queries, total)

    def scores_of(rows):
        return method([phi[rows] for phi in trains], [g[rows] for g in queries])

    np.testing.assert_allclose(scores, scores_of(np.arange(T * R)), rtol=1e-12)
    expected = jackknife(scores_of, mean=True)
    np.testing.assert_allclose(total.errors, expected[0], rtol=1e-9)
    np.testing.assert_allclose(total.group_errors["of"], expected[1], rtol=1e-9)
    shorter = pairs(T * R - 1)
    with pytest.raises(ValueError, match=r"trains\[1\] and trains\[0\] .* of pairs"):
        method([trains[0], shorter[0]], [queries[0], shorter[1]])


def test_errors_are_as_exact_where_scores_hardly_vary():
    """Squares about the mean; sums of squares would cancel."""
    scatter = np.random.default_rng(0).normal(size=(5, 4, 2, 3))
    total = PairSum(4)
    for tau in 1e7 + scatter.reshape(-1, 2, 3):
        total.add(tau)
    expected = np.sqrt(4 * scatter.var(axis=1, ddof=1).sum(axis=0))
    np.testing.assert_allclose(total.errors, expected, rtol=1e-6)
    parts = scatter.var(axis=1).sum(axis=(1, 2))
    assert total.freedom() == pytest.approx(3 * parts.sum() ** 2 / (parts**2).sum())


def test_what_has_no_errors():
    """Averaged features, one draw, and noise that neighbouring pairs share."""
    train, query = pairs(4)

    def freedom(t, q):
        scores = dtrak.attribute(t, q)
        assert np.isfinite(scores.errors).all() == (scores.freedom > 0)
        if not scores.freedom:
            with pytest.raises(
                ValueError, match="'(trak|kernel)' have no errors: .* 2 noise draw"
            ):
                scores.interval()
        return scores.freedom

    def stored(draws, **changes):
        made = {"timesteps": [5] * (4 // draws), "draws": draws} | changes
        return as_features(train, **made), as_features(query, **made)

    assert 1 < freedom(*stored(2)) < 2
    assert freedom(*stored(4)) == 3
    assert freedom(*stored(1)) == 0
    assert freedom(stored(2)[0], query) == freedom(*stored(2))
    assert freedom(train, query) == freedom(train[0], query[0]) == 0
    assert freedom(stored(2)[0], stored(2, noise="cyclic")[1]) == 0
    for t, q, draws in ((train, query, 3), (train[0], query[0], 2), (*stored(2), 4)):
        with pytest.raises(ValueError, match=f"draws is {draws}; it must be"):
            dtrak.attribute(t, q, draws=draws)
    with pytest.raises(ValueError, match="draws is 0"):
        dtrak.attribute(train, query, draws=0)


def test_groups_must_be_of_the_training_images():
    train, query = pairs(2)
    with pytest.raises(ValueError, match=r"'of' has shape \(2,\); .* 9 training"):
        dtrak.attribute(train, query, groups={"of": ["a", "b"]})
    for nothing in (None, np.nan, ""):
        column = [*COLUMN[:8], nothing]
        with pytest.raises(ValueError, match="'of' has .* at position 8; every"):
            dtrak.attribute(train, query, groups={"of": column})
    with pytest.raises(TypeError, match="groups is an array"):
        dtrak.attribute(train, query, groups=COLUMN)
    with pytest.warns(UserWarning, match="Names of `of` look alike .* 'A' and 'a'"):
        dtrak.attribute(train, query, groups={"of": ["a", "A", *"bbbbbbb"]})
    scores = dtrak.attribute(train, query, groups={"of": COLUMN})
    with pytest.raises(ValueError, match="column is 'by'; it must be one of: 'of'"):
        scores.group("by")
    for wrong in ([None] * 9, ["a"], [["a"], ["b", "c"]]):
        with pytest.raises(ValueError, match="column has .*training example"):
            scores.group(wrong)
    numbers = np.arange(9) + 5
    numbered = dtrak.attribute(train, query, draws=2, groups={"of": numbers})
    for given, same in zip(numbered.group(numbers), numbered.group("of"), strict=True):
        np.testing.assert_array_equal(given, same)


def test_errors_go_with_their_scores(tmp_path):
    train, query = pairs()
    scores = dtrak.attribute(train, query, draws=R, groups={"of": COLUMN})
    top = scores.top(3, opposing=True)
    np.testing.assert_array_equal(
        top.errors, np.take_along_axis(scores.errors, top.index, axis=1)
    )
    np.testing.assert_array_equal(
        scores["2"].errors, scores.errors[2][scores["2"].index]
    )
    scores.save(tmp_path / "scores.npz")
    loaded = dtrak.Scores.load(tmp_path / "scores.npz")
    np.testing.assert_array_equal(loaded.errors, scores.errors)
    np.testing.assert_array_equal(loaded.columns["of"], COLUMN)
    for array, same in zip(loaded.group("of"), scores.group("of"), strict=True):
        np.testing.assert_array_equal(array, same)
    assert loaded.freedom == scores.freedom
    # Of groups of one image each, the freedom of their errors is that of the images'.
    images = {"of": list(map(str, range(len(COLUMN))))}
    alone = dtrak.attribute(train, query, draws=R, groups=images).group("of")
    assert alone.freedom == pytest.approx(scores.freedom)
    groups = scores.group("of")
    assert 0 < groups.freedom != scores.freedom
    assert dtrak.ensemble_mean([scores, scores]).group("of").freedom == groups.freedom
    assert scores.group(COLUMN[::-1]).freedom == 0
    some = scores.take([1, 0])
    for ours, theirs in zip(some.group("of")[1:3], groups[1:3], strict=True):
        np.testing.assert_array_equal(ours, theirs[[1, 0]])
    np.testing.assert_array_equal(some.errors, scores.errors[[1, 0]])
    assert some.query_ids.tolist() == scores.query_ids[[1, 0]].tolist()
    low, high = dataclasses.replace(scores, freedom=4).interval(0.9)
    # The 95% quantile of Student's distribution with 4 degrees of freedom.
    np.testing.assert_allclose(high - low, 2 * 2.131847 * scores.errors, rtol=1e-5)


def test_an_ensembles_error_is_no_smaller_than_with_noise_of_its_own():
    """The mean of errors is what models that share all their noise have."""
    other, how = COLUMN[::-1], {"draws": R}
    groups = [{"of": COLUMN, "by": other}, {"by": COLUMN}, {"of": COLUMN}]
    members = [
        dtrak.attribute(*pairs(seed=s), groups=groups[s], **how) for s in range(3)
    ]
    with pytest.warns(UserWarning, match="copies, 'of', 'by', than scores"):
        mean = dtrak.ensemble_mean(members)
    # Groupings are the same by their names, whatever they are called.
    by_name = [member.group(COLUMN).errors for member in members]
    np.testing.assert_allclose(mean.group(COLUMN).errors, np.mean(by_name, axis=0))
    assert np.isfinite(by_name).all() and np.ptp(by_name, axis=0).all()
    assert list(mean.group_errors) == [names_hash(COLUMN)]
    assert np.isnan(mean.group("by").errors).all()
    for wrong in (members[0], [1]):
        with pytest.raises(TypeError, match="scores is"):
            dtrak.ensemble_mean(wrong)
    values = np.array([member.scores for member in members])
    np.testing.assert_allclose(mean.spread, values.std(axis=0, ddof=1), rtol=1e-4)
    errors = np.array([member.errors for member in members])
    assert (mean.errors >= np.sqrt((errors**2).sum(axis=0)) / 3).all()
    shared = dtrak.ensemble_mean([members[0]] * 3)
    np.testing.assert_allclose(shared.errors, members[0].errors, rtol=1e-6)
    assert not shared.spread.any() and shared.freedom == members[0].freedom
    assert dtrak.ensemble_mean(members[:1]).spread is None


def test_intervals_hold_the_score_of_many_draws(images):
    """95% intervals of two draws hold the scores that 64 further ones give in 95%.

    They hold 96% of D-TRAK's and 98% of TRAK's, and of groups' 95% and 96%. The first
    timestep has most of the variance: with a degree of freedom for each of them it would
    be 92% and 88%.
    """
    timesteps, many, blocks = (100, 300, 500), 64, 40
    task = dtrak.Task(
        *(conftest.apply, dtrak.linear_schedule()),
        measurement=("square", "loss"),
        timesteps=timesteps,
        draws=many + 2 * blocks,
    )
    made = dtrak.featurize(
        task, conftest.init(jax.random.key(0)), images, dtrak.Projection("none")
    )
    for measurement in task.measurements:
        phi = np.asarray(made[measurement])
        phi = phi.reshape(len(timesteps), task.draws, *phi.shape[1:])

        def scores(draws, phi=phi):
            pairs = phi[:, draws].reshape(-1, *phi.shape[2:])
            number = draws.stop - draws.start
            return dtrak.attribute(
                *np.split(pairs, [9], axis=1), draws=number, groups={"of": COLUMN}
            )

        truth = scores(slice(0, many))
        held, held_groups = [], []
        for start in range(many, task.draws, 2):
            found = scores(slice(start, start + 2))
            low, high = found.interval(0.95)
            expected = truth.scores * (2 / many)
            held.append((low <= expected) & (expected <= high))
            groups, true_groups = found.group("of"), truth.group("of")
            distance = groups.scores - true_groups.scores * (2 / many)
            half = scipy.stats.t.ppf(0.975, found.freedom) * groups.errors
            held_groups.append(np.abs(distance) <= half)
        assert 0.90 < np.mean(held) < 0.99
        assert 0.90 < np.mean(held_groups) < 0.99
