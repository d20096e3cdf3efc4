"""From `dtrak-jax run configs/digits.py` to the first score, compilation included.

Both sides are the same command in a new process and a new run directory: ours with the
compilation cache that an earlier run filled, theirs with none. So the ratio says what
compiling costs. Times of the run directory's files say when each stage was done.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.rows import Row, in_turn
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
    warm = Path(tempfile.mkdtemp())
    runs = {"cold": [], "warm": []}

    def cold():
        runs["cold"].append(run(Path(tempfile.mkdtemp()), flags))

    def cached():
        runs["warm"].append(run(warm, flags))

    in_turn(cached, cold, repetitions)
    seconds, theirs = (
        [made["first score"] for made in runs[kind][1:]] for kind in ("warm", "cold")
    )
    return [
        Row(
            name="first score",
            ours="dtrak-jax run configs/digits.py, warm compilation cache",
            theirs="the same, cold cache",
            goal=None,
            settings={
                "flags": flags,
                "seconds until": {k: v[1:] for k, v in runs.items()},
            },
            agreement={},
            seconds=seconds,
            their_seconds=theirs,
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
