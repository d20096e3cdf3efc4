"""The digits benchmark, shortened: do scores predict what retraining really does?"""

import os
import subprocess
import sys

import pytest
from conftest import DIGITS

from dtrak_jax import files

FLAGS = """
    --data.train 300 --data.validation 100 --sample.count 0
    --train.steps 1000 --train.checkpoints 1.0 --train.batch-size 48
    --features.timesteps 200 400 --features.dim 1024
    --ensemble.subsets 16 --ensemble.seeds 1 --ensemble.timesteps 10 --ensemble.draws 1
    --attribution.methods dtrak trak pixel-cosine random
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of lds.json, from training to LDS, linear and label-free."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    # It computes for minutes: worth code that takes longer to compile.
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(DIGITS.parent.parent),
    }
    for stage in ("train", "retrain", "featurize", "attribute", "lds"):
        command = [sys.executable, "-m", "dtrak_jax", stage, str(DIGITS)]
        command += ["--workdir", str(workdir), *FLAGS.split()]
        subprocess.run(command, env=environment, check=True)
    result = files.read_json(workdir / "lds.json")["queries"]["validation"]
    return {
        row["method"]: row
        for row in result["rows"]
        if row["transform"] == "linear" and row["damping_rule"] in (None, "label-free")
    }


def test_kernels_predict_retraining_far_better_than_pixels(rows):
    pixels = rows["pixel-cosine"]["lds"]
    for method in ("dtrak", "trak"):
        assert rows[method]["low"] > 0.1, rows
        assert rows[method]["lds"] > max(0.18, 1.5 * pixels), rows


def test_chance_predicts_nothing(rows):
    assert rows["random"]["low"] < 0 < rows["random"]["high"]
    assert abs(rows["random"]["lds"]) < 0.1
    assert rows["constant"]["lds"] == 0
