"""Images from a folder, with labels, captions and groups from a CSV."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.preprocess import decode

SUFFIXES = (".png", ".jpg", ".jpeg")


def pictures(
    path: str,
    prepare: Callable[[Image.Image], np.ndarray],
    csv_name: str = "",
    groups: Sequence[str] = (),
    setting: str = "data.name",
) -> Dataset:
    """Returns the PNG and JPEG files below a folder, sorted by path.

    Ids are paths relative to the folder, with forward slashes; hidden files are left
    out, and links are followed. If a CSV in the folder is named, the files are those
    that it lists, and `groups` are columns of it. Errors call the path `setting`.
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
    label_names, labels = (), None
    if "label" in columns:
        label_names, labels = np.unique(columns["label"], return_inverse=True)
    return Dataset(
        ids=np.array(ids),
        read=lambda index: prepare(decode(root / ids[index])),
        labels=labels,
        label_names=tuple(map(str, label_names)),
        captions=columns.get("caption"),
        groups={column: columns[column] for column in groups},
    )


def _find(root: Path) -> dict[str, dict[str, str]]:
    """Returns the relative paths of all images below a folder, without columns."""
    names = {}
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(parent).absolute() / name for name in folders):
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
    root: Path, path: Path, groups: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Returns {file: {column: cell}} of a CSV: label and caption, if any, and groups."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    # A quote that is never closed would swallow the rows below if not for `strict`.
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows = {}
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        columns = _columns(path, reader.fieldnames, groups)
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


def _columns(path: Path, header: list[str], groups: Sequence[str]) -> list[str]:
    """Returns the columns to read, each of which must be in the header once."""
    known = [name for name in ("label", "caption") if name in header]
    listed = ", ".join(header) or "(none)"
    if "file" not in header or not (known or groups):
        raise ValueError(
            f"{path} has the columns {listed}; it must have `file`, and `label` or "
            "`caption`."
        )
    columns = list(dict.fromkeys(["file", *known, *groups]))
    for name in columns:
        if name not in header:
            raise ValueError(
                f"data.groups has {name!r}; {path} has the columns {listed}."
            )
        if header.count(name) > 1:
            raise ValueError(f"{path} has the column `{name}` more than once.")
    return columns
