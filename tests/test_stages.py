"""All stages of a run, as a person types them, on a network that compiles fast."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import (
    digits_command,
    draw_nothing,
    open_run,
    use_simple_network,
    use_two_devices,
)

import dtrak_jax as dtrak
from dtrak_jax import attribution, cli, data, diffusion, features, files, training
from dtrak_jax.attribution import Damping, Scores
from dtrak_jax.evaluation import counterfactual, datamodeling, retrain
from dtrak_jax.methods import METHODS

NAMES = [
    name
    for name, row in METHODS.items()
    if not row.embeds and not name.startswith("kernel-")
]
FLAGS = {
    "data.train": "60",
    "data.validation": "5",
    "train.steps": "20",
    "train.checkpoints": "0.5 1.0",
    "train.batch-size": "16",
    "train.eps-root": "1e-8",
    "sample.count": "3",
    "sample.steps": "5",
    "features.timesteps": "100 300",
    "features.draws": "1",
    "features.dim": "8",
    "features.batch-size": "4",
    "ensemble.subsets": "20",
    "ensemble.seeds": "2",
    "ensemble.models": "1",
    "ensemble.timesteps": "4",
    "ensemble.draws": "1",
    "attribution.methods": " ".join(NAMES),
    "counterfactual.queries": "1",
    "counterfactual.count": "20",
    "counterfactual.methods": "dtrak pixel-dot",
    "counterfactual.squared": "dtrak",
    "ablation.studies": "checkpoint",
    "ablation.timesteps": "100 300",
}


def command(stage, workdir, **changes):
    """A command line of the smallest digits job."""
    return digits_command(stage, workdir, FLAGS, changes)


def type_in(stage, workdir, **changes):
    """Runs such a command in this process."""
    cli.main(command(stage, workdir, **changes))


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Two of the devices: small work needs not be cut in eight."""
    with pytest.MonkeyPatch.context() as patch:
        use_two_devices(patch)
        use_simple_network(patch)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory in which every stage has been run, by four commands."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    for stage in ("lds", "ablate", "counterfactual", "report"):
        type_in(stage, workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path, monkeypatch):
    """A copy that a test may change, in which figures are not drawn again."""
    draw_nothing(monkeypatch)
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def counted(monkeypatch):
    """How often the parts of the work were done that no stage may do twice."""
    counts = {}

    def count(module, name):
        function = getattr(module, name)

        def counting(*arguments, **options):
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(training, "train")
    count(diffusion, "sample")
    count(counterfactual, "measure")
    count(retrain, "measure")
    count(data.sources, "preprocess")
    count(attribution.kernel, "factorize")
    count(features.gradients, "gradient_function")
    return counts


def test_outputs_hold_what_scores_must_predict(finished):
    saved = files.read_npz(finished / "ensemble" / "outputs.npz")
    assert saved["outputs"].shape == (20, 2, 8)
    assert np.isfinite(saved["outputs"]).all()
    assert (saved["masks"].sum(axis=1) == 30).all()
    assert len(np.unique(saved["masks"], axis=0)) == 20
    assert saved["query_set"].tolist() == ["validation"] * 5 + ["generated"] * 3
    # Two seeds make two models.
    assert np.abs(np.diff(saved["outputs"], axis=1)).min() > 0


def test_every_method_has_scores_and_an_lds(finished):
    result = files.read_json(finished / "lds.json")
    for queries, count in (("validation", 5), ("generated", 3)):
        methods = [name for name in NAMES if METHODS[name].applies_to(queries)]
        for method in methods:
            scores = Scores.load(finished / "scores" / f"{method}-{queries}.npz")
            assert scores.method == method
            assert scores.scores.shape == (count, 60)
            assert np.isfinite(scores.scores).all() and scores.scores.std() > 0
        rows = result["queries"][queries]["rows"]
        assert {row["method"] for row in rows} == {*methods, "constant"}
        for row in rows:
            assert -1 <= row["low"] <= row["lds"] <= row["high"] <= 1
        rules = {row["damping_rule"] for row in rows if row["method"] == "dtrak"}
        assert rules == {"label-free", "cross-fitted", "oracle"}
        # Its lambda is its own, also where it predicts subset by subset.
        of_coverage = [row for row in rows if row["method"] == "coverage"]
        chosen = {(row["damping_rule"], row["damping"]) for row in of_coverage}
        assert len(of_coverage) == 2 and chosen == {("effective", 0.05)}
        run = open_run(command("lds", finished))
        both = run.kernels("square"), run.features(queries, "square")
        found = dtrak.predict(*both, run.truth()[queries].masks)
        expected = datamodeling.lds(found.values, run.truth()[queries])
        assert of_coverage[1]["lds"] == expected
        (constant,) = (row for row in rows if row["method"] == "constant")
        assert constant["lds"] == 0


def test_a_few_subsets_have_an_lds_but_no_halves(workdir):
    """Below 16 nothing is chosen on one half; that is said, and not refused."""
    methods = {"attribution__methods": "dtrak datamodels"}
    with pytest.warns(
        UserWarning, match="10 subsets are too few to choose on one half"
    ):
        type_in("lds", workdir, ensemble__subsets="10", **methods)
    rows = files.read_json(workdir / "lds.json")["queries"]["validation"]["rows"]
    rules = [(row["method"], row["damping_rule"]) for row in rows]
    assert ("dtrak", "oracle") in rules and ("dtrak", "label-free") in rules
    assert not {"cross-fitted", "halves"} & {rule for _, rule in rules}


def test_a_model_of_ones_own_has_the_lds_of_the_run(finished):
    """The same subsets, losses, LDS and ceiling, from functions that know no run."""
    run = open_run(command("lds", finished))
    images, settings, space = run.splits.train, run.config.ensemble, run.space
    saved = files.read_npz(finished / "ensemble" / "outputs.npz")

    def train(rows, seed):
        mask = np.isin(np.arange(60), rows)
        (subset,) = np.flatnonzero((saved["masks"] == mask).all(axis=1))
        name, folder = f"{subset:04d}-{seed}", finished / "ensemble"
        stack = training.load_members(run.network.init, [name], 10, folder)
        return jax.tree.map(lambda leaf: leaf[0], stack)

    losses = dtrak.QueryLosses(
        *(run.network.apply, run.schedule, space.x("validation")),
        ids=run.queries["validation"].ids,
        timesteps=settings.timesteps,
        draws=settings.draws,
    )
    truth = dtrak.retrain(
        *(train, 60, losses),
        subsets=settings.subsets,
        seeds=settings.seeds,
        ids=images.ids,
        labels=images.labels,
    )
    chosen = saved["query_set"] == "validation"
    np.testing.assert_allclose(truth.outputs, saved["outputs"][..., chosen], rtol=1e-5)
    # Ranks of nearly equal losses may change by rounding, so these are the run's own.
    found = dtrak.lds(run.scores("dtrak", "validation"), run.truth()["validation"])
    result = files.read_json(finished / "lds.json")["queries"]["validation"]
    row = next(row for row in result["rows"] if row["method"] == "dtrak")
    expected = [row["lds"], row["low"], row["high"], result["ceiling"]]
    assert [found.value, found.low, found.high, found.ceiling._asdict()] == expected


def test_a_finished_stage_computes_nothing(workdir, counted):
    before = {p: p.read_bytes() for p in workdir.glob("*.json")}
    for stage in ("attribute", "retrain", "ablate", "featurize"):
        type_in(stage, workdir)
    type_in("counterfactual", workdir)
    # The bottleneck's mean is that of all training images.
    assert counted.pop("preprocess") == 60
    assert not counted
    assert {p: p.read_bytes() for p in workdir.glob("*.json")} == before


def test_attribute_and_lds_need_no_pixels(workdir, counted, monkeypatch):
    """Nor does a file of scores need to be read twice."""
    for stage in ("attribute", "lds"):
        type_in(stage, workdir)
    assert not counted
    load, read, run = Scores.load, [], open_run(command("lds", workdir))
    monkeypatch.setattr(Scores, "load", lambda path: read.append(path) or load(path))
    assert run.scores("dtrak", "validation").method == "dtrak"
    assert len(read) == 1


def test_each_kernel_is_decomposed_once(workdir, counted):
    """For four methods of one measurement, for lds and for another damping."""
    shutil.rmtree(workdir / "kernels")
    shutil.rmtree(workdir / "scores")
    names = "trak relative-influence renormalised-influence journey-trak"
    for damping in ("0.1", "0.5"):
        changes = {"attribution__methods": names, "attribution__damping": damping}
        for stage in ("attribute", "lds"):
            type_in(stage, workdir, counterfactual__squared="trak", **changes)
    assert counted == {"factorize": 2}


def test_another_damping_makes_other_scores(workdir):
    """In the same run directory; the file says which one made them. Coverage and curvature
    have their own."""

    def load():
        names = "trak", "coverage", "ekfac"
        folder = workdir / "scores"
        return [Scores.load(folder / f"{name}-generated.npz") for name in names]

    first, share = load(), dtrak.effective(0.05)
    changes = {"attribution__damping": "0.5"}
    type_in("attribute", workdir, **changes)
    second = load()
    assert [s.damping for s in first] == [Damping(0.1), share, Damping(0.001)]
    assert [s.damping for s in second] == [Damping(0.5), share, Damping(0.001)]
    assert not np.allclose(first[0].scores, second[0].scores)
    for share, expected in (("0.2", dtrak.effective(0.2)), ("0", Damping(0.5))):
        changes["attribution__coverage-share"] = share
        type_in("attribute", workdir, **changes)
        third = load()
        assert [s.damping for s in third] == [Damping(0.5), expected, Damping(0.001)]
        assert not np.allclose(first[1].scores, third[1].scores)


def test_a_command_says_and_makes_what_it_needs_first(tmp_path, capsys):
    changes = {"attribution__methods": "datamodels", "counterfactual__squared": "trak"}
    changes["counterfactual__methods"] = "trak"
    type_in("attribute", tmp_path / "run", **changes)
    _, error = capsys.readouterr()
    lines = [line.split(":")[0].strip() for line in error.splitlines() if ":" in line]
    assert lines[:4] == [
        "attribute does",
        "train",
        "sample",
        "retrain",
    ]
    assert "20 steps of 16 images" in error and "20 x 2 models of 10 steps" in error
    assert (tmp_path / "run" / "scores" / "datamodels-validation.npz").exists()


def test_conjugate_gradients_make_the_same_scores_and_no_spectra(workdir):
    """To 1e-3 of a query's scores, here where Grams of eigh are float32."""
    methods = ("dtrak", "journey-trak", "trak-ensemble")
    changes = {"attribution__methods": " ".join(methods), "attribution__solver": "cg"}
    changes["counterfactual__squared"] = "dtrak"

    def load(method):
        return Scores.load(workdir / "scores" / f"{method}-generated.npz")

    decomposed = {method: load(method).scores for method in methods}
    for stage in ("lds", "report"):
        type_in(stage, workdir, **changes)
    for method, expected in decomposed.items():
        scores = load(method)
        assert scores.eigenvalues is None
        off = np.linalg.norm(scores.scores - expected, axis=1)
        assert (off < 1e-3 * np.linalg.norm(expected, axis=1)).all()
    generated = files.read_json(workdir / "lds.json")["queries"]["generated"]
    assert not generated["curves"]
    rules = {r["damping_rule"] for r in generated["rows"] if r["method"] == "dtrak"}
    assert rules == {"label-free"}
    page = (workdir / "report.html").read_text()
    assert 'id="damping"' not in page and 'id="features"' in page


def test_the_ablation_of_the_default_is_the_default(finished):
    """The same features by two ways."""
    rows = files.read_json(finished / "ablations.json")["rows"]
    assert {row["checkpoint"] for row in rows} == {10, 20}
    result = files.read_json(finished / "lds.json")["queries"]
    for queries in ("validation", "generated"):
        for rule in ("label-free", "cross-fitted", "oracle"):
            (ablated,) = (
                row["lds"]
                for row in rows
                if (row["checkpoint"], row["measurement"]) == (20, "square")
                and (row["queries"], row["damping_rule"]) == (queries, rule)
            )
            (expected,) = (
                row["lds"]
                for row in result[queries]["rows"]
                if (row["method"], row["damping_rule"]) == ("dtrak", rule)
                and row["transform"] == "linear"
            )
            assert ablated == pytest.approx(expected, abs=1e-6)


def test_results_say_that_models_are_not_remade(workdir, recwarn):
    """The page, which looks at the same file, does too."""
    path, words = workdir / "counterfactual.json", "does not make this model again."
    result = files.read_json(path)
    few = {"attribution__methods": "dtrak"}
    for moved, stages in ((0.0, "lds report"), (9.0, "lds ablate report")):
        for row in result["summary"]:
            row["median"] = moved if row["method"] == "everything" else 1.0
        files.write_json(path, result)
        for stage in stages.split():
            type_in(stage, workdir, **few)
            noted = any(words in str(warning.message) for warning in recwarn)
            recwarn.clear()
            assert noted == bool(moved and stage != "report")
        page = (workdir / "report.html").read_text()
        assert ("Neither removal nor an LDS of models" in page) == bool(moved)


def test_an_ablation_makes_the_rows_that_it_has_gained(workdir):
    """Files of before are kept where nothing is missing."""
    studies = {"ablation__studies": "checkpoint coverage"}
    type_in("ablate", workdir, **studies)
    before, stamps = files.read_json(workdir / "ablations.json"), {}
    for path in (workdir / "ablations" / "rows").iterdir():
        saved = files.read_json(path)
        rows = [row for row in saved["rows"] if row["damping_rule"] != "effective"]
        files.write_json(path, {"truth": saved["truth"], "rows": rows})
        stamps[path] = path.stat().st_mtime_ns, len(rows) == len(saved["rows"])
    type_in("ablate", workdir, **studies)
    assert files.read_json(workdir / "ablations.json") == before
    assert {complete for _, complete in stamps.values()} == {True, False}
    for path, (stamp, complete) in stamps.items():
        assert (path.stat().st_mtime_ns == stamp) == complete


def test_weighted_layers_are_scores_of_weighted_queries(workdir):
    """As from Python; scores, report and export have the weights."""
    names = {"attribution__methods": "dtrak dtrak-layers"}
    names["report__methods"] = "dtrak-layers"
    for stage in ("report", "export"):
        type_in(stage, workdir, **names)
    run = open_run(command("lds", workdir))
    train, by_layer = (
        run.kernels("square"),
        run.features_by_layer("generated", "square"),
    )
    whole = np.asarray(run.features("generated", "square"))
    parts = sum(map(np.asarray, by_layer.values()))
    np.testing.assert_allclose(parts, whole, atol=1e-6 * np.abs(whole).max())
    fitted = dtrak.layer_weights(train, by_layer)
    expected = dtrak.attribute(train, fitted.query, method="dtrak").scores
    scores = Scores.load(workdir / "scores" / "dtrak-layers-generated.npz")
    np.testing.assert_allclose(scores.scores, expected, rtol=1e-4, atol=1e-6)
    assert list(scores.layers) == list(by_layer) == ["b", "w"]
    weights, shares = zip(*scores.layers.values(), strict=True)
    np.testing.assert_allclose(weights, fitted.weights, rtol=1e-4)
    np.testing.assert_allclose(shares, fitted.shares, rtol=1e-4)
    page = (workdir / "report.html").read_text()
    assert 'id="layers"' in page and f"<td>{weights[1]:.2f}</td>" in page
    export = workdir / "export"
    layers = files.read_json(export / "dtrak-layers-generated.json")["layers"]
    assert [entry["group"] for entry in layers] == ["b", "w"]
    assert [entry["weight"] for entry in layers] == [*map(float, weights)]
    assert files.read_json(export / "dtrak-generated.json")["layers"] is None


def test_other_layers_make_other_scores(workdir):
    """Beside the features by layer that are there, which stay."""
    names = {"attribution__methods": "dtrak-layers"}
    before = Scores.load(workdir / "scores" / "dtrak-layers-generated.npz")
    with pytest.raises(SystemExit):
        type_in("attribute", workdir, features__layers="b=^b", **names)
    type_in("attribute", workdir, features__layers="all=.", **names)
    after = Scores.load(workdir / "scores" / "dtrak-layers-generated.npz")
    assert list(after.layers) == ["all"]
    dtrak_scores = Scores.load(workdir / "scores" / "dtrak-generated.npz").scores
    np.testing.assert_allclose(after.scores, dtrak_scores, rtol=1e-4, atol=1e-6)
    assert before.made_from != after.made_from
    folders = (workdir / "features").glob("*/layers/generated-*")
    assert len(list(folders)) == 2


def test_a_report_shows_all_of_it(finished):
    page = (finished / "report.html").read_text()
    for words in ("ceiling", "cross-fitted", "oracle", "other seed"):
        assert words in page, words


def test_an_export_has_all_that_the_scores_have(workdir, capsys):
    """In JSON and in CSV, number for number; and the command line ranks the groups."""
    methods = {
        "attribution__methods": "dtrak trak-ensemble",
        "features__draws": "2",
    }
    type_in("attribute", workdir, **methods)
    assert "  dtrak, generated, label: " in capsys.readouterr().out
    cli.main([*command("export", workdir, top="0", **methods), "--export.shares"])
    assert len(list((workdir / "export").iterdir())) == 12
    scores = open_run(command("export", workdir, **methods)).scores(
        "trak-ensemble", "generated"
    )
    place = workdir / "export" / "trak-ensemble-generated"
    whole = files.read_json(place.with_suffix(".json"))
    assert (whole["sign"], whole["schema"]) == (attribution.scores.SIGN, 2)
    assert whole["damping"] == Damping(0.1)._asdict()
    assert whole["features"]["timesteps"] == [100, 300]
    with place.with_suffix(".csv").open() as table:
        header, *rows = csv.reader(table)
    assert header[:4] == ["query", "rank", "image", "score [unit of the query]"]
    assert not whole["copies"]["looked_for"]
    assert "an effective dimension of" in whole["copies"]["why"]
    entries = [image for query in whole["queries"] for image in query["images"]]
    assert [json.loads(row[-1]) for row in rows] == [e["copies"] for e in entries]
    freedom = whole["groups"]["label"]["degrees_of_freedom"]
    assert freedom == scores.group("label").freedom > 0
    position = {name: i for i, name in enumerate(scores.train_ids)}
    for row, query in enumerate(whole["queries"]):
        images = query["images"]
        index = [position[image["image"]] for image in images]
        assert sorted(index) == list(range(60))
        for name in ("scores", "errors", "spread"):
            key = name.removesuffix("s")
            exact = np.array([image[key] for image in images], np.float32)
            np.testing.assert_array_equal(exact, getattr(scores, name)[row, index])
        cells = rows[60 * row : 60 * row + 60]
        assert [c[:4] for c in cells] == [
            [query["query"], str(i + 1), image["image"], str(image["score"])]
            for i, image in enumerate(images)
        ]
    with open(f"{place}-groups.csv") as table:
        header, *rows = csv.reader(table)
    shares = [float(row[-1]) for row in rows if row[1] == whole["queries"][0]["query"]]
    assert header[-1].startswith("share") and np.isclose(sum(shares), 1)
    groups = scores.group("label")
    assert len(groups.names) == len(whole["groups"]["label"]["overall"]) > 2
    for ranking, sums in zip(whole["groups"]["label"]["queries"], groups.scores):
        by_name = {group["group"]: group["score"] for group in ranking["groups"]}
        assert [by_name[name] for name in groups.names] == sums.tolist()
    type_in("export", workdir, format="json", top="2", **methods)
    whole = files.read_json(place.with_suffix(".json"))
    ranks = [image["rank"] for image in whole["queries"][0]["images"]]
    assert ranks == [1, 2, 59, 60]
    # Of an earlier export nothing is left, that other scores may have made.
    kinds = {path.suffix for path in (workdir / "export").iterdir()}
    assert kinds == {".json"}


@pytest.mark.parametrize(
    ("column", "queries", "words"),
    [
        ("query_ids", "validation", "queries"),
        ("query_digests", "generated", "pictures of queries"),
    ],
)
def test_an_ensemble_of_other_queries_is_measured_again(
    workdir, column, queries, words
):
    """Other ids, or the same ids with other pixels: retraining itself is kept."""
    path = workdir / "ensemble" / "outputs.npz"
    saved = files.read_npz(path)
    chosen = saved["query_set"] == queries
    changed = saved[column].copy()
    changed[chosen] = changed[chosen][::-1]
    files.write_npz(path, **saved | {column: changed})
    run = open_run(command("lds", workdir))
    with pytest.raises(ValueError, match=f"of other {words} than this run"):
        run.truth()
    type_in("lds", workdir)
    for name, array in files.read_npz(path).items():
        np.testing.assert_array_equal(array, saved[name])


def test_changed_data_are_refused(workdir):
    """Another order, other pixels; each names what differs."""
    path = workdir / "splits.npz"
    saved = files.read_npz(path)
    files.write_npz(path, **saved | {"train_ids": np.roll(saved["train_ids"], 1)})
    message = "the train images have other ids .* order has changed .every label has"
    with pytest.raises(ValueError, match=message):
        open_run(command("report", workdir)).splits  # noqa: B018
    digests = saved["train_digests"].copy()
    digests[7] = "0" * 16
    files.write_npz(path, **saved | {"train_digests": digests})
    splits = open_run(command("report", workdir)).splits
    with pytest.raises(ValueError, match=f"1 of 60 .*{saved['train_ids'][7]}"):
        splits.train.images  # noqa: B018


def test_a_corrected_label_is_taken_and_nothing_is_made_again(workdir, counted, capsys):
    """It regroups the scores; the subsets that models were trained on stay."""
    path, place = workdir / "splits.npz", workdir / "scores" / "dtrak-generated.npz"
    saved, made = files.read_npz(path), Scores.load(place)
    assert made.copies is not None
    before = saved["train_labels"].copy()
    before[7] = (before[7] + 1) % 10
    validation = np.roll(saved["validation_labels"], 1)
    labels = {"train_labels": before, "validation_labels": validation}
    files.write_npz(path, **saved | labels)
    column = saved["label_names"][before]
    old = dataclasses.replace(made, columns={"label": column}, copies=None)
    old.save(place)
    with pytest.warns(UserWarning) as warned:
        type_in("attribute", workdir)
    changed = f"{saved['label_names'][before[7]]} -> {made.columns['label'][7]}"
    (said,) = (str(w.message) for w in warned if "than before" in str(w.message))
    example = f"(label of {made.train_ids[7]}: {changed})"
    assert f"1 of 60 training images have another label than before {example}" in said
    assert "of 5 validation images have another label" in said
    assert (
        "nothing is trained again; until written anew, as before: report.html" in said
    )
    again = Scores.load(place)
    assert again.made_from == made.made_from
    for name in ("scores", "copies"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
    np.testing.assert_array_equal(again.columns["label"], made.columns["label"])
    assert not counted.keys() - {"preprocess"}
    run = open_run(command("report", workdir))
    np.testing.assert_array_equal(run.splits.train.strata, before)
    assert run.json("lds") is not None
    # Other settings of the data keep them, and say nothing a second time.
    splits = open_run(command("report", workdir, data__validation="4")).splits
    np.testing.assert_array_equal(splits.train.strata, before)


def test_samples_of_another_model_are_made_again(workdir):
    path = workdir / "samples" / "samples.npz"
    saved = files.read_npz(path)
    files.write_npz(path, **saved | {"model": np.array("another"), "ids": saved["ids"]})
    type_in("sample", workdir)
    assert str(files.read_npz(path)["model"]) == str(saved["model"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble__subsets": "7"}, "at least 8"),
        ({"ensemble__models": "0"}, "ensemble.models is 0"),
        ({"counterfactual__count": "60"}, "it must be 1 to 59"),
        ({"ablation__studies": "moon"}, "moon"),
        ({"counterfactual__methods": "random"}, "random"),
    ],
)
def test_wrong_settings_are_refused(workdir, capsys, changes, message):
    stage = "counterfactual" if "counterfactual__count" in changes else "lds"
    with pytest.raises(SystemExit):
        type_in(stage, workdir, **changes)
    assert message in capsys.readouterr().err


def test_json_is_json(finished):
    """No NaN, which other readers refuse."""
    for name in ("lds", "ablations", "counterfactual"):
        text = (finished / f"{name}.json").read_text()
        json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
