"""The digits job, shortened: do scores predict what retraining really does?

    python -m tests.benchmarks.digits [--small] [--workdir FOLDER]

It trains a UNet and 16 others on halves of 300 images, which takes minutes, and fails
unless kernels predict their losses far better than pixels do, and chance not at all. A
run directory that is named is kept, and continued from.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dtrak_jax import files
from tests.benchmarks.workload import DIGITS

FLAGS = """
    --data.train 300 --data.validation 100 --sample.count 0
    --train.steps 1000 --train.checkpoints 1.0 --train.batch-size 48
    --features.timesteps 200 400 --features.draws 1 --features.dim 1024
    --ensemble.subsets 16 --ensemble.seeds 1 --ensemble.timesteps 10 --ensemble.draws 1
    --attribution.methods dtrak trak pixel-cosine random
"""
SMALL = """
    --data.train 32 --data.validation 4 --train.steps 20 --train.batch-size 16
    --features.dim 128
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.digits")
    parser.add_argument("--small", action="store_true", help="shows that it runs")
    parser.add_argument("--workdir", type=Path, help="keeps the run directory there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = arguments.workdir or Path(folder) / "run"
        flags = FLAGS.split() + SMALL.split() * arguments.small
        command = [sys.executable, "-m", "dtrak_jax", "lds", str(DIGITS)]
        command += ["--workdir", str(workdir), *flags]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(os.cpu_count())}
        subprocess.run(command, env=environment, check=True)
        result = files.read_json(workdir / "lds.json")
    rows = {
        row["method"]: row
        for row in result["queries"]["validation"]["rows"]
        if row["transform"] == "linear" and row["damping_rule"] in (None, "label-free")
    }
    failed = [] if arguments.small else failures(rows)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def failures(rows: dict[str, dict]) -> list[str]:
    """Returns what does not hold of the label-free rows of lds.json, by method."""
    pixels, random = rows["pixel-cosine"]["lds"], rows["random"]
    holds = {
        "random scores have an LDS of about 0": abs(random["lds"]) < 0.1
        and random["low"] < 0 < random["high"],
        "constant scores have an LDS of 0": rows["constant"]["lds"] == 0,
    }
    for method in ("dtrak", "trak"):
        row = rows[method]
        holds[f"{method} is far better than chance"] = row["low"] > 0.1
        better = row["lds"] > max(0.18, 1.5 * pixels)
        holds[f"{method} is far better than pixels"] = better
    return [claim for claim, is_true in holds.items() if not is_true]


if __name__ == "__main__":
    main()
