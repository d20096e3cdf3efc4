"""The rows of a CSV, or an error that names the line."""

import codecs
import csv
import io
from collections.abc import Sequence

from etils import epath


def read_table(
    path: epath.Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> list[tuple[str, dict[str, str]]]:
    """Returns (where it is, {column: cell}) of every row; no cell is empty.

    Cells are separated by commas, semicolons or tabs, whichever the header shows.

    Args:
      required: columns that must be there.
      optional: columns of which one must be there, unless there are groups, none is
        optional, or there are no columns but the required ones.
      groups: columns that must be there since `data.groups` names them.

    Raises:
      ValueError: the file is not a CSV in Unicode, has no rows, or lacks a column or
        cell; or a cell goes over several lines, as if a quote were missing.
    """
    text = _read_text(path)
    separator = _separator(text, required)
    # A quote that is never closed would swallow the rows below if not for `strict`.
    reader = csv.DictReader(
        io.StringIO(text, newline=None),
        delimiter=separator,
        strict=True,
        skipinitialspace=separator != "\t",
    )
    rows = []
    try:
        header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        chosen = [name for name in optional if name in header]
        columns = dict.fromkeys([*required, *chosen, *groups])
        wrong = any(header.count(name) != 1 for name in columns)
        more = len(header) > len(required)
        if wrong or (optional and more and not chosen and not groups):
            needed = [*required, *(f"{name} (data.groups)" for name in groups)]
            either = f", and {' or '.join(optional)}" if optional else ""
            raise ValueError(
                f"{path} has the columns {', '.join(header) or '(none)'}; it must have "
                f"{', '.join(needed)}{either}, each once."
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            surplus = [cell for cell in row.pop(None, ()) if cell.strip()]
            if surplus:
                raise ValueError(
                    f"{where}: more cells than the header has; quote text with commas."
                )
            if not any((cell or "").strip() for cell in row.values()):
                continue
            cells = {column: (row[column] or "").strip() for column in columns}
            for column, cell in cells.items():
                if not cell:
                    raise ValueError(f"{where}: `{column}` is empty.")
                if "\n" in cell:
                    raise ValueError(
                        f"{where}: `{column}` goes over several lines, from "
                        f"{cell.splitlines()[0]!r} on; is a quote not closed?"
                    )
            rows.append((where, cells))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num + 1}: {error}; is a quote not closed?"
        ) from error
    if not rows:
        raise ValueError(f"{path} lists no files.")
    return rows


def _read_text(path: epath.Path) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 with its mark."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text in UTF-8: {error}; save it as CSV UTF-8."
        ) from error


def _separator(text: str, required: Sequence[str]) -> str:
    """Returns what separates a header in which the required columns are; else a comma."""
    header = text.partition("\n")[0].rstrip("\r")
    for separator in ",;\t":
        names = next(csv.reader([header], delimiter=separator), ())
        if set(required) <= {name.strip() for name in names}:
            return separator
    return ","
