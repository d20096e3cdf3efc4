"""The truth of a run, ensemble/outputs.npz: the queries' losses under retrained models."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dtrak_jax import files

if TYPE_CHECKING:
    from dtrak_jax.run import Run

MIN_SUBSETS = 8
"""The fewest subsets of which an interval says anything."""


@dataclass(frozen=True, eq=False)
class RetrainedLosses:
    """The losses of queries under models that were retrained on subsets.

    Too few subsets, or losses that are not finite, are a ValueError.
    """

    outputs: np.ndarray
    """The losses [subsets, seeds, queries]."""
    masks: np.ndarray
    """True where a training image is in a subset, bool [subsets, train]."""
    query_ids: np.ndarray
    train_ids: np.ndarray

    def __post_init__(self):
        if len(self.masks) < MIN_SUBSETS:
            raise ValueError(
                f"the ensemble has {len(self.masks)} subsets; an interval needs at least "
                f"{MIN_SUBSETS}: set ensemble.subsets and run `dtrak-jax retrain`."
            )
        if not np.isfinite(self.outputs).all():
            raise ValueError("the ensemble's outputs are not all finite.")

    @functools.cached_property
    def target(self) -> np.ndarray:
        """The target of a score: minus the mean loss over seeds [subsets, queries].

        The sign is minus, as a positive score means that the example lowers the loss.
        """
        return -self.outputs.mean(axis=1)

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Returns what additive scores [queries, train] predict, [subsets, queries].

        g(q, S) = sum of tau(q, n) over n in S.
        """
        return self.masks.astype(np.float64) @ np.asarray(scores, np.float64).T


def measured_from(run: "Run") -> dict[str, np.ndarray]:
    """Returns what losses are measured of: all queries, one set after the other."""
    sets = run.queries.values()
    return {
        "query_ids": np.concatenate([examples.ids for examples in sets]),
        "query_digests": np.concatenate([examples.digests for examples in sets]),
        "settings": np.array(run.config.ensemble.measured),
    }


def made_from(run: "Run") -> dict[str, np.ndarray]:
    """Returns what decides the file, but for the numbers of subsets and seeds."""
    sizes = [len(examples) for examples in run.queries.values()]
    sets = {"query_set": np.repeat(list(run.queries), sizes)}
    return measured_from(run) | sets | {"train_ids": run.splits.train.ids}


def save(run: "Run", losses: np.ndarray, masks: np.ndarray) -> None:
    """Writes the losses [subsets, seeds, queries] of all sets, one after the other."""
    outputs = losses.astype(np.float32)
    files.write_npz(run.outputs, outputs=outputs, masks=masks, **made_from(run))


def differing(run: "Run") -> list[str]:
    """Returns what the file has other than this run, or all of it if it is missing."""
    saved = files.read_npz(run.outputs) if run.outputs.exists() else {}
    counts = run.config.ensemble.subsets, run.config.ensemble.seeds
    saved["subsets and seeds"] = np.shape(saved.get("outputs"))[:2]
    expected = made_from(run) | {"subsets and seeds": counts}
    same = {name: np.array_equal(saved.get(name), expected[name]) for name in expected}
    return [name for name in expected if not same[name]]


def load(run: "Run") -> dict[str, RetrainedLosses]:
    """Returns the losses of each set of queries under the retrained models.

    Raises:
      ValueError: the losses are not there, or of another config or other images.
    """
    if names := differing(run):
        raise ValueError(
            f"{run.outputs} is missing, or of other {', '.join(names)} than this run; run "
            "`dtrak-jax retrain` with this config and workdir."
        )
    saved = files.read_npz(run.outputs)
    outputs = saved["outputs"].astype(np.float64)
    masks, train_ids = saved["masks"], saved["train_ids"]
    return {
        name: RetrainedLosses(
            outputs[:, :, saved["query_set"] == name], masks, examples.ids, train_ids
        )
        for name, examples in run.queries.items()
    }
