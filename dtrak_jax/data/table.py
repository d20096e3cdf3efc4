"""The rows of a CSV, or an error that names the line."""

import codecs
import csv
import io
from collections.abc import Sequence
from pathlib import PurePath

from etils import epath

from dtrak_jax.checks import alike

UNKNOWN = 'every image needs a group, such as "unknown"'
"""The remedy where a cell of a column of groups is empty."""


def read_table(
    path: epath.Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> tuple[list[tuple[str, dict[str, str]]], str]:
    """Returns (where it is, {column: cell}) of every row, and what columns are not read.

    No cell is empty. The columns that are not read are a sentence, or "" if there are
    none.

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
    text, above = _read_text(path)
    separator = _separator(text, required)
    # A quote that is never closed would swallow the rows below if not for `strict`.
    reader = csv.DictReader(
        io.StringIO(text),
        delimiter=separator,
        strict=True,
        skipinitialspace=separator != "\t",
    )
    rows = []
    try:
        header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        columns = _columns(path, header, required, optional, groups)
        for row in reader:
            where = f"{path}, line {above + reader.line_num}"
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
                    remedy = f"; {UNKNOWN}" if column in groups else ""
                    raise ValueError(f"{where}: `{column}` is empty{remedy}.")
            _check_lines(where, row, cells)
            rows.append((where, cells))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {above + reader.line_num + 1}: {error}; is a quote not closed?"
        ) from error
    if not rows:
        raise ValueError(f"{path} lists no files.")
    return rows, _unread(path, header, columns, optional)


def _columns(
    path: epath.Path,
    header: Sequence[str],
    required: Sequence[str],
    optional: Sequence[str],
    groups: Sequence[str],
) -> list[str]:
    """Returns the columns that are read, or raises a ValueError if the header lacks one."""
    chosen = [name for name in optional if name in header]
    columns = list(dict.fromkeys([*required, *chosen, *groups]))
    wrong = any(header.count(name) != 1 for name in columns)
    more = len(header) > len(required)
    if wrong or (optional and more and not chosen and not groups):
        needed = [*required, *(f"{name} (data.groups)" for name in groups)]
        either = f", and {' or '.join(optional)}" if optional else ""
        missing = [*columns, *(() if chosen else optional)]
        hints = [_hint(name, header, groups) for name in missing if name not in header]
        raise ValueError(
            f"{path} has the columns {', '.join(header) or '(none)'}; it must have "
            f"{', '.join(needed)}{either}, each once.{''.join(hints)}"
        )
    return columns


def _hint(name: str, header: Sequence[str], groups: Sequence[str]) -> str:
    """Returns a question about a column that a header lacks, if it has one like it: a name
    of groups is the user's own in both places, of others the header's is the wrong one."""
    near = alike(name, header)
    if not near:
        return ""
    if name in groups:
        return f" Did you mean {near} by {name} (data.groups)?"
    return f" Should the column {near} be called {name}?"


def _unread(
    path: epath.Path,
    header: Sequence[str],
    columns: Sequence[str],
    optional: Sequence[str],
) -> str:
    """Returns a sentence on the columns that are not read; "" if there are none."""
    missing, words = [name for name in optional if name not in header], []
    for name in header:
        if name not in columns:
            meant = alike(name, missing)
            words.append(repr(name) + (f" (did you mean {meant}?)" if meant else ""))
    return f"{path}: columns that are not read: {', '.join(words)}." if words else ""


def _check_lines(where: str, row: dict[str, str], cells: dict[str, str]) -> None:
    """Raises a ValueError if a cell holds rows below, as if a quote were missing.

    A column that is read has no text of several lines, and in others none but the first
    may have the suffix of the file that the row is of.
    """
    suffix = PurePath(next(iter(cells.values()))).suffix
    for column, cell in row.items():
        first, _, below = (cell or "").rstrip().partition("\n")
        if below and (column in cells or suffix and suffix in below):
            raise ValueError(
                f"{where}: `{column}` goes over several lines, from {first!r} on; is a "
                "quote not closed?"
            )


def _read_text(path: epath.Path) -> tuple[str, int]:
    """Returns the text of a file from its header on, and the number of lines above it.

    The file is in UTF-8, or in UTF-16 with its mark. Above the header may be empty
    lines and, as Excel reads them, "sep=;".
    """
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text in UTF-8: {error}; save it as CSV UTF-8."
        ) from error
    text, above = text.replace("\r\n", "\n").replace("\r", "\n"), 0
    while text:
        first, _, rest = text.partition("\n")
        if first.strip() and not first.startswith("sep="):
            break
        text, above = rest, above + 1
    return text, above


def _separator(text: str, required: Sequence[str]) -> str:
    """Returns what separates a header in which the required columns are; else a comma."""
    header = text.partition("\n")[0]
    for separator in ",;\t":
        names = next(csv.reader([header], delimiter=separator), ())
        if set(required) <= {name.strip() for name in names}:
            return separator
    return ","
