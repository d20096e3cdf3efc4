"""This host: its memory, and the free space of its disks."""

import os
import shutil
from pathlib import Path

from etils import epath

from dtrak_jax import files
from dtrak_jax.files import size_text

CGROUP = Path("/sys/fs/cgroup/memory.max")
"""The file in which Linux has the limit of a container's memory, or "max"."""


def memory() -> int:
    """Returns the bytes of this host's memory, or of what a container may use of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def free_disk(folder: epath.Path) -> int | None:
    """Returns the free bytes on the disk of a folder, which need not be there yet; None
    on gs://, where there is no limit."""
    if files.is_remote(folder):
        return None
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(existing).free


def check_fits(
    what: str, in_memory: int, on_disk: int = 0, folder: epath.Path | None = None
) -> None:
    """Raises an error if what is to be made does not fit this host.

    Args:
      what: what takes the space, in the plural, with the settings that decide it.
      in_memory: the bytes of memory at the peak; too many are a MemoryError.
      on_disk: the bytes on the disk of the folder, if any; too many are an OSError.
    """
    available = memory()
    if in_memory > available:
        raise MemoryError(
            f"{what} take about {size_text(in_memory)} of memory; this host has "
            f"{size_text(available)}. Take fewer or smaller ones."
        )
    free = folder and free_disk(folder)
    if free is not None and on_disk > free:
        raise OSError(
            f"{what} take {size_text(on_disk)} on the disk of {folder}, where "
            f"{size_text(free)} are free. Take fewer or smaller ones, or name a folder on "
            "another disk."
        )
