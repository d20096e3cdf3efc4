"""Retraining, LDS and counterfactuals of a model of one's own, of numbers alone."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_lds import make_truth

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.evaluation import trust
from dtrak_jax.evaluation.changes import remade

N, QUERIES = 20, 3
VALUES = np.random.default_rng(0).normal(size=(N, QUERIES))
LABELS = np.arange(N) % 4
IDS = [f"n{i}" for i in range(N)]
RANDOM = np.random.default_rng(1)
NAMED = dtrak.Scores(VALUES.T, IDS, list("abc"), "trak")


class Trained:
    """How to train a model, the mean of the rows' values; counts how often it is done."""

    def __init__(self, stop=None):
        self.calls, self.stop = [], stop

    def __call__(self, rows, seed):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((tuple(rows), seed))
        return VALUES[rows].mean(axis=0) + 0.01 * seed


def losses(model):
    return -model


class Ordered:
    """Losses of queries that have names."""

    def __init__(self, ids):
        self.ids = np.array(list(ids))

    def __call__(self, model):
        return -model


def retrain(train=None, losses=losses, **changes):
    options = {"subsets": 12, "seeds": 2, "ids": IDS, "labels": LABELS} | changes
    n = options.pop("n", N)
    return dtrak.retrain(train or Trained(), n, losses, **options)


def test_every_subset_is_trained_with_every_seed():
    """Halves with each label's share; what each model said is where its rows are."""
    train = Trained()
    truth = retrain(train)
    assert truth.outputs.shape == (12, 2, QUERIES)
    assert (truth.masks.sum(axis=1) == N // 2).all()
    for label in range(4):
        shares = truth.masks[:, label == LABELS].sum(axis=1)
        assert set(shares) <= {2, 3}
    assert len(set(train.calls)) == 24
    for mask, by_seed in zip(truth.masks, truth.outputs, strict=True):
        for seed, values in enumerate(by_seed):
            rows = np.flatnonzero(mask)
            assert (tuple(rows), seed) in train.calls
            np.testing.assert_allclose(values, -VALUES[rows].mean(axis=0) - 0.01 * seed)
    assert truth.query_ids.tolist() == ["0", "1", "2"]
    found = dtrak.lds(VALUES.T, truth)
    assert found.value == pytest.approx(1) and found.ceiling.value == pytest.approx(1)
    assert found.high <= 1
    assert "3 queries, 12 subsets × 2 seeds, 10 of 20 images" in repr(truth)
    shown = r"LDS\(1.000 \[.+\], ceiling 1.000, 3 queries, 12 subsets × 2 seeds\)"
    assert re.fullmatch(shown, repr(found))


def test_a_store_continues_and_refuses_what_is_other(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        retrain(Trained(stop=5), store=tmp_path / "new" / "store")
    store, rest = tmp_path / "new" / "store", Trained()
    truth = retrain(rest, store=store)
    assert len(rest.calls) == 24 - 5
    np.testing.assert_array_equal(truth.outputs, retrain().outputs)
    more, again = Trained(), Trained()
    retrain(more, store=store, subsets=13)
    assert len(more.calls) == 2
    for changes, differing in (
        ({"seed": 1}, "training images"),
        ({"ids": IDS[::-1]}, "training images"),
        ({"query_ids": ["a", "b", "c"]}, "queries"),
        ({"version": "other network"}, "version"),
    ):
        with pytest.raises(ValueError, match=f"with other {differing}. Name another"):
            retrain(again, store=store, **changes)
    assert not again.calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": 7}, "7 subsets; an interval needs at least 8"),
        ({"seeds": 0}, "seeds is 0"),
        ({"n": 1, "ids": None, "labels": None}, "n is 1"),
        (
            {"fraction": 0.01},
            "of 20 training images a subset would have 0; it must have 1 to 19",
        ),
        ({"ids": IDS[:3]}, "3 ids for 20"),
        ({"labels": LABELS[:3]}, r"labels have shape \(3,\); they must be \[20\]"),
        ({"query_ids": ["a", "a", "b"]}, "'a' occurs more than once"),
        ({"query_ids": ["a", "b"]}, r"shape \(3,\); .* each query, \[2\]"),
        ({"losses": lambda model: model.sum()}, r"shape \(\); .* \[queries\]"),
        ({"losses": lambda model: model * np.nan}, "0000-0 are not all finite"),
        ({"losses": lambda model: np.ones(3)}, "train must use its rows"),
    ],
)
def test_what_is_wrong_is_refused_before_the_second_model_is_done(changes, message):
    train = Trained()
    with pytest.raises(ValueError, match=message):
        retrain(train, **changes)
    assert len(train.calls) <= ("losses" in changes) + ("query_ids" in changes) * 1 + 1


def test_a_store_that_says_no_version_is_continued(tmp_path):
    retrain(store=tmp_path)
    for path in tmp_path.glob("*.npz"):
        saved = files.read_npz(path)
        del saved["version"]
        files.write_npz(path, **saved)
    again = Trained()
    retrain(again, store=tmp_path)
    assert not again.calls


def test_a_seed_that_is_not_used_is_said():
    def train(rows, seed):
        return VALUES[rows].mean(axis=0)

    with pytest.warns(UserWarning, match="the same for all 2 seeds"):
        retrain(train)


def test_scores_are_matched_by_their_ids():
    """In another order they are the same; of other ids, or another shape, refused."""
    rng = np.random.default_rng(0)
    truth, values = make_truth(rng, noise=1)
    found = dtrak.lds(values, truth)
    assert found.value == pytest.approx(found.per_query.mean())
    q, n = rng.permutation(30), rng.permutation(40)
    scores = dtrak.Scores(
        values[np.ix_(q, n)], truth.train_ids[n], truth.query_ids[q].tolist(), "trak"
    )
    np.testing.assert_array_equal(dtrak.lds(scores, truth).samples, found.samples)
    result = trust.record({"trak": scores}, truth)
    row = result["rows"][0]
    assert (row["lds"], row["low"], row["high"]) == (found.value, found.low, found.high)
    assert result["ceiling"] == found.ceiling._asdict()
    assert result["differences"][0]["b"] == "random"
    with pytest.raises(ValueError, match=r"must be finite, and \[30, 40\]"):
        dtrak.lds(values.T, truth)
    wrong = dataclasses.replace(scores, query_ids=["x", *scores.query_ids[1:]])
    with pytest.raises(ValueError, match="the ids of queries differ between"):
        dtrak.lds(wrong, truth)
    few = dtrak.RetrainedLosses(truth.outputs[:9], truth.masks[:9].tolist())
    with pytest.raises(ValueError, match="not of the same retrained models"):
        found.less(dtrak.lds(values, few))


def test_what_has_no_correlation_is_said():
    """A constant, of scores or losses, predicts nothing, to rounding or not."""
    truth, constant = retrain(), np.full((QUERIES, N), 0.1)
    assert truth.predict(VALUES.T) == pytest.approx(truth.masks @ VALUES)
    with pytest.raises(
        ValueError, match="3 of 3 queries, such as '0', have the same p"
    ):
        dtrak.lds(constant, truth)
    still = dataclasses.replace(truth, outputs=np.ones_like(truth.outputs))
    with pytest.raises(ValueError, match="have the same loss for every subset"):
        dtrak.lds(VALUES.T, still)
    one = np.concatenate([VALUES.T[:2], constant[2:]])
    with pytest.warns(UserWarning, match="1 of 3 queries, such as '2', .* counts as 0"):
        found = dtrak.lds(one, truth)
    assert found.per_query[2] == 0 and found.value == pytest.approx(2 / 3)
    with pytest.warns(UserWarning, match="LDS of trak: 1 of 3 queries"):
        trust.record({"trak": one}, truth)


@pytest.mark.parametrize(
    ("outputs", "masks", "ids", "message"),
    [
        (
            np.ones((9, 2)),
            np.ones((9, 4)),
            None,
            "masks are float64; they must be bool",
        ),
        (np.ones(9), np.ones((9, 4), bool), None, r"shape \(9,\) and masks \(9, 4\)"),
        (np.ones((9, 2)), np.ones((8, 4), bool), None, "outputs have shape"),
        (np.ones((9, 2)), np.ones((9, 4), bool), ["a"], "1 ids for 2"),
        (np.ones((9, 2)) * np.nan, np.ones((9, 4), bool), None, "not all finite"),
        (np.ones((9, 2)), np.ones((9, 4), bool), None, "9 masks are the same subset"),
    ],
)
def test_losses_of_ones_own_must_fit_together(outputs, masks, ids, message):
    with pytest.raises(ValueError, match=message):
        dtrak.RetrainedLosses(outputs, masks, ids)


def test_losses_of_queries_share_their_noise(images):
    """A loop over timesteps and draws; conditions and frozen parameters are passed on."""
    schedule, levels = dtrak.linear_schedule(), np.arange(4, dtype=np.float32)

    def apply(network, x, t, cond):
        params, frozen = network
        return params["w"] * x + frozen * cond["level"].reshape(-1, 1, 1, 1)

    options = {
        "cond": {"level": levels},
        "frozen": np.float32(0.5),
        "timesteps": [100, 700],
    }
    measure = dtrak.QueryLosses(apply, schedule, images[:4], draws=2, **options)
    params = {"w": jnp.float32(0.3)}
    assert measure(params).shape == (4,)
    np.testing.assert_allclose(measure({"w": 0.3}), measure(params), rtol=1e-5)
    assert measure.ids.tolist() == ["0", "1", "2", "3"]
    (one,) = dtrak.QueryLosses(
        *(apply, schedule, images[2:3]),
        ids=["2"],
        draws=2,
        **options | {"cond": {"level": levels[2:3]}},
    )(params)
    assert measure(params)[2] == pytest.approx(one, rel=1e-5)
    for changes, message in (
        ({"timesteps": 1001}, "^timesteps is 1001"),
        ({"draws": 0}, "^draws is 0"),
        ({"ids": ["a"]}, "1 ids for 4"),
        ({"cond": {"level": levels[:3]}}, "cond: level has 3 rows and images 4"),
        ({"bounds": (0, 1)}, r"they must be in \[0, 1\]"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ):
        with pytest.raises(ValueError, match=message):
            dtrak.QueryLosses(apply, schedule, images[:4], **options | changes)
    small = dtrak.QueryLosses(lambda p, x, t, cond: x[:, :1], schedule, images)
    with pytest.raises(ValueError, match="a prediction must have the shape"):
        small({"w": 0.3})


def generate(model, rows):
    return np.float32(model[rows]).reshape(-1, 1, 1, 1) - [[[0.5]]]


def counterfactual(train=None, generate=generate, scores=VALUES.T, **changes):
    originals = generate(VALUES.mean(axis=0), np.arange(QUERIES))
    options = {"originals": originals, "count": 4} | changes
    return dtrak.counterfactual(scores, train or Trained(), generate, **options)


def test_counterfactuals_remove_what_scores_rank_first():
    """The mean moves by what is taken away: by most for the largest values."""
    train = Trained()
    found = counterfactual(train, losses=losses)
    assert len(train.calls) == 2 * QUERIES + 2
    for q, (rows, seed) in enumerate(train.calls[:QUERIES]):
        removed = np.setdiff1d(np.arange(N), rows)
        assert seed == 0 and set(removed) == set(np.argsort(VALUES[:, q])[-4:])
    moved = {(row["method"], row["query"]): row["pixel_l2"] for row in found.rows}
    for q in range(QUERIES):
        kept = np.sort(VALUES[:, q])[:-4].mean()
        expected = abs(VALUES[:, q].mean() - kept)
        assert moved["scores", str(q)] == pytest.approx(expected, rel=1e-5)
        assert moved["scores", str(q)] > moved["random", str(q)]
        assert moved["everything", str(q)] == 0
        assert moved["other-seed", str(q)] == pytest.approx(0.01, rel=1e-4)
    increases = [
        row["loss_increase"] for row in found.rows if row["method"] == "scores"
    ]
    np.testing.assert_allclose(
        increases, [moved["scores", q] for q in "012"], rtol=1e-5
    )
    assert found.images["scores"].shape == (QUERIES, 1, 1, 1)
    for q in range(QUERIES):
        strongest = np.argsort(-VALUES[:, q])[:4].astype(str)
        assert found.removed["scores"][str(q)] == strongest.tolist()
    for (rows, _), gone in zip(
        train.calls[QUERIES:], found.removed["random"].values(), strict=False
    ):
        assert set(map(int, gone)) == set(range(N)) - set(rows)
    assert found.record()["removed"] == found.removed
    assert found.removed.keys() == {"scores", "random"}
    everything = [r["loss_increase"] for r in found.rows if r["method"] == "everything"]
    assert everything == [0] * QUERIES
    assert repr(found).startswith(
        "Counterfactual(3 queries, 4 of 20 removed, median pixel_l2: scores 0."
    )
    assert found.record()["settings"] == {
        "count": 4,
        "queries": ["0", "1", "2"],
        "seed": 0,
        "train": N,
    }


def test_counterfactuals_continue_and_share_random_choices(tmp_path):
    first, rest, more = Trained(stop=4), Trained(), Trained()
    with pytest.raises(KeyboardInterrupt):
        counterfactual(first, store=tmp_path)
    found = counterfactual(rest, store=tmp_path)
    assert len(rest.calls) == 8 - 4
    assert found.record() == counterfactual().record()
    scores = dtrak.Scores(VALUES.T, np.arange(N).astype(str), ["0", "1", "2"], "trak")
    both = {"scores": VALUES.T, "a/b": scores, "opposed": -VALUES.T}
    assert len(counterfactual(more, scores=both, store=tmp_path).differences) == 6
    assert len(more.calls) == 6
    few = counterfactual(more, queries=1, store=tmp_path)
    (query,) = few.settings["queries"]
    assert few.rows[0] in found.rows and query in found.settings["queries"]
    with pytest.raises(ValueError, match="with other version"):
        counterfactual(store=tmp_path, version="2")
    originals = generate(VALUES.mean(axis=0) + 1, np.arange(QUERIES))
    with pytest.raises(ValueError, match="with other originals"):
        counterfactual(originals=originals, store=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 20}, "count is 20; it must be 1 to 19"),
        ({"queries": 0}, "queries is 0"),
        (
            {"scores": {"random": VALUES.T}},
            "scores has the name 'random': that name is",
        ),
        ({"scores": {"original": VALUES.T}}, "name 'original': that name is taken"),
        (
            {"scores": {"a-set": VALUES.T}, "sets": {"a": [[0, 1, 2, 3]] * 3}},
            "sets has the name 'a', whose pictures are called 'a-set'",
        ),
        ({"scores": {}}, "scores are empty"),
        ({"embeddings": {"pixels": np.ravel}}, "embeddings has the name 'pixels'"),
        ({"sets": {"a": [[0, 1], [2]]}}, "rows of different lengths"),
        ({"scores": VALUES[0]}, r"scores have shape \(3,\)"),
        ({"scores": {"a": VALUES.T, "b": VALUES}}, r"'b' have shape \(20, 3\)"),
        ({"scores": VALUES.T * np.nan}, "they must be finite"),
        (
            {"originals": np.ones((2, 1, 1, 1))},
            r"originals have shape .* \[3, 1, 1, 1\]",
        ),
        ({"sets": {"a": [[0, 0, 1, 2]] * 3}}, r"sets\['a'\] has shape .* \[3, 4\]"),
        ({"sets": {"a": [[0, 1, 2, 20]] * 3}}, "different positions below 20"),
        ({"losses": lambda model: model[:2]}, r"shape \(2,\); .* each query, \[3\]"),
        ({"generate": lambda model, rows: np.ones((3, 1))}, "what generate returns"),
        (
            {"generate": lambda *args: generate(*args) + RANDOM.normal(size=(1, 1))},
            r"generate is random: .* differ by \d",
        ),
    ],
)
def test_counterfactuals_that_do_not_fit_are_refused(changes, message):
    train = Trained()
    with pytest.raises(ValueError, match=message):
        counterfactual(train, **changes)
    assert len(train.calls) == len({"losses", "generate"} & changes.keys())


@pytest.mark.parametrize(
    "changes", [{"sets": np.zeros((3, 4))}, {"scores": {1: VALUES.T}}]
)
def test_counterfactuals_of_another_class_are_refused(changes):
    with pytest.raises(TypeError, match="sets is an array|a name of scores is 1"):
        counterfactual(**changes)


def test_a_store_that_is_a_file_is_refused_before_the_first_model(tmp_path):
    file, train = tmp_path / "file", Trained()
    file.write_text("")
    for make in (retrain, counterfactual):
        for store, words in ((file, "which is"), (file / "store", f"and {file} is")):
            with pytest.raises(
                NotADirectoryError, match=f"store is .*, {words} a file"
            ):
                make(train, store=store)
    assert not train.calls


def test_a_generate_that_is_random_is_refused_also_where_a_store_goes_on(tmp_path):
    def noisy(*arguments):
        return generate(*arguments) + RANDOM.normal(size=(1, 1))

    with pytest.raises(KeyboardInterrupt):
        counterfactual(Trained(stop=2), store=tmp_path)
    originals = generate(VALUES.mean(axis=0), np.arange(QUERIES))
    with pytest.raises(ValueError, match="generate is random"):
        counterfactual(generate=noisy, originals=originals, store=tmp_path)


def test_losses_of_queries_in_another_order_are_refused():
    train = Trained()
    with pytest.raises(
        ValueError, match="3 queries and query_ids of 3: at position 1 is"
    ):
        retrain(train, Ordered("abc"), query_ids=list("acb"))
    with pytest.raises(ValueError, match="scores of 3: at position 0 is 'c' and 'a'"):
        counterfactual(train, scores=NAMED, losses=Ordered("cab"))
    assert not train.calls
    assert retrain(losses=Ordered("abc"), query_ids=list("abc")).query_ids[1] == "b"
    # Numbers are what queries are called that nobody has named.
    assert retrain(losses=Ordered("012"), query_ids=list("acb")).query_ids[1] == "c"


def test_training_that_does_not_make_the_model_again_is_said():
    def others(model, rows):
        return generate(model, rows) + 1

    originals = generate(VALUES.mean(axis=0), np.arange(QUERIES))
    with pytest.warns(UserWarning, match="does not make the original model again"):
        found = counterfactual(generate=others, originals=originals)
    assert not remade(found.summary).is_remade
    assert remade(counterfactual().summary).is_remade


def test_models_that_make_the_same_pictures_are_said():
    with pytest.warns(UserWarning, match="exactly the same pictures"):
        found = counterfactual(generate=lambda model, rows: np.ones((len(rows), 2)))
    assert not remade(found.summary).is_remade
