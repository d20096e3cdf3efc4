"""The scores of a run: which ones its methods make, and whether they are there."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from dtrak_jax import feature_sets, parallel
from dtrak_jax.attribution import Scores
from dtrak_jax.digests import digest
from dtrak_jax.methods import METHODS

if TYPE_CHECKING:
    from dtrak_jax.run import Run


def wanted(run: "Run") -> Iterator[tuple[str, str]]:
    """Yields every method of `attribution.methods` with each set of queries it scores."""
    for method in run.config.attribution.methods:
        for queries in run.queries:
            if METHODS[method].applies_to(queries):
                yield method, queries


def load(run: "Run", method: str, queries: str) -> Scores:
    """Returns the scores of a method for a set of queries, see `Run.scores`."""
    if not parallel.agreed(is_made(run, method, queries)):
        for name, scores in METHODS[method].scores(run).items():
            if parallel.is_main_process():
                scores = dataclasses.replace(scores, made_from=made_from(run, method))
                scores.save(_path(run, method, name))
        parallel.barrier(f"scores of {method}")
    scores = Scores.load(_path(run, method, queries))
    # Those of now, also where scores are not made from them.
    return dataclasses.replace(scores, columns=run.splits.train.groupings)


def is_made(run: "Run", method: str, queries: str) -> bool:
    """Returns whether scores are there, and what they are made from is the same."""
    path = _path(run, method, queries)
    return path.exists() and Scores.load(path).made_from == made_from(run, method)


def made_from(run: "Run", method: str) -> str:
    """Returns the hash of all artefacts and settings that a method's scores depend on."""
    row, settings = METHODS[method], run.config.attribution
    examples = [run.splits.train, *run.queries.values()]
    parts = [method, *(images.digest for images in examples)]
    if row.measurement:
        parts.append(f"{settings.damping} {settings.absolute} {settings.solver}")
    if row.measurement and run.config.features.draws > 1:
        # Errors of groups are made within each draw.
        columns = run.splits.train.groupings
        parts += ["errors", *(f"{name} {digest(*columns[name])}" for name in columns)]
    for folder in row.folders(run.config):
        # The names of stores say what they are made from.
        parts += [
            feature_sets.path(run, s).name for s in feature_sets.sets(run, folder)
        ]
    if "retrain" in row.needs and run.outputs.exists():
        parts.append(run.outputs.read_bytes())
    if row.embeds:
        parts.append(run.clip_network.digest)
    return digest(*parts)


def _path(run: "Run", method: str, queries: str) -> epath.Path:
    return run.workdir / "scores" / f"{method}-{queries}.npz"
