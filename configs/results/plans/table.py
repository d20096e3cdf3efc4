"""Makes the tables of the plans; `python configs/results/tables.py` writes them."""

import collections
import functools
import json
from pathlib import Path

HERE = Path(__file__).parent
STAGES = ("train", "featurize", "retrain", "measure")
EXAMPLE = "cifar2_reference_v5e-4x4"
ARTBENCH = "artbench2_reference_v5e-4x4"
OLDER = ("train", "retrain")
"""Stages whose program has changed since it was compiled; the tables mark them."""
STEPS = {
    "train": "8,000 steps of 128 images",
    "sample": "1,000 images, 50 DDIM steps each",
    "featurize": "gradients of 5,000 training and 2,000 query images at 100 timesteps",
    "attribute": "the Gram matrices; their eigenvectors, on the hosts, are not planned",
    "retrain": "192 models: 64 halves of the data × 3 seeds",
    "measure": "each query's loss under each of them, at 1,000 timesteps × 3 draws",
}
"""What the stages of the example do."""

ARTBENCH_STEPS = {
    "encode": "latents of 5,000 paintings, of their mirror images, and of 2,000 queries",
    "train": "7,900 steps of 64 paintings: adapters of 25,509,888 numbers",
    "sample": "1,000 pictures, 50 DDIM steps each with guidance",
    "decode": "their latents become pictures",
    "featurize": STEPS["featurize"],
    "attribute": STEPS["attribute"],
    "retrain": "192 adapters: 64 halves of the paintings × 3 seeds",
    "measure": STEPS["measure"],
}
"""What the stages of ArtBench-2 do."""


def plans() -> list[list[str]]:
    """A line for each plan: memory, useful arithmetic, and hours of the long stages."""
    heads = ["config", "features", "slice", "GiB", "useful"]
    stages = [marked(name) for name in STAGES]
    lines = [[*heads, f"hours: {stages[0]}", *stages[1:]]]
    for path in sorted(HERE.glob("*.json")):
        name, features, _ = path.stem.split("_")
        plan = json.loads(path.read_text())
        hours: dict[str, float] = collections.Counter()
        for row in plan["stages"]:
            hours[row["stage"].partition(" ")[0]] += row["seconds"] / 3600
        useful = [row["useful"] for row in plan["stages"] if row["useful"]]
        memory = max(row["memory"] for row in plan["stages"]) / 2**30
        lines.append(
            [
                *(name, features, plan["topology"], f"{memory:.1f}"),
                f"{useful[-1]:.1%}".replace(".0", ""),
                *(f"{hours[s]:.2g}" if s in hours else "" for s in STAGES),
            ]
        )
    return lines


def example() -> list[list[str]]:
    """Every stage of one plan, as `dtrak-jax plan` prints it."""
    lines = [
        [
            *("stage", "devices", "GiB", "Gflop/step", "GB/step", "steps", "hours"),
            *("useful", "written", "stored", "collectives in a step"),
        ]
    ]
    for row in json.loads((HERE / f"{EXAMPLE}.json").read_text())["stages"]:
        collectives = [
            f"{count:.0f} {kind} ({size(total)})"
            for kind, (count, total) in row["collectives"].items()
        ]
        lines.append(
            [
                *(marked(row["stage"]), str(row["devices"])),
                f"{row['memory'] / 2**30:.2f}",
                *(f"{row['flops'] / 1e9:,.3g}", f"{row['bytes'] / 1e9:.3g}"),
                *(f"{row['steps']:,}", f"{row['seconds'] / 3600:.3g}"),
                "" if row["useful"] is None else f"{row['useful']:.0%}",
                *(size(row["written"]), size(row["stored"])),
                ", ".join(collectives) or "none",
            ]
        )
    return lines


def stages(plan: str, steps: dict[str, str]) -> list[list[str]]:
    """Returns what the stages of a plan do, take and store."""
    sums: dict[str, list[float]] = {name: [0, 0] for name in steps}
    for row in json.loads((HERE / f"{plan}.json").read_text())["stages"]:
        total = sums[row["stage"].partition(" ")[0]]
        total[0] += row["seconds"] / 3600
        total[1] += row["stored"]
    return [
        ["stage", "what it does", "hours planned", "stored"],
        *(
            [f"`{name}`", steps[name], f"{hours:.2g}", size(stored) if stored else ""]
            for name, (hours, stored) in sums.items()
        ),
    ]


def marked(stage: str) -> str:
    """Returns the name of a stage, with a star if its program has changed since."""
    return f"{stage}\\*" if stage in OLDER else stage


def size(count: float) -> str:
    """Returns a number of bytes, as 1.31 GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


TABLES = {
    "plans": plans,
    "example plan": example,
    "stages of a plan": functools.partial(stages, EXAMPLE, STEPS),
    "stages of ArtBench-2": functools.partial(stages, ARTBENCH, ARTBENCH_STEPS),
}
