"""Ablations: what is each choice worth?"""

import json
from collections.abc import Mapping, Sequence
from functools import partial

from markupsafe import Markup

from dtrak_jax.report.charts import line_plot
from dtrak_jax.report.text import grouped
from dtrak_jax.report.trust import lds_chart

SETTINGS = (
    *("queries", "measurement", "noise", "kernel", "timesteps", "draws"),
    *("projection", "dim", "checkpoint", "seed", "transform", "damping_rule"),
)
"""The settings that rows may differ in."""

CHOSEN = ("seed", "transform", "damping_rule")
"""Settings that a figure does not compare."""

AXES = {
    "draws": ("noise draws", True),
    "dim": ("dimensions of the projection", True),
    "checkpoint": ("training step", False),
}
"""Settings that may be an axis: its label, and whether it is logarithmic."""

TITLES = {"transform": "scores", "damping_rule": "rule for λ"}
"""The words for settings that are not called by their names."""

LISTED_TIMESTEPS = 5
"""With more of them, only their number and range are written out."""


def ablations(result: Mapping) -> list[dict]:
    """Returns the figures and the rows of every study in ablations.json."""
    studies = grouped(result["rows"], lambda row: row["name"])
    ceilings = result.get("ceiling") or {}
    return [_study(name, rows, ceilings) for name, rows in studies.items()]


def _study(name: str, rows: list[Mapping], ceilings: Mapping) -> dict:
    """Returns what varies in a study, what does not, and its figures."""
    varying = _varying(rows)
    return {
        "name": name,
        "constant": [
            f"{TITLES.get(key, key)} {_words(rows[0][key])}"
            for key in SETTINGS
            if key not in varying and rows[0].get(key) is not None
        ],
        "figures": _figures(name, rows, ceilings),
        "head": [TITLES.get(key, key) for key in varying],
        "rows": [([_words(row.get(key)) for key in varying], row) for row in rows],
    }


def _words(value: object) -> str:
    """Returns the value of a setting in words."""
    if isinstance(value, list):
        if len(value) > LISTED_TIMESTEPS:
            return f"{min(value)} to {max(value)} ({len(value)})"
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _varying(rows: Sequence[Mapping]) -> list[str]:
    """Returns the settings that rows differ in."""
    return [
        key for key in SETTINGS if len({json.dumps(row.get(key)) for row in rows}) > 1
    ]


def _figures(name: str, rows: Sequence[Mapping], ceilings: Mapping) -> list[tuple]:
    """Returns (title, chart) for each set of queries, and for each of two measurements."""
    rows = _fair(rows)
    two = len({row["measurement"] for row in rows}) == 2
    panel_keys = ("queries", "measurement") if two else ("queries",)
    keys = [key for key in _varying(rows) if key not in (*CHOSEN, *panel_keys)]
    axes = [key for key in keys if key in AXES and len({r[key] for r in rows}) > 2]

    def title(row: Mapping) -> str:
        measurement = f", measurement {row['measurement']}" if two else ""
        return f"{row['queries']} images{measurement}"

    figures = []
    for panel, panel_rows in grouped(rows, title).items():
        alt = f"LDS, study {name}: {panel}"
        if len(axes) == 1:
            chart = _lines(axes[0], keys, panel_rows, alt)
        else:
            ceiling = ceilings.get(panel_rows[0]["queries"])
            label = partial(_label, keys)
            chart = lds_chart(panel_rows, label, alt, ceiling)
        figures.append((panel, chart))
    return figures


def _fair(rows: Sequence[Mapping]) -> list[Mapping]:
    """Returns linear rows, or exact ones of coverage, with a cross-fitted λ or none; without
    these, those with their default λ."""
    kind = "exact" if any(r["transform"] == "exact" for r in rows) else "linear"
    rows = [row for row in rows if row["transform"] == kind]
    default = "effective" if kind == "exact" else "label-free"
    fair = [row for row in rows if row["damping_rule"] in (None, "cross-fitted")]
    return fair or [row for row in rows if row["damping_rule"] == default]


def _lines(axis: str, keys: list[str], rows: list[Mapping], alt: str) -> Markup:
    """Draws LDS along an axis, a line for each combination of the other settings."""
    seeds = {row["seed"] for row in rows}
    keys = [key for key in keys if key != axis] + ["seed"] * (len(seeds) > 1)
    rows = sorted(rows, key=lambda row: row[axis])
    lines = {
        label or "LDS": [
            [row[key] for key in (axis, "lds", "low", "high")] for row in line
        ]
        for label, line in grouped(rows, partial(_label, keys)).items()
    }
    title, log = AXES[axis]
    ticks = sorted({row[axis] for row in rows}) if log else ()
    return line_plot(lines, (title, "LDS"), alt, log=log, ticks=ticks)


def _label(keys: Sequence[str], row: Mapping) -> str:
    """Returns the settings that tell a row apart; a number with the setting's name."""
    names = {key: f"{key} " for key in keys if isinstance(row[key], int)}
    names["timesteps"] = "t = "
    return " · ".join(f"{names.get(key, '')}{_words(row[key])}" for key in keys)
