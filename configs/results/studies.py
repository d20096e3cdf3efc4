"""What the scripts beside it share: losses of retrained models, features and results."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.evaluation.trust import LDS
from dtrak_jax.network import Params
from dtrak_jax.run import Run

DIGITS = Path(__file__).parent / "digits_outputs.npz"


def truths(
    path: Path = DIGITS, count: int | None = None
) -> dict[str, dtrak.RetrainedLosses]:
    """Returns the losses of the first queries of each set under all retrained models, which
    a file has as a run does in ensemble/outputs.npz."""
    saved, found = files.read_npz(path), {}
    for name in dict.fromkeys(saved["query_set"].tolist()):
        rows = np.flatnonzero(saved["query_set"] == name)[:count]
        outputs, ids = saved["outputs"][..., rows], saved["query_ids"][rows]
        of_set = outputs, saved["masks"], ids, saved["train_ids"]
        found[name] = dtrak.RetrainedLosses(*of_set)
    return found


def featurize(
    run: Run,
    task: dtrak.Task,
    params: Params,
    projection: dtrak.Projection,
    folder: Path,
    sets: Collection[str] = ("train", "validation", "generated"),
) -> dict[str, dtrak.Features]:
    """Returns features of "train" and of sets of queries, kept in a folder."""
    return {
        name: dtrak.featurize(
            *(task, params, examples.images, projection),
            ids=examples.ids,
            store=folder / name,
            batch_size=32,
        )
        for name, examples in ((name, run.examples(name)) for name in sets)
    }


def estimate(found: LDS) -> dict[str, float]:
    """Returns what a row says of an LDS."""
    return {"lds": found.value, "low": found.low, "high": found.high}


def saved(path: Path) -> dict:
    """Returns a result that is there; otherwise one whose revision is still to be named."""
    return json.loads(path.read_text()) if path.exists() else {"revision": ""}
