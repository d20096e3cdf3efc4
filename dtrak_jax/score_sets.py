"""The scores of a run: which ones its methods make, and whether they are there."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from dtrak_jax import feature_sets, files, parallel
from dtrak_jax.attribution import Scores
from dtrak_jax.attribution.duplicates import THRESHOLD, exact_copies, near_duplicates
from dtrak_jax.attribution.groups import names_hash
from dtrak_jax.digests import digest
from dtrak_jax.features import Features
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
    columns = run.splits.train.groupings
    return dataclasses.replace(scores, columns=columns, copies=run.copies())


def copies(run: "Run") -> np.ndarray:
    """Returns which training images are near-duplicates, see `Run.copies`."""
    train, features = run.splits.train, run.config.features
    learnt = any(METHODS[name].measurement for name in run.config.methods)
    store = feature_sets.find(run, "train") if learnt else None
    hashed = digest(train.digest, store.name if learnt else "", str(THRESHOLD))
    path, made_from = run.workdir / "scores" / "copies.npz", np.array(hashed)
    if not parallel.agreed(files.holds(path, {"made_from": made_from})):
        if parallel.is_main_process():
            if learnt:
                first = Features.load(store, features.measurements[0])
                found = near_duplicates(first, train.digests)
            else:
                found = exact_copies(train.ids, train.digests)
            files.write_npz(path, copies=found, ids=train.ids, made_from=made_from)
        parallel.barrier("copies")
    return files.read_npz(path)["copies"]


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
    if row.curved:
        parts += [f"{settings.ekfac_damping}", feature_sets.curvature_path(run).name]
    if row.measurement and run.config.features.draws > 1:
        # Errors of groups are made within each draw.
        columns = run.splits.train.groupings
        parts += ["errors", *(f"{k} {names_hash(v)}" for k, v in columns.items())]
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
