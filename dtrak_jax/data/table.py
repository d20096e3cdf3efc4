"""The rows of a CSV, or an error that names the line."""

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

    Args:
      required: columns that must be there.
      optional: columns of which one must be there, unless there are groups or none is
        optional.
      groups: columns that must be there since `data.groups` names them.

    Raises:
      ValueError: the file is not a CSV in UTF-8, has no rows, or lacks a column or cell.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    # A quote that is never closed would swallow the rows below if not for `strict`.
    reader = csv.DictReader(io.StringIO(text, newline=None), strict=True)
    rows = []
    try:
        header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        chosen = [name for name in optional if name in header]
        columns = dict.fromkeys([*required, *chosen, *groups])
        wrong = any(header.count(name) != 1 for name in columns)
        if wrong or (optional and not chosen and not groups):
            needed = [*required, *(f"{name} (data.groups)" for name in groups)]
            either = f", and {' or '.join(optional)}" if optional else ""
            raise ValueError(
                f"{path} has the columns {', '.join(header) or '(none)'}; it must have "
                f"{', '.join(needed)}{either}, each once."
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f"{where}: more cells than the header has; quote text with commas."
                )
            cells = {column: (row[column] or "").strip() for column in columns}
            for column, cell in cells.items():
                if not cell:
                    raise ValueError(f"{where}: `{column}` is empty.")
            rows.append((where, cells))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num + 1}: {error}; is a quote not closed?"
        ) from error
    if not rows:
        raise ValueError(f"{path} lists no files.")
    return rows
