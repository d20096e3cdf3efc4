"""Removing examples and retraining, on a network that compiles fast."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
from conftest import TINY, init, train_apply, use_simple_network, use_two_devices
from test_clip_similarity import write_clip

import dtrak_jax as dtrak
from dtrak_jax import data, diffusion, files, models, pipeline, training
from dtrak_jax.attribution import Scores
from dtrak_jax.attribution.duplicates import Found
from dtrak_jax.config import (
    AttributionConfig,
    ClipConfig,
    Config,
    CounterfactualConfig,
    DataConfig,
    EnsembleConfig,
    FeaturesConfig,
    QueriesConfig,
    SampleConfig,
    TrainConfig,
)
from dtrak_jax.digests import short_digest
from dtrak_jax.encoding.clip import Clip
from dtrak_jax.evaluation import removals
from dtrak_jax.evaluation.changes import distances, flattened
from dtrak_jax.evaluation.counterfactual import (
    FOLDER,
    bottleneck,
    chosen_set,
    counterfactual,
)
from dtrak_jax.evaluation.outputs import measure
from dtrak_jax.evaluation.removals import RANDOM, Choice, plan, removed_rows
from dtrak_jax.evaluation.statistics import summarize
from dtrak_jax.methods import METHODS
from dtrak_jax.models.functions import bottleneck_fn
from dtrak_jax.run import Run
from dtrak_jax.training import ensemble

COUNT = 4
CONFIG = Config(
    data=DataConfig(source="digits", train=12, validation=0),
    model=TINY,
    train=TrainConfig(steps=12, batch_size=5, learning_rate=5e-2, save_every=4),
    sample=SampleConfig(count=4, steps=3, seed=7),
    attribution=AttributionConfig(methods=("pixel-dot",)),
    ensemble=EnsembleConfig(timesteps=2, draws=1),
    features=FeaturesConfig(measurements=("loss",), timesteps=(100, 500), dim=8),
    counterfactual=CounterfactualConfig(
        queries=2,
        count=COUNT,
        methods=("pixel-dot",),
        squared=("pixel-cosine",),
        sets=("trak",),
    ),
)
REMOVALS = ["pixel-dot", "pixel-cosine-squared", "trak-set", "random"]
CONTROLS = ["everything", "other-seed"]
CHOICES = [*REMOVALS, *CONTROLS]
METRICS = ["pixel_l2", "pixels_cosine", "bottleneck_cosine", "loss_increase"]
PIXEL = 1.01 / 127.5
"""Rounding of the network may move a pixel to the next of its 256 values."""


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Two of the devices, and the network that compiles fast."""
    with pytest.MonkeyPatch.context() as patch:
        use_two_devices(patch)
        use_simple_network(patch)
        yield


@pytest.fixture(scope="module")
def finished(two_devices, tmp_path_factory):
    """A run in which everything up to the counterfactuals was made."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return pipeline.run("counterfactual", CONFIG, workdir)


@pytest.fixture(scope="module")
def queries(finished):
    """The ids of the two queries."""
    return finished.json("counterfactual")["settings"]["queries"]


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of that run's directory, which a test may change."""
    return shutil.copytree(finished.workdir, tmp_path / "run")


@pytest.fixture
def trained(monkeypatch):
    """The names of the models that training began or continued, group by group."""
    groups, train_group = [], ensemble.train_group

    def record(recipe, group, *arguments):
        groups.append([member.name for member in group])
        return train_group(recipe, group, *arguments)

    monkeypatch.setattr(ensemble, "train_group", record)
    return groups


@pytest.fixture
def sampled(monkeypatch):
    """The seeds that images were made of, call by call."""
    calls, sample = [], diffusion.sample

    def record(apply, params, sampler, seeds, *arguments, **options):
        calls.append(seeds.tolist())
        return sample(apply, params, sampler, seeds, *arguments, **options)

    monkeypatch.setattr(diffusion, "sample", record)
    return calls


def evaluate(workdir, config=CONFIG, **changes):
    """The results of a run directory, with some settings changed."""
    changed = dataclasses.replace(config.counterfactual, **changes)
    run = Run.at(dataclasses.replace(config, counterfactual=changed), workdir)
    counterfactual(run)
    return run.json("counterfactual")


def positions(queries):
    """The positions of generated images."""
    return [int(query.removeprefix("generated-")) for query in queries]


def train_by_hand(run, rows, folder, **changes):
    """The parameters of a model that is trained alone."""
    config = dataclasses.replace(CONFIG.train, **changes)
    recipe = training.Recipe(init, train_apply, run.schedule, config)
    return training.train(recipe, run.splits.train.images[rows], folder)


def make_again(run, params, rows):
    """The images of some seeds as they are kept."""
    return data.from_pixels(data.to_pixels(run.generate(params, run.seeds[rows])))


def folders(workdir, prefix):
    """The names of the models that are there."""
    return [path.name for path in (workdir / FOLDER).glob(f"{prefix}-*")]


def test_the_controls_are_retrainings_on_everything(finished, queries, tmp_path):
    """One makes the original images again, the other those of the other seed."""
    rows = positions(queries)
    saved = files.read_npz(finished.workdir / FOLDER / "images.npz")
    assert saved["query_ids"].tolist() == queries
    originals = finished.queries["generated"].images[rows]
    np.testing.assert_array_equal(saved["original"], originals)
    np.testing.assert_allclose(saved["everything"], originals, atol=PIXEL)
    other = train_by_hand(finished, np.arange(12), tmp_path, seed=CONFIG.train.seed + 1)
    expected = make_again(finished, other, rows)
    np.testing.assert_allclose(saved["other-seed"], expected, atol=PIXEL)
    for choice in ("pixel-dot", "random", "other-seed"):
        distance = np.abs(saved[choice] - originals).max(axis=(1, 2, 3))
        assert (distance > 0.05).all(), choice


@pytest.mark.parametrize("choice", REMOVALS[:2])
def test_a_removal_is_what_training_by_hand_on_the_rest_gives(
    finished, queries, tmp_path, choice
):
    """Without the top four of twelve, 8 of 12 steps; then sampled with its own seed."""
    (row, _), result = positions(queries), finished.json("counterfactual")
    squared = choice.endswith("-squared")
    scores = finished.scores(choice.removesuffix("-squared"), "generated").scores[row]
    ascending = np.argsort(scores**2 if squared else scores)
    kept = np.sort(ascending[:-COUNT])
    params = train_by_hand(finished, kept, tmp_path, steps=8)
    saved = files.read_npz(finished.workdir / FOLDER / "images.npz")
    image = make_again(finished, params, [row])
    np.testing.assert_allclose(saved[choice][:1], image, atol=PIXEL)
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), params, finished.params())
    after, before = measure(
        finished.network.apply,
        finished.schedule,
        stack,
        saved["original"][:1],
        saved["query_ids"][:1],
        CONFIG.ensemble,
    )[:, 0]
    increase = result["rows"][2 * REMOVALS.index(choice)]["loss_increase"]
    assert math.isclose(increase, after - before, rel_tol=1e-3)


def test_the_results(finished, queries):
    result = finished.json("counterfactual")
    json.loads(
        (finished.workdir / "counterfactual.json").read_text(),
        parse_constant=pytest.fail,
    )
    expected = {"count": COUNT, "queries": queries, "seed": 0, "steps": 8}
    assert result["settings"] == expected
    assert list(result["removed"]) == REMOVALS
    for name, of_query in result["removed"].items():
        assert list(of_query) == queries
        assert {len(set(ids)) for ids in of_query.values()} == {COUNT}
        for query, ids in of_query.items():
            (folder,) = (finished.workdir / FOLDER).glob(f"{name}-{query}-*")
            rows = np.flatnonzero(~np.isin(finished.splits.train.ids, ids))
            assert folder.name.endswith(short_digest(rows.astype("<i8").tobytes()))

    def name(row):
        return Choice(row["method"], row["transform"]).name

    rows = [(name(row), row["query"]) for row in result["rows"]]
    assert rows == [(choice, query) for choice in CHOICES for query in queries]
    summarized = [(name(row), row["metric"]) for row in result["summary"]]
    assert summarized == [(choice, metric) for choice in CHOICES for metric in METRICS]
    compared = [(name(row), row["metric"]) for row in result["differences"]]
    assert compared == [(c, metric) for c in REMOVALS[:3] for metric in METRICS]

    def values(choice, metric):
        return [row[metric] for row in result["rows"] if name(row) == choice]

    for row in result["summary"]:
        mean = np.mean(values(name(row), row["metric"]))
        assert math.isclose(row["mean"], mean, rel_tol=1e-6, abs_tol=1e-12)
    for row in result["differences"]:
        pair = (values(choice, row["metric"]) for choice in (name(row), RANDOM))
        median = np.median(np.subtract(*pair))
        assert math.isclose(row["median"], median, rel_tol=1e-6, abs_tol=1e-12)


def test_the_metrics_of_the_results_are_those_of_the_images(finished, queries):
    result = finished.json("counterfactual")
    saved = files.read_npz(finished.workdir / FOLDER / "images.npz")
    for row in result["rows"]:
        assert set(row) == {"method", "transform", "query", *METRICS}
        i, choice = queries.index(row["query"]), Choice(row["method"], row["transform"])
        a, b = saved["original"][i].ravel(), saved[choice.name][i].ravel()
        assert math.isclose(row["pixel_l2"], np.linalg.norm(a - b), abs_tol=1e-5)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert math.isclose(row["pixels_cosine"], cosine, abs_tol=1e-5)


def test_a_model_of_ones_own_has_the_results_of_the_run(finished, tmp_path):
    """The same removals, pictures and tables, from functions that know no run."""
    queries, folder = finished.queries["generated"], finished.workdir / FOLDER
    trained = []

    def train(rows, seed):
        trained.append(rows)
        rows_digest = short_digest(rows.astype("<i8").tobytes())
        start = "other-seed" if seed else "everything" if len(rows) == 12 else ""
        name = next(folder.glob(f"{start}*-{rows_digest}")).name
        steps = training.latest_step(folder / name)
        stack = training.load_members(init, [name], steps, folder)
        return jax.tree.map(lambda leaf: leaf[0], stack)

    x, ids = queries.images, queries.ids
    settings = {"timesteps": CONFIG.ensemble.timesteps, "draws": 1}
    network = finished.network.apply, finished.schedule
    losses = dtrak.QueryLosses(*network, x, ids=ids, **settings)
    cosine = finished.scores("pixel-cosine", "generated")
    squared = dataclasses.replace(cosine, scores=cosine.scores**2)
    dot = finished.scores("pixel-dot", "generated")
    kernels, features = finished.kernels("loss"), finished.features("generated", "loss")
    sets = [
        dtrak.removal_set(kernels, features[:, [i]], COUNT).rows for i in range(len(x))
    ]
    found = dtrak.counterfactual(
        {"pixel-dot": dot, "pixel-cosine-squared": squared},
        *(train, lambda params, rows: make_again(finished, params, rows), x),
        count=COUNT,
        sets={"trak": sets},
        queries=2,
        losses=losses,
    )
    saved = files.read_npz(folder / "images.npz")
    assert found.images.keys() == saved.keys()
    for name, pictures in saved.items():
        if name == "query_ids":
            assert found.images[name].tolist() == pictures.tolist()
        else:
            np.testing.assert_allclose(found.images[name], pictures, atol=PIXEL)
    expected = finished.json("counterfactual")
    assert found.removed == expected["removed"]
    for row, other in zip(found.rows, expected["rows"], strict=True):
        assert row["query"] == other["query"]
        for metric in ("pixel_l2", "pixels_cosine", "loss_increase"):
            assert row[metric] == pytest.approx(other[metric], abs=1e-5)
    assert len(found.summary) == len(expected["summary"]) - len(CHOICES)


def test_clip_adds_the_cosine_of_its_embeddings(finished, workdir, tmp_path, trained):
    write_clip(tmp_path)
    config = dataclasses.replace(CONFIG, clip=ClipConfig(folder=str(tmp_path)))
    result = evaluate(workdir, config)
    assert not trained
    saved = files.read_npz(workdir / FOLDER / "images.npz")
    del saved["query_ids"]
    vectors = {name: Clip.from_folder(tmp_path)(x) for name, x in saved.items()}
    vectors = {x: v / np.linalg.norm(v, axis=1)[:, None] for x, v in vectors.items()}
    cosines = [row.pop("clip_cosine") for row in result["rows"]]
    expected = [(vectors["original"] * vectors[name]).sum(axis=1) for name in CHOICES]
    np.testing.assert_allclose(cosines, np.concatenate(expected), rtol=1e-5)
    assert min(cosines) < 0.999
    assert result["rows"] == finished.json("counterfactual")["rows"]


def test_what_is_done_is_not_done_again(finished, workdir, trained, sampled):
    assert evaluate(workdir) == finished.json("counterfactual")
    assert not trained and not sampled


def test_other_losses_are_measured_again(finished, workdir, trained):
    settings = dataclasses.replace(CONFIG.ensemble, timesteps=(700,))
    again = evaluate(workdir, dataclasses.replace(CONFIG, ensemble=settings))
    assert not trained
    before = finished.json("counterfactual")
    for old, new in zip(before["rows"], again["rows"], strict=True):
        if old["method"] != "everything":
            assert abs(new["loss_increase"] - old["loss_increase"]) > 1e-4
        assert new == old | {"loss_increase": new["loss_increase"]}


def test_only_what_changed_is_done(workdir, queries, trained, sampled):
    """Another score of one query retrains its model alone, in a folder of its own."""
    path, (row, _) = workdir / "scores" / "pixel-dot-generated.npz", positions(queries)
    scores = Scores.load(path)
    scores.scores[row] *= -1
    scores.save(path)
    evaluate(workdir)
    ((name,),) = trained
    assert name.startswith(f"pixel-dot-{queries[0]}-")
    assert sampled == [[7000 + row]]
    assert len(folders(workdir, f"pixel-dot-{queries[0]}")) == 2


def test_fewer_queries_reuse_the_controls(workdir, queries, trained, sampled):
    """They only generate again what the images are now compared with."""
    result = evaluate(workdir, queries=1)
    (query,) = result["settings"]["queries"]
    assert query in queries
    assert not trained
    assert sampled == [[7000 + positions([query])[0]]] * 2


def test_a_run_that_was_stopped_continues(
    finished, workdir, trained, sampled, monkeypatch
):
    """Killed after the removals were trained, and again between two regenerations."""

    def stop_after(count, module, name, calls):
        function = getattr(module, name)

        def stopping(*arguments, **options):
            if len(calls) == count:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        patch.setattr(module, name, stopping)

    shutil.rmtree(workdir / FOLDER)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(4, ensemble, "train_group", trained)
        evaluate(workdir)
    assert [len(group) for group in trained] == [2, 2, 2, 2]
    trained.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, diffusion, "sample", sampled)
        evaluate(workdir)
    assert [[name.rpartition("-")[0] for name in g] for g in trained] == [CONTROLS]
    trained.clear()
    sampled.clear()
    assert evaluate(workdir) == finished.json("counterfactual")
    assert not trained
    assert len(sampled) == 4 * 2 + 2 - 2


def test_an_image_that_is_not_finite(workdir, queries, monkeypatch):
    (name,) = folders(workdir, f"random-{queries[0]}")
    (workdir / FOLDER / name / "images.npz").unlink()

    def explode(apply, params, sampler, seeds, shape, **options):
        return np.full((len(seeds), *shape), np.nan)

    monkeypatch.setattr(diffusion, "sample", explode)
    with pytest.raises(FloatingPointError, match=f"that {name} generated"):
        evaluate(workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"counterfactual": CounterfactualConfig(count=12)},
            "count is 12; it must be 1 to 11, as there are 12",
        ),
        (
            {"queries": QueriesConfig(folder="pictures")},
            "leave out --queries",
        ),
        (
            {
                "sample": SampleConfig(count=0),
                "data": DataConfig(source="digits", train=12, validation=2),
            },
            "sample.count must be 1 or more",
        ),
    ],
)
def test_refused_settings(tmp_path, changes, message):
    run = Run.at(dataclasses.replace(CONFIG, **changes), tmp_path)
    with pytest.raises(ValueError, match=message):
        counterfactual(run)
    assert not (tmp_path / FOLDER).exists()


def test_a_fifth_is_removed_unless_a_number_is_named():
    assert CounterfactualConfig().removed_of(5000) == 1000
    assert CounterfactualConfig().removed_of(2) == 1
    assert CounterfactualConfig(count=7).removed_of(5000) == 7


# The functions that need no run.

IDS = np.array([f"generated-{i:05d}" for i in range(4)])
TRAIN_IDS = np.array([f"train-{i}" for i in range(12)])


def make_scores(method="dtrak"):
    values = np.random.default_rng(1).normal(size=(4, 12)).astype(np.float32)
    return Scores(values, TRAIN_IDS, IDS, method)


def test_removals_take_exactly_the_top_or_the_largest_squares():
    scores, asked = make_scores(), [IDS[2], IDS[0]]
    choices = Choice("dtrak"), Choice("dtrak", "squared")
    every = (*choices, Choice(RANDOM))
    rows_of = removed_rows(dict.fromkeys(choices, scores), asked, TRAIN_IDS, COUNT, 0)
    assert list(rows_of) == [(choice, query) for choice in every for query in asked]
    for (choice, query), removed in rows_of.items():
        assert len(set(removed.tolist())) == COUNT
        if choice.method != RANDOM:
            values = scores.scores[IDS.tolist().index(query)]
            values = values**2 if choice.transform == "squared" else values
            assert removed.tolist() == np.argsort(-values)[:COUNT].tolist()


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [3]), (2, [4, 5]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 4, 5])],
)
def test_copies_are_removed_together(count, expected):
    """A picture whose copies do not fit is passed over, as one of them alone changes
    nothing; only where nothing else is left it is cut."""
    rows = np.array([[3.0, 3, 3, 8, 5, 4]])
    ids = TRAIN_IDS[:6]
    copies = ids[[0, 0, 0, 3, 4, 4]]
    scores = Scores(rows, ids, IDS[:1], "dtrak", copies=copies)
    for squared in (False, True):
        assert sorted(removals.strongest(scores, 0, count, squared)) == expected
    gone = removed_rows({Choice("dtrak"): scores}, IDS[:1], ids, count, 0)
    assert sorted(gone[Choice("dtrak"), IDS[0]]) == expected
    pairs = dataclasses.replace(scores, copies=ids[[0, 0, 0, 0, 4, 4]])
    assert sorted(removals.strongest(pairs, 0, 3)) == [0, 4, 5]


def test_a_set_takes_copies_together(finished):
    """All images are pairs of copies here, so that a set is of pairs."""
    run = Run.at(CONFIG, finished.workdir)
    ids = run.splits.train.ids
    run.kept[("copies",)] = Found(ids[np.arange(len(ids)) // 2 * 2], "")
    pairs = chosen_set(run, "trak", 0) // 2
    assert len(pairs) == COUNT and len(set(pairs.tolist())) == (COUNT + 1) // 2
    np.testing.assert_array_equal(pairs[: COUNT // 2 * 2 : 2], pairs[1::2])


def test_a_set_has_the_objective_of_its_method(finished, monkeypatch):
    monkeypatch.setitem(
        METHODS, "cover", METHODS["coverage"]._replace(measurement="loss")
    )
    run, sets = Run.at(CONFIG, finished.workdir), []
    kernels, query = run.kernels("loss"), run.features("generated", "loss")
    for method, objective in (("trak", "influence"), ("cover", "coverage")):
        damping = 0.1 if method == "trak" else dtrak.effective(0.05)
        how = {"objective": objective, "damping": damping}
        chosen = dtrak.removal_set(kernels, query[..., [0], :], COUNT, **how)
        sets.append(chosen_set(run, method, 0).tolist())
        assert sets[-1] == chosen.rows.tolist()
    assert sets[0] != sets[1]


def test_random_removals_depend_on_seed_and_query_alone():
    def rows(queries, seed, scores):
        removed = removed_rows(scores, queries, TRAIN_IDS, COUNT, seed)
        return {query: removed[Choice(RANDOM), query].tolist() for query in queries}

    whole = rows(IDS.tolist(), 0, {Choice("dtrak"): make_scores()})
    assert rows(IDS[::-1].tolist(), 0, {}) == whole
    assert rows([IDS[2]], 0, {}) == {IDS[2]: whole[IDS[2]]}
    assert len({tuple(rows) for rows in whole.values()}) == len(IDS)
    assert rows(IDS.tolist(), 1, {}) != whole


def test_the_plan_keeps_the_epochs_and_names_the_rows():
    choice = Choice("dtrak", "squared")
    removed = {(choice, "a"): [11, 9, 10], (Choice(RANDOM), "a"): np.arange(1, 12)}
    config = TrainConfig(steps=10, seed=5)
    planned = plan(config, removed, ["a"], 12)
    assert planned[0].member.rows.tolist() == list(range(9))
    rows = [
        (m.choice.name, len(m.member.rows), m.member.seed, m.steps) for m in planned
    ]
    assert rows == [
        ("dtrak-squared", 9, 5, 8),
        ("random", 1, 5, 1),
        ("everything", 12, 5, 10),
        ("other-seed", 12, 6, 10),
    ]
    name = planned[0].member.name
    assert name.startswith("dtrak-squared-a-")
    assert len(name) == len("dtrak-squared-a-") + 8
    other = plan(config, {(choice, "a"): [0, 10, 11]}, ["a"], 12)
    assert other[0].member.name != name
    assert other[1].member.name == planned[2].member.name


def test_distances_by_hand(images):
    lengths = {"pixel": flattened}
    metrics = distances(images, images, lengths, {"pixels": flattened})
    np.testing.assert_array_equal(metrics["pixel_l2"], 0)
    np.testing.assert_allclose(metrics["pixels_cosine"], 1)
    a = np.array([3.0, 4.0, 0.0, 0.0]).reshape(2, 1, 1, 2)
    b = np.array([4.0, 3.0, 1.0, 0.0]).reshape(2, 1, 1, 2)
    cosines = {"first": lambda x: x[:, 0, 0, :1], "pixels": flattened}
    metrics = distances(a, b, lengths, cosines)
    np.testing.assert_allclose(metrics["pixel_l2"], [2**0.5, 1])
    np.testing.assert_allclose(metrics["first_cosine"], [1, 0])
    np.testing.assert_allclose(metrics["pixels_cosine"], [24 / 25, 0])


def test_the_summary_agrees_with_scipy():
    """Percentile intervals from other resamples: equal but for their own noise."""
    values = np.random.default_rng(0).exponential(size=60)
    summary = summarize(values)
    for name, statistic in (("median", np.median), ("mean", np.mean)):
        result = scipy.stats.bootstrap(
            (values,), statistic, n_resamples=20000, method="percentile", rng=1
        )
        low, high = result.confidence_interval
        assert math.isclose(summary[name], statistic(values))
        assert abs(summary[f"{name}_low"] - low) < 0.1 * (high - low)
        assert abs(summary[f"{name}_high"] - high) < 0.1 * (high - low)
    constant = summarize(np.full(5, 2.0))
    assert set(constant.values()) == {2.0}
    assert summarize(values) == summary


def test_the_bottleneck_is_the_mid_blocks_output(images, tiny, monkeypatch):
    """Less its mean; as flax captures it among everything, batch by batch as at once."""
    monkeypatch.setattr(models, "bottleneck_fn", bottleneck_fn)
    model, (_, params) = models.build(TINY), tiny

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
    schedule = diffusion.linear_schedule()
    embed = bottleneck(model, params, schedule, images, batch_size=5)
    features = embed(images[:7])
    assert features.shape == (7, TINY.block_out_channels[-1])
    expected = np.asarray(h).reshape(12, -1, 8).mean(axis=1)
    expected -= expected.mean(axis=0)
    np.testing.assert_allclose(features, expected[:7], atol=1e-5)
