"""Files and checkpoints on a local disk and in a bucket."""

import importlib.util
import json

import jax
import numpy as np
import pytest
import tensorstore as ts
from conftest import apply, init, train_apply

import dtrak_jax as dtrak
from dtrak_jax import files, training
from dtrak_jax.config import Config, TrainConfig
from dtrak_jax.run import Run
from dtrak_jax.training import checkpoint


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """A folder that is not there yet."""
    if request.param == "disk":
        return files.at(tmp_path) / "new" / "folder"
    request.getfixturevalue("bucket")
    return files.at("gs://bucket") / request.node.name / "folder"


def test_what_is_written_is_read(folder):
    assert not folder.exists()
    array = np.arange(3.0)
    for value in (1, {"longer": "than before"}):
        files.write_json(folder / "a.json", value)
        assert files.read_json(folder / "a.json") == value
        files.write_json_lines(folder / "b.jsonl", [{"line": value}] * 2)
        assert files.read_json_lines(folder / "b.jsonl") == [{"line": value}] * 2
        files.write_npz(folder / "c.npz", array=array, value=str(value))
        assert files.holds(folder / "c.npz", {"array": array})
        assert not files.holds(folder / "c.npz", {"array": -array})
    assert not files.holds(folder / "d.npz", {})
    assert {path.name for path in folder.iterdir()} == {"a.json", "b.jsonl", "c.npz"}


def test_a_list_of_texts_is_a_line_of_json(tmp_path):
    """However long; what holds more has a line for each entry."""
    removed = {"dtrak-set": {"a": ["1.png"] * 99, "b": []}, "é": {}}
    value = {"removed": removed, "rows": [{"x": 1.5, "y": (1, 2)}, None], "n": [[1], 2]}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert text.count("\n") == 20
    assert f'"a": {json.dumps(["1.png"] * 99)},\n' in text
    assert files.read_json(tmp_path / "a.json") == json.loads(json.dumps(value))


def test_a_large_file_in_a_bucket(bucket):
    """It is sent in several parts."""
    content = np.random.default_rng(0).bytes(6 * 2**20)
    files.write_bytes("gs://bucket/large", content)
    assert bucket.objects["large"][1] == content
    assert files.at("gs://bucket/large").read_bytes() == content


def test_what_others_write_is_seen(folder):
    """Also where the folder was listed before: by TensorStore, another process, ..."""
    files.write_json(folder / "a.json", 1)
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    url = f"{folder}/" if files.is_remote(folder) else f"file://{folder}/"
    other = ts.KvStore.open(url).result()
    other.write("a.json", b"[1, 2, 3]").result()
    other.write("b.json", b"4").result()
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]
    assert files.read_json(folder / "a.json") == [1, 2, 3]
    assert files.read_json(folder / "b.json") == 4
    other.write("b.json", None).result()
    assert not (folder / "b.json").exists()


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(files.at("run")) == f"{tmp_path}/run"
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    assert str(files.at("~/run")) == f"{tmp_path}/home/run"
    assert str(files.at("gs://bucket/run") / "a") == "gs://bucket/run/a"
    for wrong in ("gs:/bucket/run", "s3://bucket/run", "memory://run"):
        with pytest.raises(ValueError, match="neither a path of a local disk nor gs:"):
            files.at(wrong)


def test_what_is_no_archive_is_said_without_advice_to_trust_it(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a.npz is damaged \(it holds no arrays\)"):
        files.read_npz(tmp_path / "a.npz")


def test_a_path_whose_parent_is_a_file_is_refused(tmp_path, images):
    (tmp_path / "file").touch()
    wrong = tmp_path / "file" / "run"
    task = dtrak.Task(apply, dtrak.linear_schedule(), timesteps=2)
    given = task, init(jax.random.key(0)), images, dtrak.Projection("none")
    for check in (
        lambda: Run.at(Config(), wrong),
        lambda: dtrak.featurize(*given, store=wrong),
        lambda: dtrak.featurize(*given, store=wrong.parent),
        lambda: files.check_file("--output", wrong),
    ):
        with pytest.raises(OSError, match=r"is '.*/file.*', (and|which) .*is a file"):
            check()
    with pytest.raises(
        IsADirectoryError, match="--output is .*, a folder; name a file"
    ):
        files.check_file("--output", tmp_path)
    assert files.check_folder("store", tmp_path / "new" / "store").parent.name == "new"
    assert str(files.check_file("x", "gs://bucket/a")) == "gs://bucket/a"


def test_a_missing_package_is_named_by_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "dtrak-jax\[gcp\]"'):
        files.write_json("gs://bucket/a.json", 1)


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(OSError, match="gs://other/a.json was not written.*bucket is"):
        files.write_json("gs://other/a.json", 1)


def test_a_checkpoint_counts_once_it_is_whole(bucket, images):
    """In a bucket nothing is renamed: a file that is written last says so."""
    workdir, folder = "gs://bucket/cut", "gs://bucket/cut/checkpoints"
    config = TrainConfig(steps=7, batch_size=8, checkpoints=(0.4, 1.0))

    def train():
        schedule = dtrak.linear_schedule()
        recipe = training.Recipe(init, train_apply, schedule, config)
        return training.train(recipe, images, workdir)

    trained = train()
    assert sorted(checkpoint.steps(folder)) == [3, 7]
    loaded = training.load_params(init, config, workdir)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)

    del bucket.objects["cut/checkpoints/7/commit_success.txt"]
    assert checkpoint.steps(folder) == [3]
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        training.load_params(init, config, workdir)
    jax.tree.map(np.testing.assert_array_equal, train(), trained)
    assert sorted(checkpoint.steps(folder)) == [3, 7]
