"""The scores of a run: which ones its methods make, and whether they are there.

A file in scores/ is complete: it has groups and near-duplicates as they are now.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from dtrak_jax import feature_sets, files, parallel
from dtrak_jax.attribution import Scores, duplicates
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
    """Returns the scores of a method for a set of queries, see `Run.scores`.

    Where only groups or near-duplicates are others than in the file, the scores are kept.
    """
    path, copies = _path(run, method, queries), run.copies().copies
    scores = Scores.load(path) if path.exists() else None
    if not parallel.agreed(scores is not None and _is_scored(run, method, scores)):
        for name, made in METHODS[method].scores(run).items():
            if parallel.is_main_process():
                hashed = {"made_from": made_from(run, method), "copies": copies}
                dataclasses.replace(made, **hashed).save(_path(run, method, name))
        parallel.barrier(f"scores of {method}")
        scores = None
    # Where the main process has seen the file, another one may have been too early.
    scores = scores or Scores.load(path)
    if not parallel.agreed(_is_grouped(run, scores)):
        if parallel.is_main_process():
            columns = run.splits.train.groupings
            used = set(map(names_hash, columns.values()))
            fields = {"columns": columns, "copies": copies}
            for name in ("group_errors", "group_freedom"):
                by_group = getattr(scores, name).items()
                fields[name] = {k: v for k, v in by_group if k in used}
            dataclasses.replace(scores, **fields).save(path)
        parallel.barrier(f"groups of {method}")
        scores = Scores.load(path)
    return scores


def copies(run: "Run") -> duplicates.Found:
    """Returns which training images are near-duplicates, see `Run.copies`."""
    path, hashed = _copies_path(run), _copies_made_from(run)
    if not parallel.agreed(files.holds(path, hashed)):
        if parallel.is_main_process():
            train = run.splits.train
            if store := _compared(run):
                first = Features.load(store, run.config.features.measurements[0])
                copies, why = duplicates.found(first, train.digests)
                duplicates.warn_of(why)
            else:
                copies = duplicates.exact_copies(train.ids, train.digests)
                why = "no method has features"
            files.write_npz(path, copies=copies, why=why, ids=train.ids, **hashed)
        parallel.barrier("copies")
    saved = files.read_npz(path)
    return duplicates.Found(saved["copies"], str(saved["why"]))


def is_made(run: "Run", method: str, queries: str) -> bool:
    """Returns whether scores are there, and what they are made from is the same, as are
    groups and near-duplicates."""
    path = _path(run, method, queries)
    if not path.exists() or not files.holds(_copies_path(run), _copies_made_from(run)):
        return False
    scores = Scores.load(path)
    return _is_scored(run, method, scores) and _is_grouped(run, scores)


def made_from(run: "Run", method: str) -> str:
    """Returns the hash of all artefacts and settings that a method's scores depend on,
    but for groups: these decide the errors of groups alone."""
    row, settings = METHODS[method], run.config.attribution
    examples = [run.splits.train, *run.queries.values()]
    parts = [method, *(images.digest for images in examples)]
    damping = settings.damping_of(row)
    if row.measurement:
        parts.append(f"{damping.value} {damping.absolute} {settings.solver}")
        parts += ["share"] * damping.share
    if row.curved:
        parts += [f"{damping.value}", feature_sets.curvature_path(run).name]
        parts += [f"{getattr(settings, name)}" for _, name in row.inputs.settings]
    if row.of_output:
        parts.append(feature_sets.gauss_newton_path(run).name)
    for folder in row.folders(run.config):
        # The names of stores say what they are made from.
        parts += [
            feature_sets.path(run, s).name for s in feature_sets.sets(run, folder)
        ]
    if "retrain" in row.needs and run.outputs.exists():
        parts.append(run.outputs.read_bytes())
    if row.replays:
        parts += [run.params_digest(), run.config.ensemble.measured]
    if row.embeds:
        parts.append(run.clip_network.digest)
    return digest(*parts)


def _is_scored(run: "Run", method: str, scores: Scores) -> bool:
    """Returns whether a file's scores are the present ones, with the errors of all groups
    if it has any."""
    columns = run.splits.train.groupings
    # Errors of groups are made within each draw.
    missing = set(map(names_hash, columns.values())) - scores.group_freedom.keys()
    return scores.made_from == made_from(run, method) and not (
        scores.freedom and missing
    )


def _is_grouped(run: "Run", scores: Scores) -> bool:
    """Returns whether the groups and near-duplicates of a file are those of now."""
    columns = run.splits.train.groupings
    return (
        files.holds(_copies_path(run), {"copies": scores.copies})
        and scores.columns.keys() == columns.keys()
        and all(np.array_equal(scores.columns[k], columns[k]) for k in columns)
    )


def _compared(run: "Run") -> epath.Path | None:
    """Returns the store of the features that near-duplicates are found by, if any."""
    learnt = any(METHODS[name].measurement for name in run.config.methods)
    return feature_sets.find(run, "train") if learnt else None


def _copies_made_from(run: "Run") -> dict[str, np.ndarray]:
    """Returns the hash of what near-duplicates are found by, as their file has it."""
    store = _compared(run)
    parts = (
        run.splits.train.digest,
        store.name if store else "",
        str(duplicates.THRESHOLD),
        "why",  # Files of earlier versions do not have it.
    )
    return {"made_from": np.array(digest(*parts))}


def _copies_path(run: "Run") -> epath.Path:
    return run.workdir / "scores" / "copies.npz"


def _path(run: "Run", method: str, queries: str) -> epath.Path:
    return run.workdir / "scores" / f"{method}-{queries}.npz"
