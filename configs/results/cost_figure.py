"""Draws cost.svg from cost.json and gauss_newton.json beside it.

python configs/results/cost_figure.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from cells import read
from matplotlib.axes import Axes

HERE = Path(__file__).parent
SETS = {"validation": "held-out digits", "generated": "generated digits"}
WAYS = {
    "one model": ("one model, more timesteps and draws", "#0b5fa5", "o"),
    "checkpoints": ("its checkpoints", "#35a29f", "s"),
    "seeds": ("another seed", "#888888", "^"),
    "models of halves": ("models of halves", "#b07aa1", "v"),
}
CURVATURE = "#d95f02"
SHARE = 0.95
"""The part of the best that is worth a line."""


def main() -> None:
    """Draws the LDS against gradients, for both sets of queries."""
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "cost"})
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    rows, made = (shown(name) for name in ("cost", "gauss_newton"))
    for axes, (name, title) in zip(panels, SETS.items(), strict=True):
        draw(axes, *([r for r in of if r["queries"] == name] for of in (rows, made)))
        axes.set(title=title, xlabel="gradients of a training image", xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("LDS")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(HERE / "cost.svg", metadata={"Date": None})


def shown(name: str) -> list[dict]:
    """Returns the rows of a result on digits; of TRAK with cross-fitted lambda alone."""
    rows = read(name)["rows"]
    if name == "cost":
        return [row for row in rows if row["damping_rule"] == "cross-fitted"]
    return [row for row in rows if row["data"] == "digits"]


def draw(axes: Axes, rows: list[dict], made: list[dict]) -> None:
    """Draws every way to spend gradients, and 95% of the best."""
    for way, (label, colour, marker) in WAYS.items():
        for kernel, style in (("pooled", "-"), ("apart", ":")):
            own = [r for r in rows if (r["way"], r["kernel"]) == (way, kernel)]
            said = f"{label}{', pooled' if kernel == 'pooled' else ''}"
            line(axes, own, said, color=colour, marker=marker, linestyle=style)
    key = {"method": "trak", "kernel": "pooled", "dim": 4096}
    own = [row for row in made if key.items() <= row.items()]
    _, colour, _ = WAYS["one model"]
    line(axes, own, "one model, pooled, 4,096 columns", color=colour, marker="*")
    matrices = [row for row in made if row["method"] == "gauss-newton"]
    for dim in dict.fromkeys(row["dim"] for row in matrices):
        own = [row for row in matrices if row["dim"] == dim]
        label = f"Gauss-Newton matrices, {dim:,} columns"
        line(axes, own, label, color=CURVATURE, marker="D" if dim > 2048 else "P")
    best = max(row["lds"] for row in [*rows, *made])
    axes.axhline(SHARE * best, color="#bbbbbb", linewidth=1, zorder=0)
    axes.annotate("95% of the best", (1, SHARE * best), fontsize=9, color="#777777")


def line(axes: Axes, rows: list[dict], label: str, **style) -> None:
    """Draws rows by their cost, as one line."""
    rows = sorted(rows, key=lambda row: row["gradients"])
    points = zip(*((row["gradients"], row["lds"]) for row in rows), strict=True)
    axes.plot(*points, label=label, markersize=5, linewidth=1.3, **style)


if __name__ == "__main__":
    main()
