"""Charts: estimates with their intervals, training, scores and spectra.

A number that is not known, null in JSON, is None or NaN. No two charts of a page may
have the same `alt`, which says what a chart shows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.report import figures
from dtrak_jax.report.figures import FAINT, INK, OPPOSE, SUPPORT
from dtrak_jax.report.text import method_name

DASHES = ("-", "--", ":", "-.")

MARKERS = "osD^vPX*"

NAMED_KERNELS = 8
"""The legend of a spectrum names at most this many kernels."""


class Style(NamedTuple):
    """The look of points of one kind, and their name in the legend."""

    label: str
    marker: str
    colour: str
    face: str = "none"


def interval_plot(
    rows: Mapping[str, Sequence[tuple]],
    axis: str,
    alt: str,
    *,
    ceiling: Mapping | None = None,
    zero: bool = True,
) -> Markup:
    """Draws a row for each name, from the top, with its points and their intervals.

    Points are (style, value, low, high). The noise ceiling, {"value", "low", "high"}, is
    behind all rows, and so is a line at 0 if `zero` is set.
    """
    styles = list(dict.fromkeys(p[0] for points in rows.values() for p in points))

    def draw(axes: Axes) -> None:
        if ceiling:
            ends = ceiling["low"], ceiling["high"]
            band = {"alpha": 0.3, "linewidth": 0, "label": "noise ceiling"}
            axes.axvspan(*ends, color=FAINT, **band)
            axes.axvline(ceiling["value"], color=FAINT, linewidth=1)
        if zero:
            axes.axvline(0, color=INK, linewidth=0.6)
        for row, points in enumerate(rows.values()):
            # Side by side, or equal values would hide one another.
            step = 0.7 / max(3, len(points))
            for i, (style, *values) in enumerate(points):
                y = row + step * (i - (len(points) - 1) / 2)
                value, low, high = np.array(values, float)
                axes.plot([low, high], [y, y], "-", color=style.colour)
                axes.plot(value, y, **_marker(style))
        for style in styles:
            axes.plot([], [], label=_plain(style.label), **_marker(style))
        axes.set_yticks(range(len(rows)), list(map(_plain, rows)))
        axes.set(xlabel=axis, ylim=(len(rows) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.figure.legend(**BELOW)

    return figures.inline(draw, alt, 1.1 + 0.3 * len(rows) + 0.1 * len(styles))


def line_plot(
    lines: Mapping[str, Sequence[tuple]],
    axes_names: tuple[str, str],
    alt: str,
    *,
    log: bool = True,
    ticks: Sequence[float] = (),
    vertical: Mapping[float, str] | None = None,
) -> Markup:
    """Draws a line for each name through its points (x, y) or (x, y, low, high).

    `log` makes x logarithmic, `ticks` are values of x to label instead of round ones,
    and `vertical` {x: label} are vertical lines.
    """
    vertical = vertical or {}
    colours = [SUPPORT, OPPOSE, *_colours(len(lines) - 2)]
    entries = len(lines) + len(vertical)

    def draw(axes: Axes) -> None:
        for i, (name, points) in enumerate(lines.items()):
            x, y, *ends = np.array(points, float).T
            style = {"color": colours[i], "linestyle": DASHES[i % len(DASHES)]}
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}
            axes.plot(x, y, label=_plain(name), **style)
            if ends:
                axes.vlines(x, *ends, color=colours[i], linewidth=0.8)
        for x, label in vertical.items():
            axes.axvline(x, color=INK, linewidth=0.8, linestyle=":", label=label)
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        if log:
            axes.set_xscale("log")
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        if entries > 1:
            axes.figure.legend(**BELOW)

    return figures.inline(draw, alt, 2.8 + 0.18 * math.ceil(entries / 2))


def training_curve(metrics: Sequence[Mapping]) -> Markup:
    """Draws the loss over the steps, with the learning rate faintly behind it."""
    steps, losses, rates = (
        [row[key] for row in metrics] for key in ("step", "loss", "learning_rate")
    )

    def draw(axes: Axes) -> None:
        rate = axes.twinx()
        rate.plot(steps, rates, color=FAINT, linewidth=1, linestyle="--")
        rate.set_ylim(0)
        rate.set_ylabel("learning rate (dashed)")
        rate.ticklabel_format(style="sci", scilimits=(-2, 3), axis="y")
        rate.spines["right"].set_visible(True)
        axes.plot(steps, losses, "." if len(steps) == 1 else "-", color=SUPPORT)
        axes.set(xlabel="step", ylabel="mean loss since the last point", yscale="log")
        axes.set_zorder(rate.get_zorder() + 1)
        axes.set_facecolor("none")

    first, last = (f"{losses[i]:.3g} at step {steps[i]}" for i in (0, -1))
    return figures.inline(draw, f"Training loss, from {first} to {last}")


def score_histogram(scores: Scores, queries: str) -> Markup:
    """Draws how often each score occurs, on a logarithmic scale; bins meet at 0."""
    values = scores.scores
    largest = float(np.abs(values).max()) or 1.0
    counts, edges = np.histogram(values, np.linspace(-largest, largest, 81))

    def draw(axes: Axes) -> None:
        # From 1/2, so that a bin with one score is seen on the logarithmic scale.
        bars = {"fill": True, "baseline": 0.5}
        axes.stairs(counts[:40], edges[:41], color=OPPOSE, **bars)
        axes.stairs(counts[40:], edges[40:], color=SUPPORT, **bars)
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.set(xlabel="score", ylabel="pairs", yscale="log", ylim=(0.5, None))

    alt = (
        f"Histogram of the scores of {method_name(scores.method)}, {queries} images, from "
        f"{values.min():.3g} to {values.max():.3g}, {np.mean(values > 0):.0%} of them "
        "positive"
    )
    return figures.inline(draw, alt)


def spectrum(scores: Scores, kernels: Sequence[str]) -> Markup:
    """Draws eigenvalues by rank, a line for each kernel, with a dot where its λ is."""
    eigenvalues, lambdas = scores.eigenvalues, scores.lambdas
    # Spread over the kernels, first and last among them.
    named = np.linspace(0, len(kernels) - 1, min(NAMED_KERNELS, len(kernels)))
    labels = {int(i): kernels[i] for i in np.round(named).astype(int)}
    colours = _colours(len(kernels))

    def draw(axes: Axes) -> None:
        for i, (values, value) in enumerate(zip(eigenvalues, lambdas, strict=True)):
            shown = np.where(values > 0, values, np.nan)[::-1]
            ranks = np.arange(1, len(values) + 1)
            style = {"color": colours[i], "linestyle": DASHES[i % len(DASHES)]}
            axes.plot(ranks, shown, label=labels.get(i), **style)
            crossing = max(1, int(np.sum(values > value)))
            axes.plot(crossing, value, "o", color=colours[i], markersize=5)
        axes.plot([], [], "o", color=INK, markersize=5, label="λ")
        axes.set(xlabel="rank", ylabel="eigenvalue", xscale="log", yscale="log")
        # What is below is rounding errors of float32 features.
        floor = np.finfo(np.float32).eps * eigenvalues[:, -1].min()
        axes.set_ylim(min(floor, lambdas.min() / 2), 2 * eigenvalues.max())
        axes.legend(loc="lower left")

    method = method_name(scores.method)
    return figures.inline(draw, f"Eigenvalues of the kernels of {method}, by rank")


BELOW = {"loc": "outside lower left", "ncols": 2}
"""The place of a legend below the axes, where it hides no data."""


def _colours(count: int) -> list[str]:
    """Returns colours that can be seen on white and on black."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.8, max(0, count)))
    return [matplotlib.colors.to_hex(shade) for shade in shades]


def _marker(style: Style) -> dict:
    """Returns the options with which matplotlib draws a point in a style."""
    shape = {"linestyle": "none", "marker": style.marker, "markersize": 5.5}
    return shape | {"color": style.colour, "markerfacecolor": style.face}


def _plain(text: str) -> str:
    """Returns text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
