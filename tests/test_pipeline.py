"""The whole path, as a person types it: killed, rerun, mistyped, on any data."""

import contextlib
import dataclasses
import io
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    DIGITS,
    NO_ATTENTION,
    digits_command,
    draw_nothing,
    open_run,
    png,
    run_arrays,
    store_of,
    use_simple_network,
)
from PIL import Image

import dtrak_jax as dtrak
from dtrak_jax import (
    cli,
    diffusion,
    files,
    methods,
    models,
    pipeline,
    score_sets,
    training,
)
from dtrak_jax.attribution import Scores
from dtrak_jax.features import gradients
from dtrak_jax.run import Run

FLAGS = {
    "data.train": "140",
    "data.validation": "6",
    "train.steps": "40",
    "train.save-every": "10",
    "sample.count": "4",
    "sample.steps": "5",
    "features.timesteps": "100 300",
    "features.dim": "8",
    "features.batch-size": "4",
    "attribution.methods": "dtrak trak",
}

KILLED = """
import os, signal, sys
import conftest, jax, pytest
from dtrak_jax import cli
from dtrak_jax.features.store import Store
jax.config.update("jax_num_cpu_devices", 1)
conftest.use_simple_network(pytest.MonkeyPatch())
write = Store.write
def write_and_die(store, rows, *arrays):
    if rows.start:
        os.kill(os.getpid(), signal.SIGKILL)
    write(store, rows, *arrays)
Store.write = write_and_die
cli.main()
"""
"""A command that is killed, with no chance to clean up, at the second chunk of
features; of a network that compiles fast."""


def command(stage, workdir, **changes):
    """A command line of the shortened digits job."""
    return digits_command(stage, workdir, FLAGS, changes)


@pytest.fixture
def simple(one_device, monkeypatch):
    """One device, a network that compiles fast, and no figures."""
    use_simple_network(monkeypatch)
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run directory of an uninterrupted `run`."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    first, out = jax.local_devices()[:1], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(jax, "local_devices", lambda: first)
        patch.setattr(jax, "devices", lambda: first)
        use_simple_network(patch)
        cli.main(command("run", workdir))
    assert out.getvalue() == f"wrote {workdir / 'report.html'}\n"
    return workdir


def start_and_kill(line, more):
    """Starts a command in a process of its own, which is killed in featurize."""
    paths = (DIGITS.parent.parent, Path(__file__).parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *line],
        env=environment | more,
        capture_output=True,
        check=False,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


def assert_same(workdir, whole, **changes):
    """Every array of two run directories is the same bit for bit."""
    found = run_arrays(open_run(command("run", workdir, **changes)))
    expected = run_arrays(open_run(command("run", whole)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_equal(found[name], value, err_msg=str(name))


def test_killed_in_featurize_it_ends_the_same(simple, whole, tmp_path):
    """kill -9, then the same command: every array bit for bit."""
    workdir = tmp_path / "cut"
    home = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    start_and_kill(command("run", workdir), home)
    # It kept what it compiled, in the user's folder.
    assert list((tmp_path / "dtrak_jax").rglob("*-cache"))
    (store,) = (workdir / "features").glob("*/train-*")
    with pytest.raises(ValueError, match="examples have no features yet"):
        dtrak.Features.load(store, "loss")
    cli.main(command("run", workdir))
    assert_same(workdir, whole)


def test_killed_on_a_bucket_it_ends_the_same(simple, whole, bucket, tmp_path, capsys):
    """The same with the workdir on gs://, over HTTP; then copied here."""
    workdir = "gs://bucket/run"
    # A checkpoint is a hundred requests.
    line = command("run", workdir, train__save_every="40")
    start_and_kill(line, bucket.environment())
    losses = [name for name in bucket.objects if "/losses/c/" in name]
    assert [name.rpartition("/c/")[2] for name in losses] == ["0/0"]
    assert losses[0].startswith("run/features/common-2x2-sketch8/train-")
    cli.main(line)
    assert capsys.readouterr().out == f"wrote {workdir}/report.html\n"
    for name, (_, content) in bucket.objects.items():
        files.write_bytes(tmp_path / name, content)
    assert_same(tmp_path / "run", whole, train__save_every="40")


def test_the_run_directory_is_as_documented(whole):
    found = {path.name for path in whole.iterdir()}
    assert found == {
        "config.json",
        "metrics.jsonl",
        "splits.npz",
        "checkpoints",
        "samples",
        "features",
        "kernels",
        "scores",
        "report.html",
    }
    assert not list(whole.rglob("*.partial"))
    assert len(list((whole / "samples").glob("*.png"))) == 4
    scores = Scores.load(whole / "scores" / "dtrak-generated.npz")
    assert scores.scores.shape == (4, 140)
    assert scores.query_ids[0] == "generated-00000"
    assert (scores.errors > 0).all() and 1 <= scores.freedom <= 2
    labels = scores.group("label")
    assert labels.sizes.sum() == 140 and (labels.errors > 0).all()
    splits = files.read_npz(whole / "splits.npz")
    np.testing.assert_array_equal(scores.train_ids, splits["train_ids"])
    versions = files.read_json(whole / "config.json")["versions"]
    assert {"dtrak-jax", "jax", "python"} < versions.keys()


def test_scores_are_of_the_settings_of_their_method(simple, whole):
    def made_from(method, **changes):
        changes = {f"attribution__{name}": value for name, value in changes.items()}
        return score_sets.made_from(open_run(command("run", whole, **changes)), method)

    changes = ({"ggn_iterations": "3"}, {"ggn_tolerance": "0.2"}, {"ggn_images": "9"})
    others = {"ekfac_damping": "0.5"}, {"cotangents": "2"}
    made = [made_from("gauss-newton-cg", **c) for c in ({}, *changes, *others)]
    assert len(set(made)) == 6
    ekfac = [made_from("ekfac", **c) for c in ({}, *changes, *others)]
    assert len(set(ekfac[:4])) == 1 and len(set(ekfac)) == 3


def test_errors_of_groups_are_of_the_groups_of_now(simple, whole, tmp_path):
    """They are made within each draw: another column makes other scores, for which no
    result that is made from scores is made again."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    run = open_run(command("run", workdir))
    before, train = score_sets.made_from(run, "dtrak"), run.splits.train
    assert score_sets.is_made(run, "dtrak", "generated")
    grouped = dataclasses.replace(train, groups={"hand": train.ids})
    vars(run)["splits"] = run.splits._replace(train=grouped)
    assert score_sets.made_from(run, "dtrak") == before
    assert not score_sets.is_made(run, "dtrak", "generated")
    hands = run.scores("dtrak", "generated").group("hand")
    order = np.argsort(train.ids)
    scores = Scores.load(workdir / "scores" / "dtrak-generated.npz")
    np.testing.assert_allclose(hands.errors, scores.errors[:, order], rtol=1e-5)
    assert scores.columns.keys() == {"label", "hand"} and scores.copies is not None
    assert score_sets.is_made(run, "dtrak", "generated")


def test_attribution_sees_the_8_bit_images(whole):
    generated = open_run(command("run", whole)).queries["generated"]
    assert len(generated.ids) == 4
    for image, name in zip(generated.images, generated.ids, strict=True):
        picture = Image.open(whole / "samples" / f"{name.split('-')[1]}.png")
        np.testing.assert_array_equal(image[..., 0], np.float32(picture) / 127.5 - 1)


SMALL = {
    "data.train": "24",
    "data.validation": "3",
    "model.sample-size": "8",
    "model.in-channels": "1",
    "model.out-channels": "1",
    "train.steps": "8",
    "train.batch-size": "8",
    "sample.count": "3",
    "sample.steps": "2",
    "features.timesteps": "100 200",
    "features.dim": "8",
    "ensemble.subsets": "16",
    "ensemble.seeds": "2",
    "ensemble.timesteps": "2",
    "counterfactual.queries": "1",
    "counterfactual.count": "5",
    "ablation.timesteps": "100 200",
    "ablation.draws": "1",
    "ablation.noise-seeds": "1",
    "ablation.most-draws": "2",
    "ablation.dims": "8",
    "report.queries": "1",
}


def tagged(params, x, t, cond):
    """The network that compiles fast, its layer tagged for factorised projections."""
    w = params["w"]
    y = jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = dtrak.layer(w, x, y, padding="SAME")
    return jnp.tanh(y + params["b"].reshape(1, 1, 1, 1))


def write_pictures(folder, count):
    """A folder of grey PNG files, with a CSV of labels and groups."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 9, 9), np.uint8)
    rows = ["file,label,hand"]
    for i, picture in enumerate(pixels):
        files.write_bytes(folder / f"{i:02d}.png", png(picture))
        rows.append(f"{i:02d}.png,{i % 3},{'left' if i % 4 else 'right'}")
    (folder / "labels.csv").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ("digits", {}),
        ("mnist", {"data.name": "{folder}", "data.groups": "hand"}),
        # The first config has all studies.
        ("cifar2", {"data.groups": "label", "ablation.studies": "checkpoint"}),
    ],
)
def test_every_command_runs_on_shipped_configs(
    simple, monkeypatch, mocked, tmp_path, capsys, config, flags
):
    """In small, one after the other, on each source: digits, folder, tfds."""
    monkeypatch.setattr(models, "apply_fn", lambda model: tagged)
    workdir = tmp_path / "run"
    write_pictures(tmp_path / "pictures", 30)
    flags = {k: v.format(folder=tmp_path / "pictures") for k, v in flags.items()}
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    with mocked("cifar10", 150, ("train", "test"), names):
        for stage in pipeline.STAGES:
            line = digits_command(stage.name, workdir, SMALL | flags, {})
            line[1] = str(DIGITS.parent / f"{config}.py")
            cli.main(line)
        run = open_run(line)
        assert len(run.splits.train.ids) == 24
        assert set(run.queries) == {"validation", "generated"}
        assert set(run.splits.train.groups) == set(flags.get("data.groups", "").split())
    removed = {row["method"] for row in run.json("counterfactual")["summary"]}
    assert removed >= {*run.config.attribution.methods, "random", "everything"}
    studies = {row["name"] for row in run.json("ablations")["rows"]}
    assert studies == set(run.config.ablation.studies)
    for queries in ("validation", "generated"):
        scored = {row["method"] for row in run.json("lds")["queries"][queries]["rows"]}
        assert scored >= set(run.config.attribution.methods)
    page = (workdir / "report.html").read_text()
    assert all(
        f'id="{part}"' in page for part in ("trust", "counterfactual", "ablations")
    )
    assert f"wrote {workdir / 'report.html'}" in capsys.readouterr().out


def test_a_corrected_contributor_locks_nothing(simple, monkeypatch, tmp_path):
    """Corrected after training, killed while scores are made anew: all files end with
    the same groups, and nothing is trained or featurized again."""
    write_pictures(tmp_path / "pictures", 30)
    more = {"data.name": str(tmp_path / "pictures"), "data.groups": "hand"}
    more |= {"attribution.methods": "dtrak trak pixel-cosine", "features.draws": "2"}

    def line(stage):
        line = digits_command(stage, tmp_path / "run", SMALL | more, {})
        line[1] = str(DIGITS.parent / "mnist.py")
        return line

    cli.main(line("export"))
    csv, scores = tmp_path / "pictures" / "labels.csv", tmp_path / "run" / "scores"
    train = open_run(line("export")).splits.train
    image = train.ids[train.groups["hand"] == "left"][0]
    (row,) = (row for row in csv.read_text().split() if row.startswith(image))
    csv.write_text(csv.read_text().replace(row, row.replace("left", "right")))
    for module, name in (
        (training, "train"),
        (gradients, "gradient_function"),
    ):
        monkeypatch.setattr(module, name, lambda *_, n=name, **__: pytest.fail(n))
    save = Scores.save

    def save_once(self, path):
        monkeypatch.setattr(Scores, "save", lambda *_: 1 / 0)
        save(self, path)

    monkeypatch.setattr(Scores, "save", save_once)
    with (
        pytest.warns(
            UserWarning, match=f"1 of 24 .*hand of {image}: left -> right.*exp"
        ),
        pytest.raises(ZeroDivisionError),
    ):
        cli.main(line("attribute"))
    monkeypatch.setattr(Scores, "save", save)
    cli.main(line("export"))
    hands = open_run(line("export")).splits.train.groups["hand"]
    for path in scores.glob("*-*.npz"):
        groups = Scores.load(path).group("hand")
        np.testing.assert_array_equal(groups.sizes, np.unique_counts(hands).counts)
        assert np.isnan(groups.errors).any() == path.name.startswith("pixel")
        whole = files.read_json(tmp_path / "run" / "export" / f"{path.stem}.json")
        for row, query in enumerate(whole["groups"]["hand"]["queries"]):
            by_name = {group["group"]: group for group in query["groups"]}
            made = [by_name[name] for name in groups.names]
            assert [group["score"] for group in made] == groups.scores[row].tolist()
            assert [group["images"] for group in made] == groups.sizes.tolist()


GIVEN = """
from dtrak_jax.config import *
def get_config():
    return Config(
        data=DataConfig(source="digits", train=12, validation=0),
        model=ModelConfig(folder="{0}/model"),
        queries=QueriesConfig(folder="{0}/pictures"),
        features=FeaturesConfig(
            measurements=("square",), timesteps=(100,), dim=8, batch_size=4
        ),
        attribution=AttributionConfig(methods=("dtrak",)),
    )
"""


def test_a_given_model_and_given_queries(one_device, monkeypatch, tmp_path):
    """Nothing is trained, and nothing is sampled."""
    model = models.build(NO_ATTENTION)
    params = models.init(model, jax.random.key(0))
    models.to_diffusers(model, params, tmp_path / "model")
    write_pictures(tmp_path / "pictures", 3)
    (tmp_path / "given.py").write_text(GIVEN.format(tmp_path))
    for module, name in ((training, "train"), (diffusion, "sample")):
        monkeypatch.setattr(module, name, lambda *_, n=name, **__: pytest.fail(n))
    for stage in ("featurize", "attribute", "report"):
        line = [stage, str(tmp_path / "given.py"), "--workdir", str(tmp_path / "run")]
        cli.main(line)
    run = open_run(line)
    scores = run.scores("dtrak", "generated")
    assert scores.query_ids.tolist() == ["00.png", "01.png", "02.png"]
    assert np.isfinite(scores.scores).all() and scores.scores.std() > 0
    jax.tree.map(np.testing.assert_array_equal, run.params(), params)
    made = {path.name for path in run.workdir.iterdir()}
    assert not made & {"checkpoints", "metrics.jsonl", "samples", "ensemble"}
    page = (run.workdir / "report.html").read_text()
    assert "00.png" in page
    # Too few timesteps to tell that its weights are random, and too few queries.
    assert "Nothing here tells" in page and "Not judged: that takes" in page
    begun = run.json("config")["begun"]
    assert begun["begun"].endswith(" UTC") and begun["begun"] in page
    monkeypatch.setattr("dtrak_jax.provenance.beginning", dict)
    cli.main(line)
    assert (run.workdir / "report.html").read_text() == page


def run(line, capsys):
    """(exit code, what it said) of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    said = capsys.readouterr()
    return stop.value.code, said.out + said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": "-1"}, "data.train is -1; it must be an integer >= 0"),
        ({"data__train": "1800"}, "there are only 1797 examples"),
        ({"train__warmup": "2"}, "train.warmup is 2.0; it must be a finite number"),
        ({"features__noise": "shared"}, "'common', 'independent'"),
        ({"features__dim": "0"}, "features.dim is 0"),
        (
            {"features__measurements": "square l3"},
            "features.measurements is 'l3'; it must be",
        ),
        ({"features__measurements": "square"}, "attribution.methods has 'trak', which"),
        ({"attribution__damping": "0"}, "attribution.damping is 0"),
        (
            {"attribution__share": "", "attribution__solver": "cg"},
            "attribution.share is on; it needs a damping below 1",
        ),
        ({"counterfactual__sets": "pixel-dot"}, "counterfactual.sets is 'pixel-dot'"),
        # They would remove the same images as its scores, by as many models.
        ({"counterfactual__squared": "coverage"}, "counterfactual.squared is 'cov"),
        (
            {"counterfactual__methods": "coverage", "attribution__solver": "cg"},
            "'eigh', not 'cg', or attribution.coverage_share 0",
        ),
        (
            {
                "attribution__methods": "coverage dtrak",
                "attribution__coverage-share": "1",
            },
            "attribution.coverage_share is 1.0; it must be",
        ),
        (
            {
                "counterfactual__methods": "gas",
                "counterfactual__squared": "relative-influence",
                "attribution__solver": "cg",
            },
            "counterfactual.squared has 'relative-influence', which needs kernels decomp",
        ),
        (
            {"counterfactual__sets": "coverage", "attribution__solver": "cg"},
            "counterfactual.sets needs kernels decomposed",
        ),
        ({"sample__steps": "2000"}, "at most diffusion.steps=1000"),
        ({"model__sample-size": "9"}, "it must be a multiple of 2"),
        ({"model__norm-num-groups": "3"}, "does not divide"),
        ({"data__source": "tfds"}, "needs a data set's name"),
        ({"trian__steps": "5"}, "--trian.steps"),
        ({"train__steps": "many"}, "train.steps"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    tmp_path, capsys, changes, message
):
    code, said = run(command("train", tmp_path / "w", **changes), capsys)
    assert code == 2
    assert message in said
    assert not (tmp_path / "w" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ["tarin", str(DIGITS), "--workdir", "w"],
            "no command tarin; did you mean train?",
        ),
        (["train"], "the config is missing"),
        (["train", str(DIGITS)], "--workdir is missing"),
        (["train", "configs/nothing.py", "--workdir", "w"], "there is no config file"),
        (["train", __file__, "--workdir", "w"], "must define get_config()"),
    ],
)
def test_wrong_command_lines(capsys, line, message):
    code, said = run(line, capsys)
    assert code == 2
    assert message in said


def test_help_lists_the_commands_and_the_settings(capsys):
    code, said = run(["--help"], capsys)
    assert code == 0
    assert all(name in said for name in cli.COMMANDS)
    code, said = run(["train", str(DIGITS), "--help"], capsys)
    assert code == 0
    assert "--train.learning-rate NUMBER" in said and "(default: 0.002)" in said
    code, said = run(["train", str(DIGITS), "--help-all"], capsys)
    assert code == 0
    assert "{common,independent,reference,cyclic}" in said


def test_a_workdir_of_another_config(whole, tmp_path, capsys):
    code, said = run(command("run", whole, train__seed="7"), capsys)
    assert code == 2
    assert "train.seed is 42 there and 7 here" in said
    (tmp_path / "thesis.tex").touch()
    code, said = run(command("run", tmp_path), capsys)
    assert code == 2
    assert "is not empty and holds no run" in said


def test_what_a_killed_write_left_is_in_nobodys_way(tmp_path):
    (tmp_path / "config.json.7.partial").write_bytes(b'{"conf')
    open_run(command("train", tmp_path)).record()
    assert (tmp_path / "config.json").exists()


def test_free_settings_may_change(simple, whole, tmp_path):
    """What is shown, and the damping, in a run directory that there is."""
    workdir = shutil.copytree(whole, tmp_path / "w")
    before = (workdir / "report.html").read_text()
    cli.main(command("report", workdir, report__queries="1"))
    assert (workdir / "report.html").read_text() != before
    metadata = store_of(workdir, "train") / "metadata.json"
    kept = metadata.stat().st_mtime_ns
    cli.main(command("run", workdir, attribution__damping="0.7"))
    assert Scores.load(workdir / "scores" / "trak-generated.npz").damping[0] == 0.7
    saved = files.read_json(workdir / "config.json")["config"]
    assert saved["attribution.damping"] == 0.7
    cli.main(command("report", workdir, attribution__damping="0.1"))
    share = {"attribution__damping": "0.1", "attribution__share": ""}
    cli.main(command("report", workdir, **share))
    scores = Scores.load(workdir / "scores" / "trak-generated.npz")
    assert scores.damping == dtrak.effective(0.1)
    values = scores.eigenvalues
    dims = np.sum(values / (values + scores.lambdas[:, None]), axis=1)
    np.testing.assert_allclose(dims, 0.1 * values.shape[1])
    html = (workdir / "report.html").read_text()
    assert "damped until its effective dimension is 0.1" in html
    assert metadata.stat().st_mtime_ns == kept


def test_a_profile_is_a_trace(simple, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "w")
    cli.main([*command("attribute", workdir), "--profile", str(tmp_path / "trace")])
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize("module", ["__main__", "cli"])
def test_methods_are_listed(module, monkeypatch, capsys):
    """By the package as a program, and by the module of the command line."""
    monkeypatch.setattr(sys, "argv", ["dtrak-jax", "methods"])
    path = Path(dtrak.__file__).with_name(f"{module}.py")
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(name in printed for name in methods.METHODS)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [((), "stopped; the same command continues"), (("after step 5",), "after step 5")],
)
def test_interrupts_end_with_130(tmp_path, capsys, monkeypatch, raised, expected):
    """By which a script tells a stop from an error."""

    def stop(*_, **__):
        raise KeyboardInterrupt(*raised)

    monkeypatch.setattr(training, "train", stop)
    code, said = run(command("train", tmp_path), capsys)
    assert code == 130
    assert expected in said


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """By a limit on the size of files, which fails a write in the same way."""
    path = tmp_path / "scores.npz"
    files.write_bytes(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="what was there before is unchanged"):
            files.write_bytes(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npz"]


def test_a_refused_command_leaves_the_workdir_free(tmp_path, capsys):
    """Whatever is refused before anything was made leaves nothing there."""
    code, text = run(command("train", tmp_path / "w", data__train="20000"), capsys)
    assert code == 2
    assert "there are only 1797 examples" in text
    assert not (tmp_path / "w").exists()
    _, config, options = cli.parse(command("train", tmp_path / "w"))
    assert Run.at(config, options.workdir).config == config
