"""Retraining, LDS, ablations and counterfactuals, as a person types them."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import digits_command

from dtrak_jax import cli, config, files, scoring
from dtrak_jax.attribution import Scores
from dtrak_jax.evaluation import ensemble, stages

METHODS = [m for m in config.METHODS if not m.startswith("kernel-")]
FLAGS = {
    "data.train": "60",
    "data.validation": "5",
    "model.block-out-channels": "4 8",
    "model.norm-num-groups": "2",
    "train.steps": "20",
    "train.checkpoints": "0.5 1.0",
    "train.batch-size": "16",
    "sample.count": "3",
    "sample.steps": "5",
    "features.timesteps": "100 300",
    "features.dim": "64",
    "features.batch-size": "4",
    "ensemble.subsets": "20",
    "ensemble.seeds": "2",
    "ensemble.models": "1",
    "ensemble.timesteps": "4",
    "ensemble.draws": "1",
    "attribution.methods": " ".join(METHODS),
    "counterfactual.queries": "1",
    "counterfactual.count": "20",
    "counterfactual.methods": "dtrak dtrak-squared",
    "ablation.studies": "checkpoint",
    "ablation.timesteps": "100 300",
}


def type_in(stage, workdir, **changes):
    """Runs a command of the smallest digits job in this process."""
    cli.main(digits_command(stage, workdir, FLAGS, changes))


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Two of the devices: what is small needs not be cut in eight."""
    two = jax.local_devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: two)
        patch.setattr(jax, "devices", lambda: two)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory in which every stage has been run."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    for stage in ("train", "sample", "retrain", "featurize", "attribute"):
        type_in(stage, workdir)
    for stage in ("lds", "ablate", "counterfactual", "report"):
        type_in(stage, workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


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
    assert scoring.SCORERS.keys() == config.METHODS.keys()
    result = files.read_json(finished / "lds.json")
    for queries, count in (("validation", 5), ("generated", 3)):
        methods = [m for m in METHODS if scoring.applies(m, queries)]
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
        (constant,) = (row for row in rows if row["method"] == "constant")
        assert constant["lds"] == 0


def test_conjugate_gradients_make_the_same_scores_and_no_spectra(workdir):
    """To 1e-3 of a query's scores, here where Grams of eigh are float32."""
    methods = ("dtrak", "journey-trak", "trak-ensemble")
    changes = {"attribution__methods": " ".join(methods), "attribution__solver": "cg"}

    def load(method):
        return Scores.load(workdir / "scores" / f"{method}-generated.npz")

    decomposed = {method: load(method).scores for method in methods}
    for stage in ("attribute", "lds", "report"):
        type_in(stage, workdir, **changes)
    for method, theirs in decomposed.items():
        ours = load(method)
        assert ours.eigenvalues is None
        off = np.linalg.norm(ours.scores - theirs, axis=1)
        assert (0 < off).all() and (off < 1e-3 * np.linalg.norm(theirs, axis=1)).all()
    one = files.read_json(workdir / "lds.json")["queries"]["generated"]
    assert not one["curves"]
    assert {r["damping_rule"] for r in one["rows"] if r["method"] == "dtrak"} == {
        "label-free"
    }
    page = (workdir / "report.html").read_text()
    assert 'id="damping"' not in page and 'id="features"' in page


def test_the_ablation_of_the_default_is_the_default(finished):
    """The same features by two ways."""
    rows = files.read_json(finished / "ablations.json")["rows"]
    assert {row["checkpoint"] for row in rows} == {10, 20}
    result = files.read_json(finished / "lds.json")["queries"]
    for queries in ("validation", "generated"):
        for rule in ("label-free", "cross-fitted", "oracle"):
            (found,) = (
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
            assert found == pytest.approx(expected, abs=1e-6)


def test_running_again_computes_nothing(workdir, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("this was computed already")

    monkeypatch.setattr(ensemble, "measure", refuse)
    monkeypatch.setattr(stages, "featurize", refuse)
    before = (workdir / "ablations.json").read_bytes()
    for stage in ("retrain", "ablate", "counterfactual"):
        type_in(stage, workdir)
    assert (workdir / "ablations.json").read_bytes() == before


def test_a_report_shows_all_of_it(finished):
    page = (finished / "report.html").read_text()
    for words in ("ceiling", "cross-fitted", "oracle", "other seed"):
        assert words in page, words


def test_an_ensemble_that_lacks_members_names_them(workdir, capsys):
    with pytest.raises(SystemExit):
        type_in("lds", workdir, ensemble__subsets="22")
    said = capsys.readouterr().err
    assert "4 of 44 models of the ensemble are missing" in said
    assert "0020-0, 0021-0, 0020-1, 0021-1" in said
    assert "dtrak-jax retrain" in said


def test_an_ensemble_of_others_is_refused(workdir, capsys):
    path = workdir / "ensemble" / "outputs.npz"
    saved = files.read_npz(path)
    # Other ids; and the same ids with other pixels.
    for field, queries in (("query_ids", "validation"), ("query_digests", "generated")):
        own = saved["query_set"] == queries
        changed = saved[field].copy()
        changed[own] = changed[own][::-1]
        files.write_npz(path, **saved | {field: changed})
        with pytest.raises(SystemExit):
            type_in("lds", workdir)
        said = capsys.readouterr().err
        assert f"is of other {queries} queries than this run's" in said


def test_scores_of_another_training_set_are_refused(workdir, capsys):
    path = workdir / "scores" / "trak-validation.npz"
    saved = files.read_npz(path)
    files.write_npz(path, **saved | {"train_ids": saved["train_ids"][::-1]})
    with pytest.raises(SystemExit):
        type_in("lds", workdir)
    said = capsys.readouterr().err
    assert "trak-validation.npz has other train_ids than the ensemble" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble__subsets": "7"}, "at least 8"),
        ({"ensemble__models": "0"}, "ensemble.models is 0"),
        ({"counterfactual__count": "60"}, "60"),
        ({"ablation__studies": "moon"}, "moon"),
        ({"counterfactual__methods": "random"}, "random"),
    ],
)
def test_wrong_settings_are_refused(workdir, capsys, changes, message):
    stage = "counterfactual" if "counterfactual__count" in changes else "lds"
    if "ensemble__subsets" in changes:
        type_in("retrain", workdir, **changes)
    with pytest.raises(SystemExit):
        type_in(stage, workdir, **changes)
    assert message in capsys.readouterr().err


def test_json_is_json(finished):
    """No NaN, which other readers refuse."""
    for name in ("lds", "ablations", "counterfactual"):
        text = (finished / f"{name}.json").read_text()
        json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
