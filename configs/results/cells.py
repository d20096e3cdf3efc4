"""What all tables share: how a result is read, a row found and a figure written."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent

Lines = Sequence[Sequence[str]]
"""A table: its first line has the heads of the columns."""

DATA = ("digits", "mnist")
SETS = ("validation", "generated")


def read(name: str) -> dict:
    """Returns a result of this folder."""
    return json.loads((HERE / f"{name}.json").read_text())


def number(value: float) -> str:
    """Returns a figure with three significant digits or three decimals, as .605."""
    text = f"{value:.3f}" if abs(value) < 0.9995 else f"{value:.2f}"
    return re.sub(r"^(-?)0\.", r"\1.", text).replace("-.000", ".000").replace("-", "−")


def interval(
    row: dict, value: str = "lds", low: str = "low", high: str = "high"
) -> str:
    """Returns a figure with its interval, as .605 [.581, .628]."""
    return "{} [{}, {}]".format(*(number(row[key]) for key in (value, low, high)))


def pick(rows: list[dict], **wanted) -> dict:
    """Returns the one row with these fields."""
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row
