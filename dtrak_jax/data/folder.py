"""Images from a folder, with labels, captions and groups from a CSV."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from dtrak_jax.checks import instance
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.preprocess import Picture, decode
from dtrak_jax.data.table import read_table

STUBS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow names but cannot read by itself."""
COLUMNS = ("label", "caption")
GENERATED = (*COLUMNS, "prompt", "seed")
"""Columns of a CSV beside `file`, of images and of generated ones."""


def pictures(
    path: str | os.PathLike,
    prepare: Callable[[Image.Image], Picture],
    csv_name: str = "",
    groups: Sequence[str] = (),
    *,
    setting: str = "data.name",
    optional: Sequence[str] = COLUMNS,
    needs_groups: bool = True,
) -> Dataset:
    """Returns the pictures below a folder in any format of Pillow, sorted by path.

    Ids are paths relative to the folder, with forward slashes; hidden files are left
    out, and links are followed. Labels are the names of subfolders, if every picture
    is directly in one. If a CSV in the folder is named, the files are those that it
    lists, labels are its own, and `groups` are columns of it, which may be missing
    unless `needs_groups`.

    Args:
      setting: the name that errors give to the folder.
      optional: the other columns of the CSV that are read; prompt is a caption.
    """
    instance(setting, path, str, os.PathLike)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"{setting} is {str(path)!r}, which is not a folder.")
    if csv_name and not (root / csv_name).is_file():
        raise ValueError(
            f"{setting} is {str(path)!r}, in which there is no CSV {csv_name}."
        )
    required, extra = (groups, ()) if needs_groups else ((), groups)
    if csv_name:
        rows, note = _read_csv(root, root / csv_name, required, (*optional, *extra))
        notes = (*filter(None, [note]), *_unlisted(root, rows, csv_name))
    else:
        rows, notes = _find(root)
    ids = sorted(rows)
    columns = {
        column: np.array([rows[name][column] for name in ids])
        for column in rows[ids[0]]
    }
    named = {column: columns[column] for column in optional if column in columns}
    label_names, labels = (), None
    if "label" in named:
        label_names, labels = np.unique(named["label"], return_inverse=True)
    return Dataset(
        ids=np.array(ids),
        read=lambda index: prepare(decode(root / ids[index])),
        stamp=lambda index: stamp(root / ids[index]),
        labels=labels,
        label_names=tuple(map(str, label_names)),
        captions=named.get("prompt", named.get("caption")),
        groups={name: columns[name] for name in groups if name in columns},
        seeds=named["seed"].astype(np.uint32) if "seed" in named else None,
        notes=notes,
    )


def stamp(path: os.PathLike) -> tuple[int, int]:
    """Returns the size of a file and the nanosecond when it was last written."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _find(root: Path) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Returns the relative paths of all images below a folder, and notes.

    Images that are all directly in subfolders have the column "label".
    """
    suffixes, names, left_out = _suffixes(), [], Counter()
    for name in _walk(root):
        suffix = PurePath(name).suffix.lower()
        if suffix not in suffixes:
            if not (root / name).exists():
                raise ValueError(f"The link {root / name} leads nowhere; mend it.")
            left_out[ascii(suffix)[1:-1] or "without a suffix"] += 1
            continue
        if name.encode(errors="replace").decode() != name:
            raise ValueError(
                f"{root}: the name {name!r} is not UTF-8; rename the file."
            )
        names.append(name)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    if not names:
        beside = f"; there are {kinds}" if left_out else ""
        raise ValueError(f"There are no pictures below {root}{beside}.")
    notes = (f"{root}: left out what is no picture ({kinds}).",) if left_out else ()
    notes += tuple(
        f"{root}: {table.name} is not read; the setting csv names a CSV that has labels, "
        "captions or groups."
        for table in sorted(root.glob("[!.]*.csv"))
    )
    if any(name.count("/") != 1 for name in names):
        return {name: {} for name in names}, notes
    labels = {name: name.partition("/")[0] for name in names}
    counts = sorted(Counter(labels.values()).items())
    listed = ", ".join(f"{label} ({count})" for label, count in counts[:6])
    listed += f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    notes = (f"{root}: labels are the names of its subfolders: {listed}.", *notes)
    return {name: {"label": label} for name, label in labels.items()}, notes


def _walk(root: Path) -> Iterator[str]:
    """Yields the relative paths of all files below a folder that are not hidden."""

    def refuse(error: OSError):
        raise ValueError(f"The folder {error.filename} cannot be read: {error}.")

    for parent, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(parent).absolute() / name for name in folders):
            above = (folder.resolve() for folder in link.parents)
            if link.is_symlink() and link.resolve() in above:
                raise ValueError(f"The link {link} leads to a folder that it is in.")
        for file in files:
            if not file.startswith("."):
                yield Path(parent, file).relative_to(root).as_posix()


def _suffixes() -> set[str]:
    """Returns the suffixes of the formats that Pillow reads."""
    known = Image.registered_extensions().items()
    return {
        suffix for suffix, kind in known if kind in Image.OPEN and kind not in STUBS
    }


def _read_csv(
    root: Path, path: Path, groups: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, dict[str, str]], str]:
    """Returns {file: {column: cell}} of a CSV, of optional columns, if any, and groups;
    and a sentence on its other columns, or ""."""
    rows: dict[str, dict[str, str]] = {}
    table, unread = read_table(path, ["file"], optional, groups)
    for where, cells in table:
        name = _relative(root, cells.pop("file"), where)
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
    return rows, unread


def _relative(root: Path, cell: str, where: str) -> str:
    """Returns the relative path of the file in a folder that a cell names.

    The cell may be an absolute path, have the backslashes of Windows, or spell accents
    in the other way that Unicode has.
    """
    spellings = [unicodedata.normalize(form, cell) for form in ("NFC", "NFD")]
    outside = False
    for text in dict.fromkeys((cell, *spellings, cell.replace("\\", "/"))):
        path = root.absolute() / text
        if not path.is_file():
            continue
        linked = path.parent.resolve() / path.name
        for file, base in ((path, root.absolute()), (linked, root.resolve())):
            name = PurePath(os.path.relpath(file, base)).as_posix()
            if not name.startswith("../"):
                return name
        outside = True
    if outside:
        raise ValueError(f"{where}: the file {cell} is not in the folder {root}.")
    raise ValueError(f"{where}: there is no file {root / cell}.")


def _unlisted(root: Path, rows: dict, csv_name: str) -> tuple[str, ...]:
    """Returns a note on the pictures that a CSV leaves out of the folders it names."""
    suffixes, count = _suffixes(), 0
    for folder in {os.path.dirname(name) for name in rows}:
        for file in os.listdir(root / folder):
            name = f"{folder}/{file}".lstrip("/")
            is_picture = PurePath(file).suffix.lower() in suffixes
            count += is_picture and not file.startswith(".") and name not in rows
    if not count:
        return ()
    return (f"{root}: left out what {csv_name} does not list (pictures: {count}).",)
