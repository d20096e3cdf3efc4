"""launch/colab.ipynb, its cells run one after the other, with a tiny model."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax import files

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "launch" / "colab.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
FLAGS = (
    "--data.train 40 --data.validation 0 --model.block-out-channels 4 "
    "--model.down-block-types DownBlock2D --model.up-block-types UpBlock2D "
    "--model.no-add-attention --model.norm-num-groups 2 --train.steps 10 "
    "--train.batch-size 8 --sample.count 5 --sample.steps 3 --features.timesteps 100 "
    "--features.measurements square --features.dim 64 --features.batch-size 8 "
    "--attribution.methods dtrak --report.methods dtrak"
)


@pytest.fixture
def two_devices(monkeypatch):
    """What is small needs not be cut in eight."""
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    monkeypatch.setattr(jax, "devices", lambda: two)


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

    train_ids = set(files.read_npz(tmp_path / "run" / "splits.npz")["train_ids"])
    (report,) = shown
    assert report.startswith('<div><iframe srcdoc="&lt;!doctype html')
    scores = dtrak.Scores.load(tmp_path / "run" / "scores" / "dtrak-generated.npz")
    printed = capsys.readouterr().out
    for name in scores.top(5).ids[:4].flat:
        assert name in train_ids
        assert name in report
        assert name in printed

    (image,) = plt.gca().images
    pixels = np.asarray(image.get_array())
    assert pixels.shape == (4 * 10, 6 * 10)
    generated = files.read_npz(tmp_path / "run" / "samples" / "samples.npz")["images"]
    np.testing.assert_array_equal(pixels[1:9, 1:9], generated[0, ..., 0])
    plt.close("all")
