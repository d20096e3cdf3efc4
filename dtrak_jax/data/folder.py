"""Images from a folder, with labels, captions and groups from a CSV."""

import csv
import io
import os
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

import numpy as np

from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.preprocess import decode

SUFFIXES = (".png", ".jpg", ".jpeg")


def folder(config: DataConfig, split: str, prepare: Callable) -> Dataset:
    """Opens the folder `config.name`, which has no splits; see `pictures`."""
    return pictures(config.name, prepare, config.csv, config.groups)


def pictures(
    path: str,
    prepare: Callable,
    csv_name: str = "",
    groups: Collection[str] = (),
    setting: str = "data.name",
) -> Dataset:
    """Opens the PNG and JPEG files below a folder, sorted by path.

    Ids are paths relative to the folder, with forward slashes; hidden files are left
    out, and links are followed.

    If a CSV in the folder is named, the files are those that it lists, and `groups` are
    columns of it. `setting` is the name of the setting that gives the path.

    Raises:
      ValueError: a folder, file, column or cell is missing, or wrong.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"{setting} is {path!r}, which is not a folder.")
    if csv_name and not (root / csv_name).is_file():
        raise ValueError(f"{setting} is {path!r}, in which there is no CSV {csv_name}.")
    rows = _read_csv(root, root / csv_name, groups) if csv_name else _find(root)
    ids = sorted(rows)
    columns = {
        column: np.array([rows[name][column] for name in ids])
        for column in rows[ids[0]]
    }
    names, numbers = (), None
    if "label" in columns:
        names, numbers = np.unique(columns["label"], return_inverse=True)
    return Dataset(
        ids=np.array(ids),
        read=lambda index: prepare(decode(root / ids[index])),
        labels=numbers,
        label_names=tuple(map(str, names)),
        captions=columns.get("caption"),
        groups={column: columns[column] for column in groups},
    )


def _find(root: Path) -> dict[str, dict]:
    """Returns the relative paths of all images below a folder, without columns.

    Raises:
      ValueError: there are none, a link leads back to a folder that it is in, or a name
        is not UTF-8.
    """
    names = {}
    for parent, folders, files in os.walk(root, followlinks=True):
        place = Path(parent).absolute()
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (place / name for name in folders):
            above = (folder.resolve() for folder in link.parents)
            if link.is_symlink() and link.resolve() in above:
                raise ValueError(f"The link {link} leads to a folder that it is in.")
        for file in files:
            if file.startswith(".") or not file.lower().endswith(SUFFIXES):
                continue
            name = Path(parent, file).relative_to(root).as_posix()
            if name.encode(errors="replace").decode() != name:
                raise ValueError(
                    f"{root}: the name {name!r} is not UTF-8; rename the file."
                )
            names[name] = {}
    if not names:
        raise ValueError(f"There are no PNG or JPEG files below {root}.")
    return names


def _read_csv(
    root: Path, path: Path, groups: Collection[str]
) -> dict[str, dict[str, str]]:
    """Returns {file: {column: cell}} of a CSV, with every row checked.

    Columns are `label` and `caption`, if the CSV has them, and the groups.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    # The reader is strict: a quote that is opened and never closed would swallow the rows below.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = {}
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        columns = _columns(reader.fieldnames, path, groups)
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
            name = PurePosixPath(cells.pop("file")).as_posix()
            if not (root / name).is_file():
                raise ValueError(f"{where}: there is no file {root / name}.")
            if name in rows:
                raise ValueError(f"{where}: {name} is listed twice.")
            rows[name] = cells
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num + 1}: {error}; is a quote not closed?"
        ) from error
    if not rows:
        raise ValueError(f"{path} lists no files.")
    return rows


def _columns(header: list[str], path: Path, groups: Collection[str]) -> list[str]:
    """Returns the columns to read: `file`, `label` and `caption` if any, the groups."""
    columns = [name for name in ("label", "caption") if name in header]
    listed = ", ".join(header) or "(none)"
    if "file" not in header or not (columns or groups):
        raise ValueError(
            f"{path} has the columns {listed}; it must have `file`, and `label` or "
            "`caption`."
        )
    for name in groups:
        if name not in header:
            raise ValueError(
                f"data.groups has {name!r}; {path} has the columns {listed}."
            )
    columns = list(dict.fromkeys(["file", *columns, *groups]))
    for name in columns:
        if header.count(name) > 1:
            raise ValueError(f"{path} has the column `{name}` more than once.")
    return columns
