"""Removing examples and retraining, on a network that compiles fast."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
from conftest import TINY, apply, init, train_apply

from dtrak_jax import diffusion, files, models, training
from dtrak_jax.attribution import Scores
from dtrak_jax.config import TrainConfig
from dtrak_jax.evaluation import counterfactual as cf
from dtrak_jax.training import ensemble

SCHEDULE = diffusion.linear_schedule()
CONFIG = TrainConfig(steps=12, batch_size=5, learning_rate=5e-2, save_every=4)
TRAIN_IDS = np.array([f"train-{i}" for i in range(12)])
IDS = np.array([f"generated-{i:05d}" for i in range(4)])
SEEDS = 7000 + np.arange(4)
QUERIES = ["generated-00002", "generated-00000"]
COUNT = 4


def generate(params, seeds):
    return diffusion.sample(apply, params, SCHEDULE, seeds, (8, 8, 1), steps=3)


def measure(params, images, ids):
    """A loss without noise: enough to see whose parameters and whose images it is of."""
    assert len(images) == len(ids)
    out = apply(params, images, np.full(len(images), 10), None)
    return np.square(np.asarray(out)).mean(axis=(1, 2, 3))


def make_scores(values, **changes):
    fields = {
        "scores": np.asarray(values, np.float32),
        "train_ids": TRAIN_IDS,
        "query_ids": IDS,
        "method": "dtrak",
        "damping": (0.1, False),
        "lambdas": np.ones(1),
        "eigenvalues": np.ones((1, 1)),
    }
    return Scores(**fields | changes)


@pytest.fixture(scope="module")
def scores():
    return make_scores(np.random.default_rng(1).normal(size=(4, 12)))


def eight_bits(images):
    return (
        np.clip(np.round(images * 127.5 + 127.5), 0, 255).astype(np.float32) / 127.5 - 1
    )


@pytest.fixture(scope="module")
def originals(images, tmp_path_factory):
    """The images of two models that were trained on everything, with two seeds."""
    folder = tmp_path_factory.mktemp("originals")
    seeds = (CONFIG.seed, CONFIG.seed + 1)
    members = [training.Member(str(seed), np.arange(12), seed) for seed in seeds]
    training.train_members(init, train_apply, SCHEDULE, images, members, CONFIG, folder)
    params = training.load_members(init, [m.name for m in members], CONFIG, folder)
    made = [
        generate(jax.tree.map(lambda leaf, i=i: leaf[i], params), SEEDS) for i in (0, 1)
    ]
    return [cf.Generated(eight_bits(one), IDS, SEEDS) for one in made]


def run(images, scores, generated, workdir, **changes):
    options = {
        "queries": QUERIES,
        "count": COUNT,
        "params": init(jax.random.key(0)),
        "measure": measure,
        "measured": "denoised at t = 10",
        "embeddings": {"pixels": cf.pixels},
    }
    options |= changes
    return cf.counterfactual(
        init,
        train_apply,
        SCHEDULE,
        options.pop("generate", generate),
        images,
        TRAIN_IDS,
        {"dtrak": scores},
        generated,
        CONFIG,
        workdir,
        **options,
    )


@pytest.fixture(scope="module")
def finished(images, scores, originals, tmp_path_factory):
    """(result, workdir) of a whole evaluation."""
    workdir = tmp_path_factory.mktemp("run")
    return run(images, scores, originals[0], workdir), workdir


def test_the_controls_are_retrainings_on_everything(finished, originals):
    """One makes the original images again, the other those of the other seed."""
    _, workdir = finished
    saved = files.read_npz(workdir / "counterfactual" / "images.npz")
    assert saved["query_ids"].tolist() == QUERIES
    first, second = (one.images[[2, 0]] for one in originals)
    np.testing.assert_array_equal(saved["original"], first)
    # Rounding of the network may move a pixel to the next of its 256 values.
    step = 1.01 / 127.5
    np.testing.assert_allclose(saved["everything"], first, atol=step)
    np.testing.assert_allclose(saved["other-seed"], second, atol=step)
    for method in ("dtrak", "random", "other-seed"):
        distance = np.abs(saved[method] - first).max(axis=(1, 2, 3))
        assert (distance > 0.05).all(), method


def test_a_removal_is_what_training_by_hand_on_the_rest_gives(
    finished, images, scores, tmp_path
):
    """Without the top four of twelve, 8 of 12 steps; then sampled with its own seed."""
    result, workdir = finished
    rows = np.sort(np.argsort(scores.scores[2])[:-COUNT])
    member = training.Member("by hand", rows, CONFIG.seed)
    config = dataclasses.replace(CONFIG, steps=8)
    training.train_members(
        init, train_apply, SCHEDULE, images, [member], config, tmp_path
    )
    params = training.load_members(init, [member.name], config, tmp_path)
    params = jax.tree.map(lambda leaf: leaf[0], params)
    image = generate(params, SEEDS[2:3])
    saved = files.read_npz(workdir / "counterfactual" / "images.npz")
    np.testing.assert_allclose(saved["dtrak"][:1], eight_bits(image), atol=1.01 / 127.5)
    original = saved["original"][:1]
    losses = [
        measure(p, original, QUERIES[:1])[0] for p in (params, init(jax.random.key(0)))
    ]
    increase = result["rows"][0]["loss_increase"]
    assert math.isclose(increase, losses[0] - losses[1], rel_tol=1e-4)


def test_the_results(finished):
    result, workdir = finished
    assert json.loads((workdir / "counterfactual.json").read_text()) == result
    assert result["settings"] == {
        "count": COUNT,
        "queries": QUERIES,
        "seed": 0,
        "steps": 8,
    }
    methods = ["dtrak", "random", "everything", "other-seed"]
    rows = [(row["method"], row["query"]) for row in result["rows"]]
    assert rows == [(method, query) for method in methods for query in QUERIES]
    saved = files.read_npz(workdir / "counterfactual" / "images.npz")
    for row in result["rows"]:
        i = QUERIES.index(row["query"])
        a, b = saved["original"][i].ravel(), saved[row["method"]][i].ravel()
        metrics = {"pixel_l2", "pixels_cosine", "loss_increase"}
        assert set(row) == {"method", "query", *metrics}
        assert math.isclose(row["pixel_l2"], np.linalg.norm(a - b), abs_tol=1e-5)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert math.isclose(row["pixels_cosine"], cosine, abs_tol=1e-5)
    metrics = ["pixel_l2", "pixels_cosine", "loss_increase"]
    for one in result["summary"]:
        values = [
            r[one["metric"]] for r in result["rows"] if r["method"] == one["method"]
        ]
        assert math.isclose(one["mean"], np.mean(values))
    for one in result["differences"]:
        assert one["method"] == "dtrak"
        own, random = (
            [r[one["metric"]] for r in result["rows"] if r["method"] == method]
            for method in ("dtrak", "random")
        )
        assert math.isclose(one["median"], np.median(np.subtract(own, random)))
    assert [one["metric"] for one in result["differences"]] == metrics
    summarized = [(one["method"], one["metric"]) for one in result["summary"]]
    assert summarized == [(method, metric) for method in methods for metric in metrics]


@pytest.fixture
def trained(monkeypatch):
    """Names of the members that training began or continued."""
    names, train = [], ensemble._Trainer.train

    def record(self, group, *arguments):
        names.extend(member.name for member in group)
        return train(self, group, *arguments)

    monkeypatch.setattr(ensemble._Trainer, "train", record)
    return names


def recorder(stop_after=math.inf):
    """(seeds that images were made of so far, a `generate` that stops after some)."""
    made = []

    def record(params, seeds):
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(seeds.tolist())
        return generate(params, seeds)

    return made, record


def test_what_is_done_is_not_done_again(finished, images, scores, originals, trained):
    result, workdir = finished
    again = run(images, scores, originals[0], workdir, generate=None)
    assert again == result
    assert not trained


def test_other_losses_are_measured_again(
    finished, images, scores, originals, trained, tmp_path
):
    result = finished[0]
    workdir = shutil.copytree(finished[1], tmp_path / "copy")

    def double(*arguments):
        return 2 * measure(*arguments)

    changed = {"measure": double, "measured": "twice"}
    again = run(images, scores, originals[0], workdir, **changed)
    assert not trained
    for before, after in zip(result["rows"], again["rows"], strict=True):
        assert after == before | {
            "loss_increase": pytest.approx(2 * before["loss_increase"], rel=1e-5)
        }


def test_only_what_changed_is_done(
    finished, images, scores, originals, trained, tmp_path
):
    """Another score of one query retrains its model alone, in a folder of its own."""
    workdir = shutil.copytree(finished[1], tmp_path / "copy")
    changed = scores.scores.copy()
    changed[2] *= -1
    made, record = recorder()
    run(images, make_scores(changed), originals[0], workdir, generate=record)
    (name,) = trained
    assert name.startswith("dtrak-generated-00002-")
    assert made == [[7002]]
    folders = (workdir / "counterfactual").glob("dtrak-generated-00002-*")
    assert len(list(folders)) == 2


def test_other_queries_reuse_the_controls(
    finished, images, scores, originals, trained, tmp_path
):
    """They only generate again what the images are now compared with."""
    workdir = shutil.copytree(finished[1], tmp_path / "copy")
    made, record = recorder()
    queries = [QUERIES[1]]
    run(images, scores, originals[0], workdir, generate=record, queries=queries)
    assert not trained
    assert made == [[7000], [7000]]


def test_a_run_that_was_stopped_continues(
    finished, images, scores, originals, trained, tmp_path, monkeypatch
):
    """Killed after the removals were trained, and again between two regenerations."""
    result, _ = finished
    train_members = training.train_members

    def train_removals(*arguments, **options):
        if trained:
            raise KeyboardInterrupt
        train_members(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_members", train_removals)
        run(images, scores, originals[0], tmp_path)
    assert len(trained) == 4
    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        run(images, scores, originals[0], tmp_path, generate=recorder(2)[1])
    assert [name.rpartition("-")[0] for name in trained] == ["everything", "other-seed"]
    trained.clear()
    made, record = recorder()
    assert run(images, scores, originals[0], tmp_path, generate=record) == result
    assert not trained
    assert len(made) == 6 - 2


def test_an_image_that_is_not_finite(finished, images, scores, originals, tmp_path):
    workdir = shutil.copytree(finished[1], tmp_path / "copy")
    (path,) = (workdir / "counterfactual").glob("random-generated-00000-*/images.npz")
    path.unlink()

    def explode(params, seeds):
        return np.full((len(seeds), 8, 8, 1), np.nan)

    with pytest.raises(FloatingPointError, match="that random-generated-00000-"):
        run(images, scores, originals[0], workdir, generate=explode)


def test_removals_take_exactly_the_top(scores):
    kept = cf.removals({"dtrak": scores}, QUERIES, TRAIN_IDS, COUNT, seed=0)
    assert set(kept) == {(m, q) for m in ("dtrak", "random") for q in QUERIES}
    for (method, query), rows in kept.items():
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == 12 - COUNT
        if method == "dtrak":
            own = scores.scores[IDS.tolist().index(query)]
            removed = np.setdiff1d(np.arange(12), rows)
            assert own[removed].min() > own[rows].max()


def test_random_removals_depend_on_seed_and_query_alone(scores):
    def rows(queries, seed, given):
        kept = cf.removals(given, queries, TRAIN_IDS, COUNT, seed)
        return {query: kept["random", query].tolist() for query in queries}

    whole = rows(IDS.tolist(), 0, {"dtrak": scores})
    assert rows(IDS[::-1].tolist(), 0, {}) == whole
    assert rows([QUERIES[0]], 0, {}) == {QUERIES[0]: whole[QUERIES[0]]}
    assert len({tuple(rows) for rows in whole.values()}) == len(IDS)
    assert rows(IDS.tolist(), 1, {}) != whole


def test_the_plan_keeps_the_epochs_and_names_the_rows():
    kept = {("dtrak", "a"): np.arange(9), ("random", "a"): np.arange(1)}
    config = TrainConfig(steps=10, seed=5)
    runs = cf.plan(kept, ["a"], 12, config)
    found = [(r.method, len(r.member.rows), r.member.seed, r.steps) for r in runs]
    assert found == [
        ("dtrak", 9, 5, 8),
        ("random", 1, 5, 1),
        ("everything", 12, 5, 10),
        ("other-seed", 12, 6, 10),
    ]
    other = cf.plan({("dtrak", "a"): np.arange(1, 10)}, ["a"], 12, config)
    assert runs[0].member.name.startswith("dtrak-a-")
    assert len(runs[0].member.name) == len("dtrak-a-") + 8
    assert other[0].member.name != runs[0].member.name
    assert other[1].member.name == runs[2].member.name


def test_equal_images_have_distance_0_and_cosine_1(images):
    metrics = cf.compare(images, images, {"pixels": cf.pixels})
    np.testing.assert_array_equal(metrics["pixel_l2"], 0)
    np.testing.assert_allclose(metrics["pixels_cosine"], 1)


def test_distances_by_hand():
    a = np.array([3.0, 4.0, 0.0, 0.0]).reshape(2, 1, 1, 2)
    b = np.array([4.0, 3.0, 1.0, 0.0]).reshape(2, 1, 1, 2)
    metrics = cf.compare(a, b, {"first": lambda x: x[:, 0, 0, :1], "pixels": cf.pixels})
    np.testing.assert_allclose(metrics["pixel_l2"], [2**0.5, 1])
    np.testing.assert_allclose(metrics["first_cosine"], [1, 0])
    np.testing.assert_allclose(metrics["pixels_cosine"], [24 / 25, 0])


def test_the_summary_agrees_with_scipy():
    """Percentile intervals from other resamples: equal but for their own noise."""
    values = np.random.default_rng(0).exponential(size=60)
    summary = cf.summarize(values)
    for name, statistic in (("median", np.median), ("mean", np.mean)):
        result = scipy.stats.bootstrap(
            (values,), statistic, n_resamples=20000, method="percentile", rng=1
        )
        low, high = result.confidence_interval
        assert math.isclose(summary[name], statistic(values))
        assert abs(summary[f"{name}_low"] - low) < 0.1 * (high - low)
        assert abs(summary[f"{name}_high"] - high) < 0.1 * (high - low)
    constant = cf.summarize(np.full(5, 2.0))
    assert set(constant.values()) == {2.0}
    assert cf.summarize(values) == summary


def test_the_bottleneck_is_the_mid_blocks_output(images):
    """Less its mean; as flax captures it among everything, batch by batch as at once."""
    model = models.build(TINY)
    params = models.init(model, jax.random.key(0))

    @jax.jit
    def capture(x, t):
        return model.apply(
            {"params": params},
            x,
            t,
            capture_intermediates=True,
            mutable=["intermediates"],
        )[1]["intermediates"]["mid_block"]["__call__"]

    (h,) = capture(images, np.full(12, 10))
    embed = cf.bottleneck(model, params, SCHEDULE, images, batch_size=5)
    features = embed(images[:7])
    assert features.shape == (7, TINY.block_out_channels[-1])
    expected = np.asarray(h).reshape(12, -1, 8).mean(axis=1)
    expected -= expected.mean(axis=0)
    np.testing.assert_allclose(features, expected[:7], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count is 0; it must be 1 to 11"),
        ({"count": 12}, "count is 12; it must be 1 to 11"),
        ({"queries": []}, "name one or more"),
        ({"queries": ["generated-00001"] * 2}, "each of them once"),
        (
            {"queries": ["validation-3"]},
            r"'validation-3', which is no generated image; the 4 .* generated-00000,",
        ),
    ],
)
def test_refused_arguments(scores, originals, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(TRAIN_IDS, scores, originals[0], tmp_path, **changes)
    with pytest.raises(ValueError, match="11 training images and 12 train_ids"):
        run(TRAIN_IDS[1:], scores, originals[0], tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_refused_scores(scores):
    def refused(message, method="dtrak", **changes):
        given = {method: dataclasses.replace(scores, **changes)}
        with pytest.raises(ValueError, match=message):
            cf.removals(given, QUERIES, TRAIN_IDS, COUNT, seed=0)

    refused(
        r"scores of dtrak are of another training set: .* train-11, train-10, .* \(12",
        train_ids=TRAIN_IDS[::-1],
    )
    refused("of dtrak have none for 'generated-00002'", query_ids=np.char.upper(IDS))
    refused("'random', which is the name of a control", method="random")
