"""launch/colab.ipynb, its cells run one after the other, with a tiny model."""

import importlib.metadata
import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import TINY, store_of, use_simple_network, use_two_devices
from sklearn.datasets import load_digits

import dtrak_jax as dtrak
from dtrak_jax import files, models

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "launch" / "colab.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
FLAGS = (
    "--data.train 40 --data.validation 0 --train.steps 10 --train.batch-size 8 "
    "--sample.count 5 --sample.steps 3 --features.timesteps 100 "
    "--features.measurements square --features.dim 64 --features.batch-size 8 "
    "--attribution.methods dtrak --report.methods dtrak"
)


OWN_FLAGS = (
    "--features.timesteps 100 --features.measurements square --features.dim 64 "
    "--features.batch-size 8 --attribution.methods dtrak --report.methods dtrak"
)


@pytest.fixture
def two_devices(monkeypatch):
    """What is small needs not be cut in eight."""
    use_two_devices(monkeypatch)


@pytest.fixture
def shown(monkeypatch):
    """What the notebook displays, as HTML."""
    shown = []
    module = ModuleType("IPython.display")
    module.HTML, module.display = str, shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_outputs_are_stripped():
    for cell in CODE:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def script(folder, changes, cells=CODE):
    """A file of cells, with some settings put behind those of the notebook."""
    cells = ["".join(cell["source"]) for cell in cells]
    for name, value in changes.items():
        (at,) = (i for i, cell in enumerate(cells) if f"\n{name} = " in cell)
        cells[at] += f"\n{name} = {value!r}"
    path = folder / "cells.py"
    path.write_text("\n".join(cells))
    return str(path)


def test_it_runs_and_shows_the_reports(
    two_devices, shown, tmp_path, monkeypatch, capsys
):
    """All cells run as they are, from the notebook's own folder, with small settings."""
    monkeypatch.chdir(ROOT / "launch")
    use_simple_network(monkeypatch)
    changes = {"WORKDIR": str(tmp_path / "run"), "FLAGS": FLAGS, "OWN_FLAGS": OWN_FLAGS}
    # The network that stands for the UNet is in no format of diffusers.
    written = []
    monkeypatch.setattr(dtrak.models, "to_diffusers", write_unet(written))
    monkeypatch.setattr(dtrak.models, "from_diffusers", lambda folder: written[-1])
    runpy.run_path(script(tmp_path, changes))

    workdir = tmp_path / "run"
    train_ids = files.read_npz(workdir / "splits.npz")["train_ids"]
    report, own_report = shown
    assert report.startswith('<div><iframe srcdoc="&lt;!doctype html')
    scores = dtrak.Scores.load(workdir / "scores" / "dtrak-generated.npz")
    features = [
        dtrak.Features.load(store_of(workdir, name), "square")
        for name in ("train", "generated")
    ]
    damped = dtrak.attribute(*features, damping=1.0)
    printed = capsys.readouterr().out
    for name in scores.top(5).ids[:4].flat:
        assert name in train_ids
        assert name in report
        assert name in printed
    assert str(damped.top(5).ids[:4]) in printed

    own_folder = tmp_path / "run-own"
    own = dtrak.Scores.load(own_folder / "run" / "scores" / "dtrak-generated.npz")
    assert len(list((own_folder / "pictures").iterdir())) == len(own.train_ids) == 40
    assert own.query_ids[0] == "generated-00000.png" and own.query_ids[0] in own_report

    for figure, top in enumerate((scores.top(5), damped.top(5), own.top(5)), start=1):
        (image,) = plt.figure(figure).gca().images
        pixels = np.asarray(image.get_array())
        assert pixels.shape == (4 * 10, 6 * 10)
        samples = files.read_npz(workdir / "samples" / "samples.npz")["images"]
        np.testing.assert_allclose(
            pixels[1:9, 1:9] * 255, samples[0, ..., 0], atol=1e-4
        )
        number = int(re.search(r"\d+", top.ids[0, 0])[0])
        digit = load_digits().images[number] / 16
        np.testing.assert_allclose(pixels[1:9, 11:19], digit, atol=0.003)
    plt.close("all")


def write_unet(written):
    """What writes a small UNet in place of any network, and keeps that network."""
    write = dtrak.models.to_diffusers

    def to_diffusers(model, params, folder):
        written.append((model, params))
        unet = models.build(TINY)
        write(unet, models.init(unet, jax.random.key(0)), folder)

    return to_diffusers


def test_a_fresh_colab_clones_what_the_notebook_was_opened_from(tmp_path, monkeypatch):
    """It then installs the clone, with the JAX for the GPU that it finds."""
    path = "fileId=https%3A//github.com/someone/dtrak/blob/main/launch/colab.ipynb"
    calls, sessions = [], io.BytesIO(json.dumps([{"path": path}]).encode())

    def run(command, **options):
        calls.append(" ".join(command[-5:]))
        Path("dtrak_jax").mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0)

    def version(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLAB_JUPYTER_IP", "172.28.0.12")
    monkeypatch.setenv("KMP_TARGET_PORT", "9000")
    monkeypatch.setattr("urllib.request.urlopen", lambda address: sessions)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", version)
    installation = script(tmp_path, {}, CODE[:2])
    runpy.run_path(installation)
    assert calls == [
        "git clone -q https://github.com/someone/dtrak dtrak_jax",
        "pip install -q . jax[cuda12]",
    ]
    assert Path.cwd() == tmp_path / "dtrak_jax"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLAB_JUPYTER_IP")
    with pytest.raises(SystemExit, match="into REPOSITORY above"):
        runpy.run_path(installation)
