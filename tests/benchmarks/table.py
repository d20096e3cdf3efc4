"""Makes the table of speed; `python configs/results/tables.py` writes it."""

import json
from pathlib import Path

HERE = Path(__file__).parent
GOALS = {"at least": "≥", "at most": "≤"}


def speed() -> list[list[str]]:
    """A line for each comparison: ours, theirs, the ratio and the goal."""
    lines = [["comparison", "ours", "against", "result", "goal"]]
    for comparison in json.loads((HERE / "results.json").read_text()).values():
        for row in comparison["rows"]:
            bound, goal = row["goal"] or ("at least", None)
            low, value, high = (
                figure(row["ratio"][key]) for key in ("low", "median", "high")
            )
            unit = "times as fast" if bound == "at least" else "of its time"
            text = f"{value} {unit}"
            if (low, high) != (value, value):
                text += f" ({low} to {high})"
            wanted = "" if goal is None else f"{GOALS[bound]} {goal:g}"
            if row["met"] is False:
                wanted += ": **missed**"
            lines.append([row["name"], row["ours"], row["theirs"], text, wanted])
    return lines


def figure(value: float) -> str:
    """Returns a ratio with about three digits."""
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"


TABLES = {"speed": speed}
