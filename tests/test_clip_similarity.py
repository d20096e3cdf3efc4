"""CLIP's embeddings of a run's pictures, and the scores and distances made of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, png
from test_clip import write_golden

from dtrak_jax import data, files, pipeline
from dtrak_jax.config import (
    AttributionConfig,
    ClipConfig,
    Config,
    CounterfactualConfig,
    DataConfig,
    QueriesConfig,
)
from dtrak_jax.encoding import clip
from dtrak_jax.encoding.clip import Clip
from dtrak_jax.run import Run

GOLDEN = dict(np.load(Path(__file__).with_name("goldens") / "clip_embeddings.npz"))
METHODS = ("clip-dot", "clip-cosine")


def write_clip(folder, **changes):
    """Makes a folder of CLIP with other settings of the preprocessing."""
    write_golden("clip_whole", folder)
    settings = json.loads(str(GOLDEN["config"])) | changes
    files.write_json(folder / "preprocessor_config.json", settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    """Twelve digits, and two pictures of others as queries."""
    rng, pictures = np.random.default_rng(0), tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        (pictures / f"{name}.png").write_bytes(png(pixels))
    return Config(
        data=DataConfig(source="digits", train=12, validation=3),
        model=TINY,
        clip=ClipConfig(folder=str(folder)),
        queries=QueriesConfig(folder=str(pictures)),
        attribution=AttributionConfig(methods=METHODS),
    )


@pytest.fixture
def embedded(monkeypatch):
    """The numbers of images that were embedded, call by call."""
    counts, embed = [], Clip.__call__

    def count(network, images):
        counts.append(len(images))
        return embed(network, images)

    monkeypatch.setattr(Clip, "__call__", count)
    return counts


@pytest.mark.parametrize("name", ["colour", "grey"])
def test_embeddings_equal_those_of_transformers(name, folder, monkeypatch):
    """Of all pictures at once, and of batches of one picture on each of some devices."""
    network, expected = Clip.from_folder(folder), GOLDEN[f"embeddings/{name}"]
    images = data.from_pixels(GOLDEN[f"images/{name}"])
    whole = network(images)
    assert whole.dtype == np.float32
    atol = 2e-6 * abs(expected).max()
    np.testing.assert_allclose(whole, expected, rtol=0, atol=atol)
    monkeypatch.setattr(clip, "BATCH_SIZE", 1)
    assert len(jax.local_devices()) == 8
    np.testing.assert_allclose(network(images), whole, rtol=0, atol=atol)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    np.testing.assert_allclose(network(images[:2]), whole[:2], rtol=0, atol=atol)
    assert network(images[:0]).shape == (0, expected.shape[1])


def test_scores_are_similarities_of_embeddings(config, tmp_path, embedded):
    run = Run.at(config, tmp_path / "run")
    for queries, count in (("validation", 3), ("generated", 2)):
        dot, cosine = (run.scores(method, queries) for method in METHODS)
        train, query = (
            run.clip_network(run.examples(name).images) for name in ("train", queries)
        )
        assert dot.scores.shape == cosine.scores.shape == (count, 12)
        np.testing.assert_allclose(dot.scores, query @ train.T, rtol=1e-5)
        norms = [np.linalg.norm(rows, axis=1) for rows in (query, train)]
        expected = query @ train.T / np.outer(*norms)
        np.testing.assert_allclose(cosine.scores, expected, rtol=1e-5)
        assert dot.damping is None and dot.query_ids.tolist() == (
            run.queries[queries].ids.tolist()
        )
    # Each set once for both methods, but for those that this test embeds.
    assert sorted(embedded) == [2, 2, 3, 3, 12, 12, 12]


def test_what_changed_is_embedded_and_scored_again(config, tmp_path, embedded):
    """A picture, then the weights, then nothing."""
    workdir, weights = tmp_path / "run", tmp_path / "clip"
    shutil.copytree(config.clip.folder, weights)
    config = dataclasses.replace(config, clip=ClipConfig(folder=str(weights)))

    def scores(count, **changes):
        run = Run.at(dataclasses.replace(config, **changes), workdir)
        run.record()
        result = run.scores("clip-dot", "generated").scores
        assert embedded == count
        embedded.clear()
        return result

    first = scores([12, 3, 2])
    np.testing.assert_array_equal(scores([]), first)
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    (tmp_path / "pictures" / "b.png").write_bytes(png(pixels))
    second = scores([2])
    np.testing.assert_array_equal(second[0], first[0])
    assert (second[1] != first[1]).any()
    name = "visual_projection.weight"
    projection = write_golden("clip_whole", weights)["params"][name]
    write_golden("clip_whole", weights, tensors={name: 2 * projection})
    np.testing.assert_allclose(scores([12, 3, 2]), 4 * second, rtol=1e-5)
    saved = files.read_npz(workdir / "encoded" / "clip" / "generated.npz")
    assert saved["ids"].tolist() == ["a.png", "b.png"]


def test_refuses_a_config_without_a_folder(config):
    for changes in (
        {},
        {"attribution": AttributionConfig()}
        | {"counterfactual": CounterfactualConfig(methods=("clip-cosine",))},
        {"attribution": AttributionConfig()}
        | {"counterfactual": CounterfactualConfig(squared=("clip-dot",))},
    ):
        with pytest.raises(ValueError, match=r"'clip-.*clip.folder is empty"):
            dataclasses.replace(config, clip=ClipConfig(), **changes)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("clip_whole", {"crop_size": 7}, ("(7, 3)", "(8, 3)", "must be equal")),
        ("clip_vision", {"crop_size": 7}, ("(7, 3)", "(7, 1)")),
        ("clip_text", {}, ("'clip_text_model'", "'clip_vision_model'")),
    ],
)
def test_refuses_another_network(name, changes, words, config, tmp_path):
    """Before a command writes anything."""
    write_clip(tmp_path, **changes)
    write_golden(name, tmp_path)
    config = dataclasses.replace(config, clip=ClipConfig(folder=str(tmp_path)))
    with pytest.raises(ValueError) as error:
        pipeline.run("attribute", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(word in str(error.value) for word in words)


def test_refuses_an_incomplete_folder(config, tmp_path):
    shutil.copytree(config.clip.folder, tmp_path / "clip")
    config = dataclasses.replace(config, clip=ClipConfig(folder=str(tmp_path / "clip")))
    for name in ("model.safetensors", "preprocessor_config.json", "config.json"):
        (tmp_path / "clip" / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            pipeline.run("attribute", config, tmp_path / "run")
