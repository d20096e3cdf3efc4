"""From `dtrak-jax run configs/digits.py` to the first score, compilation included.

Both sides are the same command in a new process and a new run directory: theirs with an
empty compilation cache, ours with the one that theirs filled. So the ratio says what
compiling costs. Times of the run directory's files say when each stage was done.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.rows import Row
from tests.benchmarks.workload import DIGITS

MADE = {
    "started": "config.json",
    "trained": "metrics.jsonl",
    "sampled": "samples/samples.npz",
    "featurized": "features/distortion.json",
    "first score": "scores/dtrak-validation.npz",
    "report": "report.html",
}
"""What a stage has written last."""

SMALL = """
    --train.steps 20 --data.train 32 --data.validation 4 --sample.count 4
    --sample.steps 5 --features.timesteps 1 --features.dim 128
"""


def measure(small: bool, repetitions: int) -> list[Row]:
    """The whole digits job, as its docstring has it."""
    flags = SMALL.split() if small else []
    cold, warm = [], []
    for _ in range(repetitions):
        cache = Path(tempfile.mkdtemp())
        cold.append(run(cache, flags))
        warm.append(run(cache, flags))
    return [
        Row(
            name="first score",
            ours="dtrak-jax run configs/digits.py, warm compilation cache",
            theirs="the same, cold cache",
            goal=None,
            settings={"flags": flags, "seconds until": {"cold": cold, "warm": warm}},
            agreement={},
            seconds=[made["first score"] for made in warm],
            their_seconds=[made["first score"] for made in cold],
        )
    ]


def run(cache: Path, flags: list[str]) -> dict[str, float]:
    """Seconds from the start of the process until each file of `MADE` was there."""
    workdir = Path(tempfile.mkdtemp()) / "run"
    command = [sys.executable, "-m", "dtrak_jax", "run", str(DIGITS)]
    command += ["--workdir", str(workdir), *flags]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.time()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {
        name: (workdir / file).stat().st_mtime - start for name, file in MADE.items()
    }
