"""Benchmarks: dtrak_jax against the reference's way in PyTorch, and against itself.

    pip install ".[benchmark]" && python -m tests.benchmarks

Every comparison runs both sides in one process, in turn (ABAB...) and after a warm-up,
and says the ratio of each neighbouring pair: what else the machine does meets both.
The numbers of one row are seconds of the same work on the same UNet weights, which both
sides load from one diffusers folder, and the same images.
"""

import importlib.util
import os
from typing import NamedTuple


class Comparison(NamedTuple):
    """A module of this package with `measure(small, repetitions) -> list of rows`."""

    about: str
    peers: bool = False
    """Whether no row of it can do without the packages of `PEERS`."""


COMPARISONS = {
    "featurize": Comparison("features, against vmap(grad) in PyTorch", peers=True),
    "adapters": Comparison(
        "features of adapters, against vmap(grad) in PyTorch", peers=True
    ),
    "stage": Comparison("the featurize stage, against one plain batched gradient"),
    "projection": Comparison("projections alone, against the gradient and the peers'"),
    "solver": Comparison("27 values of lambda, against 27 float32 inversions"),
    "lds": Comparison("LDS and its interval, against loops over spearmanr"),
    "retraining": Comparison("an ensemble, against PyTorch", peers=True),
    "sampling": Comparison("50 steps of DDIM, against diffusers", peers=True),
    "first_score": Comparison("from the command line to the first score"),
}

PEERS = {
    "torch": "torch",
    "diffusers": "diffusers",
    "peft": "peft",
    "trak": "traker",
    "dattri": "dattri",
}
"""Modules of other projects to compare with, and the packages they come in."""


def missing_peers() -> list[str]:
    """The packages that are not installed."""
    return [p for m, p in PEERS.items() if importlib.util.find_spec(m) is None]


def cores() -> int:
    """How many cores both sides may use: all, or as many as `taskset` leaves them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
