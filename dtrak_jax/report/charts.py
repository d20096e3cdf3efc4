"""Charts of estimates: values with their intervals, in rows or along an axis."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes

from dtrak_jax.report import figures
from dtrak_jax.report.figures import FAINT, INK, OPPOSE, SUPPORT

ROW_HEIGHT = 0.3
"""Inches."""

DASHES = ("-", "--", ":", "-.")

MARKERS = "osD^vPX*"


class Look(NamedTuple):
    """How marks of one kind look, and what the legend calls them."""

    label: str
    marker: str
    colour: str
    filled: bool = False


class Mark(NamedTuple):
    """A value with its interval; what is not known is NaN."""

    look: Look
    value: float
    low: float
    high: float


class Line(NamedTuple):
    """Values along an axis, with their intervals if there are any."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def known(value: float | None) -> float:
    """A number of a JSON file, where one that is not known is null."""
    return math.nan if value is None else value


def dots(
    rows: Mapping[str, Sequence[Mark]],
    axis: str,
    alt: str,
    *,
    band: tuple[str, float, float, float] | None = None,
    zero: bool = True,
) -> str:
    """A row for each name, from above, with its marks and their intervals.

    Args:
      rows: {name: marks}.
      axis: what the values are.
      alt: what the figure shows; no two in a page may have the same.
      band: (label, value, low, high) of what all rows are compared with.
      zero: whether to draw a line at 0.
    """
    looks = list(dict.fromkeys(mark.look for marks in rows.values() for mark in marks))

    def draw(axes: Axes) -> None:
        if band:
            label, value, low, high = band
            axes.axvspan(low, high, color=FAINT, alpha=0.3, linewidth=0, label=label)
            axes.axvline(value, color=FAINT, linewidth=1)
        if zero:
            axes.axvline(0, color=INK, linewidth=0.6)
        for row, marks in enumerate(rows.values()):
            # Side by side, or equal values would hide one another.
            step = 0.7 / max(3, len(marks))
            for i, mark in enumerate(marks):
                y = row + step * (i - (len(marks) - 1) / 2)
                colour = mark.look.colour
                axes.plot([mark.low, mark.high], [y, y], "-", color=colour)
                axes.plot(mark.value, y, **_style(mark.look))
        for look in looks:
            axes.plot([], [], label=_plain(look.label), **_style(look))
        axes.set_yticks(range(len(rows)), list(map(_plain, rows)))
        axes.set(xlabel=axis, ylim=(len(rows) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        _legend(axes)

    return figures.inline(draw, alt, 1.1 + ROW_HEIGHT * len(rows) + 0.1 * len(looks))


def lines(
    series: Mapping[str, Line],
    axes_names: tuple[str, str],
    alt: str,
    *,
    log: bool = True,
    ticks: Sequence[float] = (),
    vertical: Mapping[float, str] | None = None,
) -> str:
    """Values along an axis, one line for each name.

    Args:
      series: {name: line}.
      axes_names: what x and y are.
      alt: what the figure shows; no two in a page may have the same.
      log: whether x is logarithmic.
      ticks: x values to label, instead of round ones.
      vertical: {x: label} of vertical lines.
    """
    entries = len(series) + len(vertical or {})
    colours = [SUPPORT, OPPOSE, *_colours(max(0, len(series) - 2))]

    def draw(axes: Axes) -> None:
        for i, (name, line) in enumerate(series.items()):
            style = {"color": colours[i], "linestyle": DASHES[i % len(DASHES)]}
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}
            axes.plot(line.x, line.y, label=_plain(name), **style)
            if line.low:
                axes.vlines(
                    line.x, line.low, line.high, color=colours[i], linewidth=0.8
                )
        for x, label in (vertical or {}).items():
            axes.axvline(x, color=INK, linewidth=0.8, linestyle=":", label=label)
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        if log:
            axes.set_xscale("log")
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        if entries > 1:
            _legend(axes)

    return figures.inline(draw, alt, 2.8 + 0.18 * math.ceil(entries / 2))


def _colours(count: int) -> list[str]:
    """Colours that can be seen on white and on black."""
    shades = matplotlib.colormaps["viridis"]
    return [
        matplotlib.colors.to_hex(shades(0.3 + 0.5 * i / max(1, count - 1)))
        for i in range(count)
    ]


def _style(look: Look) -> dict:
    return {
        "color": look.colour,
        "linestyle": "none",
        "marker": look.marker,
        "markerfacecolor": look.colour if look.filled else "none",
        "markersize": 5.5,
    }


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _legend(axes: Axes) -> None:
    """Below the axes, where it hides no data."""
    axes.figure.legend(loc="outside lower left", ncols=2)
