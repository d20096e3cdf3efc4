"""Provenance: the packages, the date and the command that a result was made with."""

import contextlib
import datetime
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from etils import epath

from dtrak_jax import files

PACKAGES = ("dtrak-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
"""The packages that a run directory names."""


def record(path: epath.Path, settings: dict[str, object]) -> None:
    """Writes config.json: the settings and packages of the last command, and when and by
    which command the run began."""
    saved = files.read_json(path) if path.exists() else {}
    described = {
        "config": settings,
        "versions": environment(),
        "begun": saved.get("begun") or beginning(),
    }
    files.write_json(path, described)


def environment() -> dict[str, str]:
    """Returns the versions of `PACKAGES` and of Python."""
    return versions(PACKAGES) | {"python": platform.python_version()}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those of the packages that are installed."""
    installed = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def beginning() -> dict[str, str]:
    """Returns the date, and the command that this process was started with, if any."""
    command, now = Path(sys.argv[0]).name, datetime.datetime.now(datetime.UTC)
    begun = {"begun": f"{now:%Y-%m-%d %H:%M} UTC"}
    if command == "dtrak-jax":
        begun["command"] = shlex.join([command, *sys.argv[1:]])
    return begun
