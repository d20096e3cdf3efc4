"""The truth of a run: the queries' losses under models retrained on subsets."""

from typing import TYPE_CHECKING

import numpy as np

from dtrak_jax import files
from dtrak_jax.evaluation.lds import RetrainedLosses

if TYPE_CHECKING:
    from dtrak_jax.run import Run


def staleness(run: "Run") -> str:
    """Returns why ensemble/outputs.npz is not of this config and data; "" if it is."""
    if not run.outputs.exists():
        return f"there is no {run.outputs}"
    saved, settings = files.read_npz(run.outputs), run.config.ensemble
    measured = (*saved["outputs"].shape[:2], str(saved["settings"]))
    expected = (settings.subsets, settings.seeds, run.config.ensemble.measured)
    if measured != expected:
        return (
            f"{run.outputs} is of subsets, seeds and losses {measured}; the config asks for "
            f"{expected}"
        )
    if not np.array_equal(saved["train_ids"], run.splits.train.ids):
        return f"{run.outputs} is of other training images than this run's"
    for name, examples in run.queries.items():
        chosen = saved["query_set"] == name
        columns = {"query_ids": examples.ids, "query_digests": examples.digests}
        if any(not np.array_equal(saved[c][chosen], now) for c, now in columns.items()):
            return f"{run.outputs} is of other {name} queries than this run's"
    return ""


def load(run: "Run") -> dict[str, RetrainedLosses]:
    """Returns the losses of each set of queries under the retrained models.

    Raises:
      ValueError: the losses are not there, or of another config or other images.
    """
    stale = staleness(run)
    if stale:
        raise ValueError(
            f"{stale}; run `dtrak-jax retrain` with this config and workdir."
        )
    saved = files.read_npz(run.outputs)
    return {
        name: RetrainedLosses(
            saved["outputs"][:, :, saved["query_set"] == name].astype(np.float64),
            saved["masks"],
            examples.ids,
            saved["train_ids"],
        )
        for name, examples in run.queries.items()
    }
