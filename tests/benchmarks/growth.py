"""How the time and peak memory of featurize and attribute grow, one thing at a time.

    python -m tests.benchmarks.growth [--small] [--svg FILE] [--json FILE]

N images, T timesteps, k the length of a feature, p the number of parameters. Every
point is two new processes, since a process keeps the memory it once had: one featurizes
N images into a store, and one attributes 16 queries to them. Times are without
compiling. Memory is the largest resident size of the process, all of Python and JAX
included; that of featurize must not grow with N. It needs Linux, which reports it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BASE = {"N": 512, "T": 5, "k": 1024, "width": 16}
AXES = {
    "N": (256, 512, 1024, 2048),
    "T": (1, 2, 5, 10),
    "k": (512, 1024, 2048, 4096, 8192),
    "width": (8, 16, 32, 64),
}
SMALL_BASE = {"N": 8, "T": 2, "k": 128, "width": 8}
SMALL_AXES = {"N": (8, 16), "T": (1, 2), "k": (64, 128), "width": (8, 16)}
"""`width` is the channels of the UNet's first level, half of those of the second."""

QUERIES = 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--svg", type=Path, default=Path("runs/growth.svg"))
    parser.add_argument("--json", type=Path, default=Path("runs/growth.json"))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(STAGES[arguments.stage](arguments.point, arguments.store)))
        return
    base, axes = (SMALL_BASE, SMALL_AXES) if arguments.small else (BASE, AXES)
    points = []
    for axis, values in axes.items():
        for value in values:
            points.append({"axis": axis, **measure(base | {axis: value})})
            print(points[-1], flush=True)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(points, indent=1) + "\n")
    plot(points, arguments.svg)
    print(f"wrote {arguments.json} and {arguments.svg}")


def measure(point: dict) -> dict:
    """The point with {"featurize": ..., "attribute": ...}, from two new processes."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "TQDM_DISABLE": "1",
    }
    found = dict(point)
    with tempfile.TemporaryDirectory() as store:
        for stage in STAGES:
            command = [sys.executable, "-m", "tests.benchmarks.growth"]
            command += ["--stage", stage, "--point", json.dumps(point)]
            done = subprocess.run(
                [*command, "--store", store],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
            )
            found[stage] = json.loads(done.stdout)
    return found


def featurize(point: dict, store: Path) -> dict:
    """Featurizes N images and the queries; see `growth`."""
    import dataclasses

    import jax
    import numpy as np

    import dtrak_jax as dtrak
    from dtrak_jax import cli, models
    from tests.benchmarks.workload import DIGITS

    config = dataclasses.replace(
        cli.load_config(str(DIGITS)).model,
        block_out_channels=(point["width"], 2 * point["width"]),
    )
    model = models.build(config)
    params = models.init(model, jax.random.key(0))
    task = dtrak.Task(
        models.apply_fn(model), dtrak.linear_schedule(), timesteps=point["T"]
    )
    projection = dtrak.Projection("sketch", point["k"])
    shape = (point["N"], 8, 8, 1)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    queries = images[:QUERIES] / 2
    dtrak.featurize(task, params, queries, projection, store=store / "query")
    start = time.perf_counter()
    dtrak.featurize(task, params, images, projection, store=store / "train")
    return cost(start) | {"parameters": models.parameter_count(params)}


def attribute(point: dict, store: Path) -> dict:
    """Attributes the queries to the N images; the second time, without compiling."""
    import dtrak_jax as dtrak

    train, query = (
        dtrak.Features.load(store / name, "square") for name in ("train", "query")
    )
    for _ in range(2):
        start = time.perf_counter()
        dtrak.attribute(train, query, method="dtrak")
    return cost(start)


STAGES = {"featurize": featurize, "attribute": attribute}


def cost(start: float) -> dict[str, float]:
    """Seconds since then, and the process's largest resident size so far in MB."""
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    return {"seconds": seconds, "peak MB": peak}


def plot(points: list[dict], path: Path) -> None:
    """One column for each axis; time above, memory below."""
    from matplotlib import pyplot as plt

    titles = {"N": "N, images", "T": "T, timesteps", "k": "k", "width": "p, parameters"}
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), sharey="row")
    for (axis, title), column in zip(titles.items(), axes.T, strict=True):
        own = [point for point in points if point["axis"] == axis]
        x = [
            point["featurize"]["parameters"] if axis == "width" else point[axis]
            for point in own
        ]
        for stage in STAGES:
            for ax, what in zip(column, ("seconds", "peak MB"), strict=True):
                ax.plot(x, [point[stage][what] for point in own], "o-", label=stage)
        for ax in column:
            ax.set_xscale("log")
            ax.set_xticks(x, [f"{value:,}" for value in x])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        column[1].set_xlabel(title)
    axes[0, 0].set(yscale="log", ylabel="seconds")
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("peak memory of the process, MB")
    axes[0, 0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
