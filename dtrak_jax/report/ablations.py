"""The section of the page about ablations: what is each choice worth?"""

import json
from collections.abc import Mapping, Sequence
from html import escape

from dtrak_jax.report.charts import Line, Mark, dots, known, lines
from dtrak_jax.report.figures import captioned
from dtrak_jax.report.text import between, capitalized, damping, number, table
from dtrak_jax.report.trust import look

SETTINGS = (
    "queries",
    "measurement",
    "noise",
    "kernel",
    "timesteps",
    "draws",
    "projection",
    "dim",
    "checkpoint",
    "seed",
    "transform",
    "damping_rule",
)
"""What rows may differ in."""

CHOSEN = ("seed", "transform", "damping_rule")
"""What a figure does not compare."""

AXES = {
    "draws": ("noise draws", True),
    "dim": ("dimensions of the projection", True),
    "checkpoint": ("training step", False),
}
"""Settings that may be an axis: what it is called, and whether it is logarithmic."""

LISTED_TIMESTEPS = 5
"""With more of them, only their number and range are written out."""


def ablations_section(result: Mapping) -> str:
    """A figure and a table for every study.

    Args:
      result: what ablations.json holds.
    """
    names = dict.fromkeys(row["name"] for row in result["rows"])
    parts = "".join(
        _study(
            name,
            [row for row in result["rows"] if row["name"] == name],
            result.get("ceiling") or {},
        )
        for name in names
    )
    return (
        '<section id="ablations"><h2>Ablations</h2><p>The LDS of scores that were made '
        "otherwise. Figures show linear scores whose λ is cross-fitted, so that no "
        "choice is favoured by the λ of another; the tables have every row. An oracle "
        "chose λ on the very subsets that it is scored on and is too good.</p>"
        '<p class="note">Kernels: <b>apart</b>, one for each timestep and noise draw, '
        "their scores added; <b>pooled</b>, one for all of them together; "
        "<b>averaged</b>, one of the averaged gradients; <b>cosine</b>, none, a mean of "
        "cosines.</p>"
        f"{parts}</section>"
    )


def _study(name: str, rows: list[dict], ceilings: Mapping) -> str:
    varying = _varying(rows)
    constant = "; ".join(
        f"{_title(key)} {_value(key, rows[0][key])}"
        for key in SETTINGS
        if key not in varying and rows[0].get(key) is not None
    )
    cells = (
        (
            *(_value(key, row.get(key)) for key in varying),
            damping(row["damping"]),
            number(row["lds"]),
            between(row["low"], row["high"]),
        )
        for row in rows
    )
    head = (*map(_title, varying), "λ", "LDS", "95% interval")
    note = f'<p class="note">All rows: {escape(constant)}.</p>' if constant else ""
    return (
        f"<h3>{escape(name)}</h3>{note}"
        f'<div class="plots">{"".join(_figures(name, rows, ceilings))}</div>'
        f"<details><summary>All {len(rows):,} rows</summary>"
        f"{table(f'LDS, study {name}', head, cells)}</details>"
    )


def _varying(rows: Sequence[Mapping]) -> list[str]:
    """The settings that rows differ in."""
    return [
        key for key in SETTINGS if len({json.dumps(row.get(key)) for row in rows}) > 1
    ]


def _title(key: str) -> str:
    return {"damping_rule": "rule for λ", "transform": "scores"}.get(key, key)


def _value(key: str, value: object) -> str:
    """A setting in words."""
    if value is None:
        return "–"
    if key == "timesteps" and isinstance(value, list):
        if len(value) > LISTED_TIMESTEPS:
            return f"{min(value)} to {max(value)} ({len(value)})"
        return ", ".join(map(str, value))
    return str(value)


def _figures(name: str, rows: list[dict], ceilings: Mapping) -> list[str]:
    """A figure for each set of queries, and for each measurement if there are two."""
    fair = _fair(rows)
    varying = [key for key in _varying(fair) if key not in CHOSEN]
    panel_keys = ["queries"]
    if len({row["measurement"] for row in fair}) == 2:
        panel_keys.append("measurement")
    panels: dict[tuple, list[dict]] = {}
    for row in fair:
        panels.setdefault(tuple(row[key] for key in panel_keys), []).append(row)
    compared = [key for key in varying if key not in panel_keys]
    along = _along(fair, compared)
    figures = []
    for (queries, *rest), own in panels.items():
        title = ", ".join([f"{queries} images", *(f"measurement {m}" for m in rest)])
        alt = f"LDS, study {name}: {title}"
        if along:
            svg = _over(along, [key for key in compared if key != along], own, alt)
        else:
            svg = _rows(compared, own, ceilings.get(queries), alt)
        figures.append(captioned(svg, escape(capitalized(title)) + "."))
    return figures


def _fair(rows: list[dict]) -> list[dict]:
    """Linear rows with a cross-fitted λ, or none; with a label-free one without them."""
    linear = [row for row in rows if row["transform"] == "linear"]
    fair = [row for row in linear if row["damping_rule"] in (None, "cross-fitted")]
    return fair or [row for row in linear if row["damping_rule"] == "label-free"]


def _along(rows: list[dict], compared: list[str]) -> str | None:
    """The one setting of three or more numbers, if there is just one."""
    axes = [key for key in compared if key in AXES and len({r[key] for r in rows}) > 2]
    return axes[0] if len(axes) == 1 else None


def _label(keys: Sequence[str], row: Mapping) -> str:
    """The settings that tell a row apart; a bare number would not say what it is."""
    parts = []
    for key in keys:
        value = _value(key, row[key])
        if key == "timesteps":
            value = f"t = {value}"
        elif isinstance(row[key], int):
            value = f"{key} {value}"
        parts.append(value)
    return " · ".join(parts)


def _over(along: str, keys: list[str], rows: list[dict], alt: str) -> str:
    """LDS against a numeric setting, a line for each combination of the others."""
    keys = keys + ["seed"] * (len({row["seed"] for row in rows}) > 1)
    series: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row[along]):
        series.setdefault(_label(keys, row), []).append(row)
    axis, log = AXES[along]
    ticks = sorted({row[along] for row in rows})
    return lines(
        {
            label or "LDS": Line(
                *(
                    [known(row[key]) for row in own]
                    for key in (along, "lds", "low", "high")
                )
            )
            for label, own in series.items()
        },
        (axis, "LDS"),
        alt,
        log=log,
        ticks=ticks if log else (),
    )


def _rows(keys: list[str], rows: list[dict], ceiling: Mapping | None, alt: str) -> str:
    """LDS of every combination of settings, a mark for each seed."""
    marks: dict[str, list[Mark]] = {}
    for row in rows:
        values = (known(row[key]) for key in ("lds", "low", "high"))
        label = _label(keys, row) or "all"
        marks.setdefault(label, []).append(Mark(look(row["damping_rule"]), *values))
    band = None
    if ceiling:
        ends = (known(ceiling[key]) for key in ("value", "low", "high"))
        band = ("noise ceiling", *ends)
    return dots(marks, "LDS", alt, band=band)
