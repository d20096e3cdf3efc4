"""Images from a folder, with labels and captions from a CSV."""

import csv
import io
from pathlib import Path, PurePosixPath

import numpy as np

from dtrak_jax.config import DataConfig
from dtrak_jax.data.sources import Source, decode

SUFFIXES = (".png", ".jpg", ".jpeg")


def folder(config: DataConfig, split: str) -> Source:
    """The PNG and JPEG files below `config.name`, by path; no splits.

    Ids are paths relative to the folder, with forward slashes; hidden files are left
    out. With `config.csv` the files are those that it lists.
    """
    root = Path(config.name).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.name is {config.name!r}, which is not a folder.")
    if config.csv:
        rows = _read_csv(root, root / config.csv)
    else:
        paths = (path.relative_to(root) for path in root.rglob("*"))
        rows = {
            path.as_posix(): {}
            for path in paths
            if path.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in path.parts)
        }
        if not rows:
            raise ValueError(f"There are no PNG or JPEG files below {root}.")
    ids = sorted(rows)
    labels, captions = (
        [rows[name][column] for name in ids] if column in rows[ids[0]] else None
        for column in ("label", "caption")
    )
    names, numbers = (), None
    if labels:
        names, numbers = np.unique(labels, return_inverse=True)
    return Source(
        ids=np.array(ids),
        labels=numbers,
        label_names=tuple(str(name) for name in names),
        captions=tuple(captions) if captions else None,
        read=lambda index: decode(root / ids[index], str(root / ids[index])),
    )


def _read_csv(root: Path, path: Path) -> dict[str, dict[str, str]]:
    """{file: {"label": .., "caption": ..}} of a CSV, every row of it checked."""
    if not path.is_file():
        raise ValueError(f"data.csv: there is no file {path}.")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    rows = {}
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = reader.fieldnames or []
    columns = [name for name in ("label", "caption") if name in header]
    if "file" not in header or not columns:
        raise ValueError(
            f"{path} has the columns {', '.join(header) or '(none)'}; it must "
            "have `file`, and `label` or `caption`."
        )
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row:
            raise ValueError(
                f"{where}: more cells than the header has; quote text with commas."
            )
        for column in ("file", *columns):
            if not (row[column] or "").strip():
                raise ValueError(f"{where}: `{column}` is empty.")
        name = PurePosixPath(row["file"].strip()).as_posix()
        if name in rows:
            raise ValueError(f"{where}: {name} is listed twice.")
        if not (root / name).is_file():
            raise ValueError(f"{where}: there is no file {root / name}.")
        rows[name] = {column: row[column].strip() for column in columns}
    if not rows:
        raise ValueError(f"{path} lists no files.")
    return rows
