"""launch/colab.ipynb, its cells run one after the other, with a tiny model."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import store_of, use_simple_network, use_two_devices
from sklearn.datasets import load_digits

import dtrak_jax as dtrak
from dtrak_jax import files

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "launch" / "colab.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
FLAGS = (
    "--data.train 40 --data.validation 0 --train.steps 10 --train.batch-size 8 "
    "--sample.count 5 --sample.steps 3 --features.timesteps 100 "
    "--features.measurements square --features.dim 64 --features.batch-size 8 "
    "--attribution.methods dtrak --report.methods dtrak"
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


def test_it_runs_and_shows_the_report(
    two_devices, shown, tmp_path, monkeypatch, capsys
):
    """The lines for the shell are these; all other cells run as they are."""
    monkeypatch.chdir(ROOT)
    use_simple_network(monkeypatch)
    settings, *cells = ("".join(cell["source"]) for cell in CODE)
    assert {"WORKDIR", "FLAGS"} <= set(re.findall(r"^(\w+) =", settings, re.MULTILINE))
    shell = [cell for cell in cells if cell.startswith(("!", "%"))]
    assert shell == [
        '!git clone -q "$REPOSITORY" dtrak_jax\n%cd dtrak_jax',
        "%pip install -q .",
    ]
    tiny = f"WORKDIR, FLAGS = {str(tmp_path / 'run')!r}, {FLAGS!r}"
    script = [settings, tiny, *(cell for cell in cells if cell not in shell)]
    (tmp_path / "cells.py").write_text("\n".join(script))
    runpy.run_path(str(tmp_path / "cells.py"))

    workdir = tmp_path / "run"
    train_ids = files.read_npz(workdir / "splits.npz")["train_ids"]
    (report,) = shown
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

    shown_first, shown_last = plt.gca().images
    for image, top in ((shown_first, scores.top(5)), (shown_last, damped.top(5))):
        pixels = np.asarray(image.get_array())
        assert pixels.shape == (4 * 10, 6 * 10)
        samples = files.read_npz(workdir / "samples" / "samples.npz")["images"]
        first = np.rint((pixels[1:9, 1:9] + 1) * 127.5)
        np.testing.assert_array_equal(first, samples[0, ..., 0])
        number = int(top.ids[0, 0].removeprefix("digit-"))
        digit = load_digits().images[number] / 8 - 1
        np.testing.assert_array_equal(pixels[1:9, 11:19], np.float32(digit))
    plt.close("all")
