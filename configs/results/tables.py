"""Writes the tables of the documents from the results that they show.

    python configs/results/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of
`TABLES`. A test makes every table again and compares, so that no printed figure can
differ from the committed result.
"""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import ablation_tables
import lds_tables
import removal_tables
from cells import Lines

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDERS = (
    ".",
    "configs/results",
    "configs/results/plans",
    "launch",
    "tests/benchmarks",
)
DOCUMENTS = [ROOT / folder / "README.md" for folder in FOLDERS]
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[], Lines]] = {
    **lds_tables.TABLES,
    **ablation_tables.TABLES,
    **removal_tables.TABLES,
    **runpy.run_path(str(HERE / "plans" / "table.py"))["TABLES"],
    **runpy.run_path(str(ROOT / "tests" / "benchmarks" / "table.py"))["TABLES"],
}


def main() -> None:
    """Rewrites every document."""
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))


def filled(text: str) -> str:
    """Returns a document with its tables made anew."""

    def fill(found: re.Match) -> str:
        before, name, after = found.groups()
        return before + markdown(TABLES[name]()) + after

    return TABLE.sub(fill, text)


def markdown(lines: Lines) -> str:
    """Returns a table of Markdown."""
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


if __name__ == "__main__":
    main()
