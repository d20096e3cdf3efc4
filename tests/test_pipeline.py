"""The whole path, as a person types it: killed, rerun, mistyped."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import DIGITS, digits_command, run_arrays

import dtrak_jax as dtrak
from dtrak_jax import cli, files, pipeline, training

FLAGS = {
    "data.train": "200",
    "data.validation": "6",
    "model.block-out-channels": "4 8",
    "model.norm-num-groups": "2",
    "train.steps": "300",
    "train.save-every": "10",
    "sample.count": "4",
    "sample.steps": "5",
    "features.timesteps": "100 300",
    "features.dim": "64",
    "features.batch-size": "4",
}


def command(stage, workdir, **changes):
    """A command line of the shortened digits job."""
    return digits_command(stage, workdir, FLAGS, changes)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a command in a process of its own, with one device and a home of its own.

    All of them share what was compiled.
    """
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "XDG_CACHE_HOME": str(cache),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start(line, more=None):
        return subprocess.Popen(
            [sys.executable, "-m", "dtrak_jax", *line],
            env=environment | (more or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    yield start
    assert list((cache / "dtrak_jax").rglob("*-cache")), "nothing compiled was kept"


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run directory of an uninterrupted `run`."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    process = start(command("run", workdir))
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out == f"wrote {workdir / 'report.html'}\n"
    return workdir


def kill_when(process, ready):
    """Kills the process, with no chance to clean up, once ready() is true."""
    deadline = time.time() + 300
    while not ready() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def arrays(workdir):
    """Every array that the run directory ends with."""
    _, config, _ = cli.parse(command("run", workdir))
    return run_arrays(config, workdir)


def test_killed_in_train_and_in_featurize_it_ends_the_same(start, whole, tmp_path):
    """kill -9, then the same command: every array bit for bit."""
    workdir = tmp_path / "cut"
    checkpoints = workdir / "checkpoints"
    process = start(command("train", workdir))
    kill_when(process, lambda: list(checkpoints.glob("[0-9]0")))
    steps = [int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal()]
    assert steps
    assert max(steps) < 300
    for stage in ("train", "sample"):
        process = start(command(stage, workdir))
        assert process.communicate() == ("", "")
        assert process.returncode == 0
    losses = workdir / "features" / "train" / "losses" / "c" / "0"
    process = start(command("featurize", workdir))
    kill_when(process, lambda: losses.is_dir() and any(losses.iterdir()))
    with pytest.raises(ValueError, match="examples have no features yet"):
        dtrak.Features.load(workdir / "features" / "train", "loss")
    process = start(command("run", workdir))
    _, error = process.communicate()
    assert process.returncode == 0, error
    cut, expected = arrays(workdir), arrays(whole)
    assert cut.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_equal(cut[name], value, err_msg=str(name))


def test_killed_on_a_bucket_it_ends_the_same(start, whole, bucket, tmp_path):
    """The same again with the workdir on gs://, over HTTP; then copied here."""
    workdir = "gs://bucket/run"

    def line(stage):
        # A checkpoint is a hundred requests.
        return command(stage, workdir, train__save_every="150")

    def there(ending):
        return any(n.startswith("run/") and n.endswith(ending) for n in bucket.objects)

    def start_and_kill(stage, ending):
        process = start(line(stage), bucket.environment())
        kill_when(process, lambda: there(ending))

    start_and_kill("train", "/75/commit_success.txt")
    assert not there("/300/commit_success.txt")
    start_and_kill("run", "features/train/losses/c/0/0")
    assert not there("features/train/losses/c/0/3")
    process = start(line("run"), bucket.environment())
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out == f"wrote {workdir}/report.html\n"
    for name, (_, content) in bucket.objects.items():
        files.write_bytes(tmp_path / name, content)
    cut, expected = arrays(tmp_path / "run"), arrays(whole)
    assert cut.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_equal(cut[name], value, err_msg=str(name))


def test_the_run_directory_is_as_documented(whole):
    found = {path.name for path in whole.iterdir()}
    assert found == {
        "config.json",
        "metrics.jsonl",
        "splits.npz",
        "checkpoints",
        "samples",
        "features",
        "scores",
        "report.html",
    }
    assert not list(whole.rglob("*.partial"))
    assert len(list((whole / "samples").glob("*.png"))) == 4
    scores = dtrak.Scores.load(whole / "scores" / "dtrak-generated.npz")
    assert scores.scores.shape == (4, 200)
    assert scores.query_ids[0] == "generated-00000"
    splits = files.read_npz(whole / "splits.npz")
    np.testing.assert_array_equal(scores.train_ids, splits["train_ids"])
    versions = files.read_json(whole / "config.json")["versions"]
    assert {"dtrak-jax", "jax", "python"} < versions.keys()


def test_attribution_sees_the_8_bit_images(whole):
    from PIL import Image

    images, ids = pipeline.load_samples(whole)
    for image, name in zip(images, ids, strict=True):
        png = Image.open(whole / "samples" / f"{name.split('-')[1]}.png")
        np.testing.assert_array_equal(image[..., 0], np.float32(png) / 127.5 - 1)


def run(line, capsys):
    """(exit code, what it said) of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    said = capsys.readouterr()
    return stop.value.code, said.out + said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": "0"}, "data.train is 0; it must be an integer >= 1"),
        ({"data__train": "1800"}, "there are only 1797 examples"),
        ({"train__warmup": "2"}, "train.warmup is 2.0; it must be a finite number"),
        ({"features__noise": "shared"}, "'common', 'independent'"),
        ({"features__dim": "0"}, "features.dim is 0"),
        ({"features__measurements": "square l3"}, "'l3'; it must be one of: 'loss'"),
        ({"features__measurements": "square"}, "attribution.methods has 'trak'"),
        ({"attribution__damping": "0"}, "attribution.damping is 0"),
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
    # The message comes wrapped in a box.
    assert message in " ".join(said.replace("│", " ").split())
    assert not (tmp_path / "w" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["tarin", str(DIGITS), "--workdir", "w"], "invalid choice: 'tarin'"),
        (["train"], "CONFIG"),
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
    assert "--train.learning-rate" in said


def test_stages_name_the_stage_that_is_missing(tmp_path, capsys):
    for stage, missing in [
        ("sample", "dtrak-jax train"),
        ("featurize", "dtrak-jax sample"),
        ("attribute", "dtrak-jax sample"),
        ("report", "dtrak-jax sample"),
    ]:
        code, said = run(command(stage, tmp_path), capsys)
        assert code == 2
        assert f"run `{missing}`" in said


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
    _, config, options = cli.parse(command("train", tmp_path))
    assert pipeline.open_run(config, options.workdir) == tmp_path
    assert (tmp_path / "config.json").exists()


def test_settings_that_change_no_result_may_change(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "w")
    before = (tmp_path / "w" / "report.html").read_text()
    cli.main(command("report", tmp_path / "w", report__queries="1"))
    assert (tmp_path / "w" / "report.html").read_text() != before


def test_interrupts_say_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stop)
    code, said = run(command("train", tmp_path), capsys)
    assert code == 130
    assert "the same command continues" in said


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


@pytest.mark.parametrize(
    ("name", "parameters"), [("cifar2", 38_307_203), ("celeba", 118_795_011)]
)
def test_paper_configs_have_the_papers_size(name, parameters):
    config = cli.load_config(str(DIGITS.parent / f"{name}.py"))
    model = dtrak.models.build(config.model)
    shapes = dtrak.models.functions.parameter_shapes(model)
    assert dtrak.models.parameter_count(shapes) == parameters
