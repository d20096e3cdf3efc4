"""Files that are either whole or not there, on a local disk or on gs://."""

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

# What was listed once would hide what other processes, and TensorStore, write later.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def at(path: epath.PathLike) -> epath.Path:
    """A path from the root, on a local disk or on gs://.

    Raises:
      ImportError: it is on gs:// and gcsfs is not installed.
      ValueError: it is a URL of another kind.
    """
    text = os.fspath(path)
    scheme, colon, _ = text.partition(":/")
    if not colon or "/" in scheme:
        return epath.Path(path).absolute()
    if scheme != "gs" or not text.startswith("gs://"):
        raise ValueError(
            f"{text!r} is neither a path of a local disk nor gs://BUCKET/FOLDER."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f'{text} needs gcsfs: pip install "dtrak-jax[gcp]"')
    # pathlib would take it for a relative path and put the current folder before it.
    return epath.Path(path)


def is_remote(path: epath.Path) -> bool:
    """Whether it is on gs://, where there are no folders and objects appear whole."""
    return str(path).startswith("gs://")


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file that no reader ever sees half-written.

    Raises:
      OSError: the disk is full or not writable; an older file is left as it was.
    """
    path = at(path)
    try:
        if is_remote(path):
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_and_rename(path, data)
    except OSError as error:
        remedy = "Free space or mend the permissions"
        if is_remote(path):
            remedy = "See that the bucket is there and may be written to"
        raise OSError(
            error.errno,
            f"{error.strerror or error}; {path} was not written, and what was there "
            f"before is unchanged. {remedy}, then rerun",
            str(path),
        ) from error


def _write_and_rename(path: epath.Path, data: bytes) -> None:
    # Hosts that share the disk may have processes of the same number.
    partial = path.parent / f"{path.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_empty(folder: epath.PathLike) -> bool:
    """Whether a folder is not there, or holds only what killed writes have left."""
    folder = at(folder)
    if not folder.exists():
        return True
    return all(path.name.endswith(".partial") for path in folder.iterdir())


def write_json(path: epath.PathLike, value: object) -> None:
    """Writes `value` as indented JSON; atomic, see `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: epath.PathLike) -> dict:
    """Reads a JSON file; one that is cut off or edited raises a ValueError."""
    try:
        return json.loads(at(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and rerun."
        ) from error


def write_json_lines(path: epath.PathLike, rows: Iterable[dict]) -> None:
    """Writes a line of JSON for each row; atomic, see `write_bytes`."""
    write_bytes(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def read_json_lines(path: epath.PathLike) -> list[dict]:
    """Reads what `write_json_lines` wrote."""
    return [json.loads(line) for line in at(path).read_text().splitlines()]


def differences(there: dict, here: dict) -> list[str]:
    """Says of each field that differs what it is in one and what in the other."""
    return [
        f"{field} is {there.get(field)!r} there and {here.get(field)!r} here"
        for field in dict.fromkeys([*here, *there])
        if there.get(field) != here.get(field)
    ]


def write_npz(path: epath.PathLike, **arrays) -> None:
    """Writes named arrays as a compressed .npz; atomic, see `write_bytes`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz; a damaged file raises a ValueError."""
    data = at(path).read_bytes()
    try:
        with np.load(io.BytesIO(data)) as archive:
            return dict(archive)
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it and rerun."
        ) from error


def holds(path: epath.PathLike, arrays: dict[str, np.ndarray]) -> bool:
    """Whether there is an .npz with these arrays, and perhaps others."""
    if not at(path).exists():
        return False
    there = read_npz(path)
    return all(np.array_equal(there.get(name), one) for name, one in arrays.items())
