"""Draws noise.svg from the ablations beside it.

python configs/results/noise_figure.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from cells import read
from matplotlib.axes import Axes

HERE = Path(__file__).parent
NOISES = ("common", "cyclic", "reference", "independent")
KERNELS = {
    "apart": ("one kernel per (t, ε)", "#0b5fa5"),
    "pooled": ("one pooled kernel", "#35a29f"),
    "averaged": ("averaged features (as the paper)", "#d95f02"),
    "cosine": ("cosines, no kernel", "#888888"),
}
MEASUREMENTS = {"square": ("D-TRAK", True), "loss": ("TRAK", False)}


def main() -> None:
    """Draws the LDS by noise on both data sets, and against the number of draws."""
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "noise"})
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    digits, mnist = (load(name) for name in ("digits", "mnist"))
    noises(panels[0], digits, "digits 8×8")
    noises(panels[1], mnist, "MNIST 14×14")
    draws(panels[2], digits)
    top = max(panel.get_ylim()[1] for panel in panels)
    for panel in panels:
        panel.set_ylim(-0.02, top)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("LDS, held-out images")
    handles = [
        plt.Line2D([], [], color=colour, marker="o", linestyle="none", label=label)
        for label, colour in KERNELS.values()
    ] + [
        marker(plt.Line2D([], [], linestyle="none", label=label), "#444444", filled)
        for label, filled in MEASUREMENTS.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(HERE / "noise.svg", metadata={"Date": None})


def load(name: str) -> dict:
    """Returns the linear, cross-fitted rows of held-out images, and their ceiling."""
    result = read(f"{name}_ablations")
    rows = [
        row
        for row in result["rows"]
        if (row["queries"], row["transform"]) == ("validation", "linear")
        and row["damping_rule"] in (None, "cross-fitted")
        and row["measurement"] in MEASUREMENTS
    ]
    return {"rows": rows, "ceiling": result["ceiling"]["validation"]}


def noises(axes: Axes, result: dict, title: str) -> None:
    """Draws the LDS of every kernel under every noise, a mark for each noise seed."""
    ceiling(axes, result)
    rows = [row for row in result["rows"] if row["name"] == "noise"]
    for row in rows:
        kernel = list(KERNELS).index(row["kernel"]) - 1.5
        measurement = 0.055 if row["measurement"] == "loss" else -0.055
        seed = 0.02 * row["seed"]
        x = NOISES.index(row["noise"]) + 0.21 * kernel + measurement + seed
        estimate(axes, x, row)
    axes.set_xticks(range(len(NOISES)), NOISES)
    axes.set(title=title, xlabel="noise of the gradients")


def draws(axes: Axes, result: dict) -> None:
    """Draws the LDS against the number of draws at one timestep."""
    ceiling(axes, result)
    rows = [row for row in result["rows"] if row["name"] == "draws"]
    for noise, style in (("common", "-"), ("independent", "--")):
        best = max((r for r in rows if r["noise"] == noise), key=lambda r: r["lds"])
        axes.annotate(
            f"{noise} noise",
            (best["draws"], best["high"]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
        )
        for kernel in ("apart", "averaged"):
            for measurement in MEASUREMENTS:
                key = {"noise": noise, "kernel": kernel, "measurement": measurement}
                curve = [row for row in rows if key.items() <= row.items()]
                curve.sort(key=lambda row: row["draws"])
                x = [row["draws"] for row in curve]
                y = [row["lds"] for row in curve]
                colour = KERNELS[kernel][1]
                axes.plot(x, y, linestyle=style, color=colour, linewidth=1)
                for row in curve:
                    estimate(axes, row["draws"], row)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["draws"] for row in rows})
    axes.set_xticks(ticks, ticks)
    (t,) = {row["timesteps"][0] for row in rows}
    axes.set(title="digits 8×8, more draws", xlabel=f"noise draws at t = {t}")


def ceiling(axes: Axes, result: dict) -> None:
    """Draws the noise ceiling as a band."""
    band = result["ceiling"]
    axes.axhspan(band["low"], band["high"], color="#cccccc", alpha=0.5, linewidth=0)
    axes.annotate(
        "noise ceiling",
        (0.98, band["value"]),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="center",
        fontsize=9,
    )


def estimate(axes: Axes, x: float, row: dict) -> None:
    """Draws an LDS with its interval."""
    colour = KERNELS[row["kernel"]][1]
    axes.vlines(x, row["low"], row["high"], color=colour, linewidth=1)
    (line,) = axes.plot(x, row["lds"])
    marker(line, colour, MEASUREMENTS[row["measurement"]][1])


def marker(line: plt.Line2D, colour: str, filled: bool) -> plt.Line2D:
    """Returns the line with a round mark, filled for D-TRAK and empty for TRAK."""
    line.set(marker="o", markersize=5, color=colour)
    line.set_markerfacecolor(colour if filled else "white")
    return line


if __name__ == "__main__":
    main()
