"""Files that are either complete or missing, on a local disk or on gs://."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterable

import fsspec.config
import numpy as np
from etils import epath

from dtrak_jax.checks import shown

# A cached listing would hide files that other processes, or TensorStore, write later.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def at(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path on a local disk, with ~ expanded, or a path on gs://.

    Raises:
      ImportError: the path is on gs:// and gcsfs is not installed.
      ValueError: the path is a URL of another kind.
      TypeError: it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"{shown(path)} is given as a path; it must be a string or a pathlib.Path."
        )
    text = os.fspath(path)
    scheme, colon, _ = text.partition(":/")
    if not colon or "/" in scheme:
        return epath.Path(path).expanduser().absolute()
    if scheme != "gs" or not text.startswith("gs://"):
        raise ValueError(
            f"{text!r} is neither a path of a local disk nor gs://BUCKET/FOLDER."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f'{text} needs gcsfs: pip install "dtrak-jax[gcp]"')
    # pathlib would take the URL for a relative path and put the current folder first.
    return epath.Path(path)


def is_remote(path: epath.Path) -> bool:
    """Returns True on gs://, where there are no folders and objects appear complete."""
    return str(path).startswith("gs://")


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file that no reader ever sees half-written.

    Raises:
      OSError: the disk is full or not writable; an older file is unchanged.
    """
    path = at(path)
    with _explained(path, "was not written, and what was there before is unchanged"):
        if is_remote(path):
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_and_rename(path, data)


def _write_and_rename(path: epath.Path, data: bytes) -> None:
    """Writes another file in the same folder, which then replaces the old one."""
    # Hosts that share the disk may have processes with the same number.
    partial = path.parent / f"{path.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _explained(path: epath.Path, what: str):
    """Says of an error in writing what it means for the file, and what to do."""
    try:
        yield
    except OSError as error:
        remedy = "Free space or mend the permissions"
        if is_remote(path):
            remedy = "See that the bucket is there and may be written to"
        message = f"{error.strerror or error}; {path} {what}. {remedy}, then rerun"
        raise OSError(error.errno, message, str(path)) from error


def check_folder(name: str, path: epath.PathLike) -> epath.Path:
    """Returns a path at which a folder is or can be made.

    Raises:
      NotADirectoryError: it, or what is above it, is a file; the error names the setting.
    """
    path = at(path)
    for folder in () if is_remote(path) else (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            what = "which" if folder == path else f"and {folder}"
            raise NotADirectoryError(
                f"{name} is {str(path)!r}, {what} is a file; name a folder."
            )
    return path


def check_file(name: str, path: epath.PathLike) -> epath.Path:
    """Returns a path at which a file is or can be written.

    Raises:
      IsADirectoryError: it is a folder.
      NotADirectoryError: what is above it is a file.
    """
    path = at(path)
    if not is_remote(path):
        if path.is_dir():
            raise IsADirectoryError(
                f"{name} is {str(path)!r}, a folder; name a file in it."
            )
        check_folder(f"the folder of {name}", path.parent)
    return path


def is_empty(folder: epath.PathLike, besides: str = "") -> bool:
    """Returns whether a folder has no files, besides a name and what killed writes left."""
    folder = at(folder)
    if not folder.exists():
        return True
    names = (path.name for path in folder.iterdir())
    return all(name == besides or name.endswith(".partial") for name in names)


def write_json(path: epath.PathLike, value: object) -> None:
    """Writes a value as indented JSON, atomically as `write_bytes`."""
    write_bytes(path, f"{json_text(value)}\n".encode())


def json_text(value: object, depth: int = 1, **options) -> str:
    """Returns JSON with a line for each entry of a dict or list, indented by the depth; a
    list of nothing but strings and numbers, which may be long, is one line.

    Further options are those of `json.dumps`.
    """
    nested = isinstance(value, list | tuple) and any(
        isinstance(item, dict | list | tuple) for item in value
    )
    if not nested and not isinstance(value, dict):
        return json.dumps(value, **options)
    text = functools.partial(json_text, depth=depth + 1, **options)
    if nested:
        ends, parts = "[]", list(map(text, value))
    else:
        ends = "{}"
        parts = [f"{json.dumps(str(key))}: {text(v)}" for key, v in value.items()]
    start = "\n" + " " * depth
    inside = f",{start}".join(parts)
    return f"{ends[0]}{start}{inside}{start[:-1]}{ends[1]}" if parts else ends


def read_json(path: epath.PathLike) -> dict:
    """Returns the value in a JSON file, or raises a ValueError if it is not valid."""
    text = at(path).read_text()
    check_fetched(path, text.encode())
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and rerun."
        ) from error


def check_fetched(path: epath.PathLike, content: bytes) -> None:
    """Raises a ValueError if a file's content, or its first 8 bytes, is a pointer of Git
    LFS, which stands for a file that was not fetched."""
    if content.startswith(b"version "):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` "
            "where the folder was cloned."
        )


def write_json_lines(path: epath.PathLike, rows: Iterable[dict]) -> None:
    """Writes a line of JSON for each row, atomically as `write_bytes`."""
    write_bytes(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def append_json_lines(path: epath.PathLike, rows: Iterable[dict]) -> None:
    """Adds a line of JSON for each row to a file on a local disk, in one write.

    Raises:
      OSError: the disk is full or not writable; a last line may be half written.
    """
    path, data = at(path), "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    with _explained(path, "did not get another line"), open(path, "ab") as file:
        file.write(data)


def read_json_lines(path: epath.PathLike) -> list[dict]:
    """Returns the value of each line but a last one that a killed process left half."""
    lines = at(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def differences(saved: dict, current: dict) -> list[str]:
    """Returns a clause for each field that differs, with its two values."""
    return [
        f"{field} is {saved.get(field)!r} there and {current.get(field)!r} here"
        for field in dict.fromkeys([*current, *saved])
        if saved.get(field) != current.get(field)
    ]


def write_npz(path: epath.PathLike, **arrays) -> None:
    """Writes named arrays as a compressed .npz, atomically as `write_bytes`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns all arrays of an .npz, or raises a ValueError if it is damaged."""
    data = at(path).read_bytes()
    try:
        with np.load(io.BytesIO(data)) as archive:
            return dict(archive)
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        # NumPy takes what it does not know for a pickle, and says how to trust it.
        why = "it holds no arrays" if "pickle" in str(error) else error
        raise ValueError(f"{path} is damaged ({why}); delete it and rerun.") from error


def size_text(count: float) -> str:
    """Returns a number of bytes in words, such as "4.1 MB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def holds(path: epath.PathLike, arrays: dict[str, np.ndarray]) -> bool:
    """Returns True if there is an .npz that has these arrays, and perhaps more."""
    if not at(path).exists():
        return False
    saved = read_npz(path)
    return all(np.array_equal(saved.get(name), array) for name, array in arrays.items())
