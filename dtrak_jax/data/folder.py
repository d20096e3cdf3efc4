"""Images from a folder, with labels, captions and groups from a CSV."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.preprocess import decode
from dtrak_jax.data.table import read_table

SUFFIXES = (".png", ".jpg", ".jpeg")
COLUMNS = ("label", "caption")
GENERATED = (*COLUMNS, "prompt", "seed")
"""Columns of a CSV beside `file`, of images and of generated ones."""


def pictures(
    path: str,
    prepare: Callable[[Image.Image], np.ndarray],
    csv_name: str = "",
    groups: Sequence[str] = (),
    *,
    is_generated: bool = False,
) -> Dataset:
    """Returns the PNG and JPEG files below a folder, sorted by path.

    Ids are paths relative to the folder, with forward slashes; hidden files are left
    out, and links are followed. If a CSV in the folder is named, the files are those
    that it lists, and `groups` are columns of it. Generated images may have the columns
    prompt, which is their caption, and seed, and need not have the groups.
    """
    setting = "queries.folder" if is_generated else "data.name"
    optional, required = COLUMNS, groups
    if is_generated:
        optional, required = (*GENERATED, *groups), ()
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"{setting} is {path!r}, which is not a folder.")
    if csv_name and not (root / csv_name).is_file():
        raise ValueError(f"{setting} is {path!r}, in which there is no CSV {csv_name}.")
    rows = (
        _read_csv(root, root / csv_name, required, optional)
        if csv_name
        else _find(root)
    )
    ids = sorted(rows)
    columns = {
        column: np.array([rows[name][column] for name in ids])
        for column in rows[ids[0]]
    }
    generated = columns if is_generated else {}
    label_names, labels = (), None
    if "label" in columns:
        label_names, labels = np.unique(columns["label"], return_inverse=True)
    return Dataset(
        ids=np.array(ids),
        read=lambda index: prepare(decode(root / ids[index])),
        labels=labels,
        label_names=tuple(map(str, label_names)),
        captions=generated.get("prompt", columns.get("caption")),
        groups={name: columns[name] for name in groups if name in columns},
        seeds=generated["seed"].astype(np.uint32) if "seed" in generated else None,
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
    root: Path, path: Path, groups: Sequence[str], optional: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Returns {file: {column: cell}} of a CSV: optional columns, if any, and groups."""
    rows = {}
    for where, cells in read_table(path, ["file"], optional, groups):
        name = PurePosixPath(cells.pop("file")).as_posix()
        if not (root / name).is_file():
            raise ValueError(f"{where}: there is no file {root / name}.")
        if name in rows:
            raise ValueError(f"{where}: {name} is listed twice.")
        rows[name] = cells
        if "seed" in optional and "seed" in cells:
            seed = cells["seed"]
            if not (seed.isdecimal() and int(seed) < 2**32):
                raise ValueError(
                    f"{where}: `seed` is {seed!r}; it must be an integer from 0 to "
                    f"{2**32 - 1}."
                )
    return rows
