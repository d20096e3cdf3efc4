"""The disk and the memory of this host that features and kernels take."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath

from dtrak_jax import feature_sets, files
from dtrak_jax.attribution.kernel import KEPT_ON_DISK, eigh_bytes
from dtrak_jax.features.gradients import variables
from dtrak_jax.features.microbatches import Layout
from dtrak_jax.methods import METHODS
from dtrak_jax.run import Run

COPIES = 4
"""The copies of a chunk of features at one time: on the devices and on the host, of one
chunk that is computed and one that is written."""


CGROUP = Path("/sys/fs/cgroup/memory.max")
"""The file in which Linux has the limit of a container's memory, or "max"."""


class Space(NamedTuple):
    """Bytes on disk that stay, and bytes of memory at the peak."""

    disk: int = 0
    memory: int = 0


def features(run: Run, besides_made: bool) -> Space:
    """Returns the space of all stores of features, n J k 4 bytes for a measurement; or of
    those that are not there yet."""
    counts = {"train": len(run.chosen.train), **run.query_counts}
    disk = memory = 0
    for folder in feature_sets.folders(run.config):
        for wanted in feature_sets.sets(run, folder):
            if besides_made and feature_sets.is_made(run, wanted):
                continue
            layout = layout_of(run, wanted)
            measurements = len(wanted.task.measurements)
            disk += layout.bytes_written(counts[wanted.examples], measurements)
            rows = min(layout.rows_per_chunk, counts[wanted.examples])
            # A round of gradients is whole, however few examples there are.
            gradients = max(rows * layout.per_example, layout.size)
            memory = max(memory, COPIES * 4 * gradients * layout.dim * measurements)
    return Space(disk, memory)


def kernels(run: Run) -> Space:
    """Returns the space of the kernels of one model: n k 4 bytes of features in memory,
    twice, and min(n, k)^2 8 bytes for each matrix of a decomposition."""
    settings, disk, memory = run.config.attribution, 0, 0
    n = len(run.chosen.train)
    for name in settings.methods:
        if not METHODS[name].damped:
            continue
        layout = layout_of(run, next(feature_sets.sets(run, "")))
        side, count = min(n, layout.dim), layout.per_example
        memory = max(memory, 2 * 4 * n * layout.dim)
        if settings.solver == "eigh":
            memory = max(memory, 4 * n * layout.dim + eigh_bytes(side))
            size = 8 * count * side**2
            disk += size if size <= KEPT_ON_DISK else 0
    return Space(disk, memory)


def layout_of(run: Run, wanted: feature_sets.FeatureSet) -> Layout:
    """Returns the sizes of a set of features."""
    p, settings = 0, run.config.features
    if settings.projection == "none":
        p = sum(leaf.size for leaf in variables(wanted.task, run.param_shapes, {}))
    devices = len(jax.local_devices())
    return Layout.of(wanted.task, wanted.projection, p, settings.batch_size, devices)


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


def in_words(count: float) -> str:
    """Returns a number of bytes in words, such as "3.5 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"
