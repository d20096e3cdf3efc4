"""A store does not depend on who writes it, where, or in how many parts."""

import shutil

import jax
import numpy as np
import pytest
from conftest import apply, init

import dtrak_jax as dtrak
from dtrak_jax import files, parallel
from dtrak_jax.features import Store, microbatches

PARAMS = init(jax.random.key(0))
PROJECTION = dtrak.Projection(dim=16)
IDS = tuple(f"image-{i}" for i in range(12))
EVERYTHING = slice(0, 12)


def featurize(images, rows=EVERYTHING, *, batch_size=1, store=None, **changes):
    """{measurement: features} of some of the images."""
    settings = {"measurement": ("square", "loss"), "timesteps": (100, 600)}
    return dtrak.featurize(
        dtrak.Task(apply, dtrak.linear_schedule(), **settings | changes),
        PARAMS,
        images[rows],
        PROJECTION,
        ids=IDS[rows],
        store=store,
        batch_size=batch_size,
    )


def arrays(features):
    """Everything that is kept of {measurement: features}."""
    return {
        (name, field): np.asarray(value)
        for name, kept in features.items()
        for field, value in (
            ("phi", kept),
            ("norms", kept.squared_norms),
            ("losses", kept.losses),
        )
    }


def assert_close(actual, expected):
    """Asserts equality to float32 rounding, relative to the largest entry."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        limit = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(
            actual[name], value, rtol=0, atol=limit, err_msg=str(name)
        )


def assert_same(actual, expected):
    """Asserts equality bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=str(name))


@pytest.fixture
def devices(monkeypatch):
    """Sets how many devices there are."""
    every = jax.local_devices()
    return lambda n: monkeypatch.setattr(jax, "local_devices", lambda: every[:n])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(microbatches, "CHUNK_ROWS", 3)


@pytest.fixture
def stop_after(monkeypatch):
    """Lets that many more chunks be written, or all if < 0, and interrupts in the next."""
    write = Store.write

    def stop(chunks):
        def counted(self, *rows):
            nonlocal chunks
            if chunks == 0:
                raise KeyboardInterrupt
            chunks -= 1
            write(self, *rows)

        monkeypatch.setattr(Store, "write", counted)

    return stop


def content(folder):
    """Every file of a store."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_store_continues_where_it_stopped(images, tmp_path, small_chunks, stop_after):
    """Interrupted after some chunks, resumed: the same bytes as in one go."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    featurize(images, store=whole)
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        featurize(images, store=cut)
    with pytest.raises(ValueError, match="run featurize again"):
        dtrak.Features.load(cut, "loss")
    stop_after(-1)
    featurize(images, store=cut)
    assert content(cut) == content(whole)


def test_finished_stores_are_known_without_the_network(
    images, tmp_path, small_chunks, stop_after
):
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        featurize(images, store=tmp_path)
    assert not Store.load(tmp_path).is_whole
    stop_after(-1)
    featurize(images, store=tmp_path)
    assert Store.load(tmp_path).is_whole


def test_damaged_stores_are_refused(images, tmp_path):
    store, photos = tmp_path / "s", tmp_path / "photos"
    featurize(images, store=store)
    chunk = next(path for path in (store / "loss/phi/c").rglob("*") if path.is_file())
    whole = chunk.read_bytes()
    for damage in (whole[:-7], b"x" + whole[1:]):
        chunk.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            np.asarray(dtrak.Features.load(store, "loss"))
    chunk.unlink()
    with pytest.raises(ValueError, match=f"missing; delete their store {store} "):
        np.asarray(dtrak.Features.load(store, "loss"))
    loaded = dtrak.Features.load(store, "loss")
    (store / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        featurize(images, store=store)
    shutil.rmtree(store)
    with pytest.raises(FileNotFoundError, match=f"their store {store} is gone"):
        np.asarray(loaded)
    photos.mkdir()
    (photos / "cat.png").touch()
    with pytest.raises(ValueError, match="holds no feature store"):
        featurize(images, store=photos)
    with pytest.raises(FileNotFoundError, match="no feature store"):
        dtrak.Features.load(tmp_path / "nowhere", "loss")


def test_another_mesh_continues_a_store(
    images, tmp_path, devices, small_chunks, stop_after
):
    """Begun on one device, gone on with on eight in larger batches, read on two."""
    expected = arrays(featurize(images))
    devices(1)
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        featurize(images, batch_size=1, store=tmp_path)
    before = content(tmp_path)
    assert len([name for name in before if name.startswith("losses/c/")]) == 2
    devices(8)
    stop_after(2)
    featurize(images, batch_size=4, store=tmp_path)
    after = content(tmp_path)
    assert before.items() < after.items()
    assert len([name for name in after if name.startswith("losses/c/")]) == 4
    devices(2)
    stop_after(0)
    again = featurize(images, batch_size=3, store=tmp_path)
    assert_close(arrays(again), expected)
    loaded = {name: dtrak.Features.load(tmp_path, name) for name in again}
    assert_same(arrays(loaded), arrays(again))


def test_other_processes_continue_a_store(images, tmp_path, monkeypatch, small_chunks):
    """The first of three, the second of two, then a single one; all that is left."""
    expected = arrays(featurize(images))
    monkeypatch.setattr(parallel, "barrier", lambda name: None)

    def process(index, count):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        before = content(tmp_path)
        try:
            return featurize(images, store=tmp_path, batch_size=count)
        except ValueError as error:
            assert "have no features yet" in str(error)
        finally:
            assert before.items() <= content(tmp_path).items()

    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert process(0, 3) is None
    assert process(1, 2) is None
    assert_close(arrays(process(0, 1)), expected)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_names_that_mean_something_in_a_url(images, tmp_path, place, request):
    """All of a store is in one folder, and with the name that was given."""
    if place == "bucket":
        objects = request.getfixturevalue("bucket").objects
    folder = "gs://bucket" if place == "bucket" else tmp_path
    name = "50%20 #1 a?b"
    features = featurize(images, slice(0, 2), store=files.at(folder) / name)
    assert_same(arrays(features), arrays(featurize(images, slice(0, 2))))
    if place == "bucket":
        found = {path for path in objects if path.startswith("50")}
        assert len([path for path in found if path.startswith(f"{name}/")]) > 10
        assert all(path.startswith(f"{name}/") for path in found)
    else:
        assert [path.name for path in tmp_path.iterdir()] == [name]


# Merging


@pytest.mark.parametrize("changes", [{}, {"per_timestep": False}])
def test_merged_stores_are_the_store_of_everything(
    images, tmp_path, small_chunks, changes, monkeypatch
):
    """Bit for bit with the same batches, chunks cut anew; and it is found finished."""
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    whole = featurize(images, store=tmp_path / "whole", **changes)
    parts = slice(0, 7), slice(7, 8), slice(8, 12)
    stores = [tmp_path / str(i) for i in range(3)]
    for rows, store in zip(parts, stores, strict=True):
        featurize(images, rows, store=store, **changes)
    before = content(tmp_path)
    merged = dtrak.merge(stores, tmp_path / "merged")
    assert before.items() < content(tmp_path).items()
    assert_same(arrays(merged), arrays(whole))
    for name in whole:
        assert merged[name].ids == whole[name].ids == IDS
        assert merged[name].fingerprint == whole[name].fingerprint
    monkeypatch.setattr(Store, "write", lambda *_: pytest.fail("computed again"))
    again = featurize(images, store=tmp_path / "merged", batch_size=5, **changes)
    assert_same(arrays(again), arrays(whole))


def test_an_interrupted_merge_continues(images, tmp_path, small_chunks, stop_after):
    expected = arrays(featurize(images))
    stores = [tmp_path / "0", tmp_path / "1"]
    for rows, store in zip((slice(0, 5), slice(5, 12)), stores, strict=True):
        featurize(images, rows, store=store)
    into = tmp_path / "both"
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        dtrak.merge(stores, into)
    with pytest.raises(ValueError, match="of 12 examples have no features yet"):
        dtrak.Features.load(into, "loss")
    before = content(into)
    stop_after(2)
    merged = dtrak.merge(stores, into)
    assert before.items() < content(into).items()
    assert_close(arrays(merged), expected)
    stop_after(0)
    assert_same(arrays(dtrak.merge(stores, into)), arrays(merged))


def test_merging_in_a_bucket(images, tmp_path, bucket):
    """From a bucket and a disk into a bucket."""
    stores = ["gs://bucket/merge/0", tmp_path / "1"]
    for rows, store in zip((slice(0, 5), slice(5, 12)), stores, strict=True):
        featurize(images, rows, store=store)
    merged = dtrak.merge(stores, "gs://bucket/merge/both")
    loaded = dtrak.Features.load("gs://bucket/merge/both", "loss")
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(merged["loss"]))
    assert_close(arrays(merged), arrays(featurize(images)))


def test_stores_that_cannot_be_merged(images, tmp_path, small_chunks):
    first, second = slice(0, 6), slice(6, 12)
    featurize(images, first, store=tmp_path / "first")
    featurize(images, second, store=tmp_path / "second")

    def refused(message, *names, into="into", kind=ValueError):
        with pytest.raises(kind, match=message):
            dtrak.merge([tmp_path / name for name in names], tmp_path / into)
        assert not (tmp_path / "into").exists()

    refused("stores is empty")
    refused("no feature store in .*nowhere", "first", "nowhere", kind=FileNotFoundError)
    refused("'image-0' occurs more than once", "first", "second", "first")
    for field, changes in {
        "noise_seed": {"seed": 1},
        "draws": {"draws": 2},
        "measurements": {"measurement": "loss"},
    }.items():
        featurize(images, second, store=tmp_path / field, **changes)
        refused(f"first .there. and .*{field} .here. .*: {field} is", "first", field)
    for rows in (first, second):
        store = tmp_path / f"reference-{rows.start}"
        featurize(images, rows, store=store, noise="reference", noise_batch=4)
    refused('noise "reference" cannot', "reference-0", "reference-6")
    refused("holds other features: ids is", "first", "second", into="second")
    shutil.copytree(tmp_path / "second", tmp_path / "cut")
    next((tmp_path / "cut" / "losses" / "c").rglob("1")).unlink()
    refused("2 of 6 examples have no features yet", "first", "cut")
