"""The truth of a run, ensemble/outputs.npz: the queries' losses under retrained models."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dtrak_jax import files
from dtrak_jax.evaluation.statistics import RESAMPLES, resamples

if TYPE_CHECKING:
    from dtrak_jax.run import Run

MIN_SUBSETS = 8
"""The fewest subsets of which an interval says anything."""


@dataclass(frozen=True, eq=False)
class RetrainedLosses:
    """The losses of queries under models that were retrained on subsets.

    Raises:
      ValueError: arrays that do not fit together, or too few subsets.
    """

    outputs: np.ndarray
    """The losses [subsets, seeds, queries]."""
    masks: np.ndarray
    """True where a training image is in a subset, bool [subsets, train]."""
    query_ids: np.ndarray
    train_ids: np.ndarray

    def __post_init__(self):
        subsets, n, queries = map(len, (self.masks, self.train_ids, self.query_ids))
        shapes = self.masks.shape, (len(self.outputs), self.outputs.shape[2])
        if shapes != ((subsets, n), (subsets, queries)):
            raise ValueError(
                f"outputs {self.outputs.shape} and masks {self.masks.shape} do not fit "
                f"{n} training images and {queries} queries."
            )
        if subsets < MIN_SUBSETS:
            raise ValueError(
                f"the ensemble has {subsets} subsets; an interval needs at least "
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

    @functools.cached_property
    def subset_weights(self) -> np.ndarray:
        """The resamples of subsets that all intervals share [RESAMPLES, subsets]."""
        return resamples(len(self.masks), RESAMPLES, 0)

    @functools.cached_property
    def query_weights(self) -> np.ndarray:
        """The resamples of queries, as shares [RESAMPLES, queries]."""
        counts = resamples(len(self.query_ids), RESAMPLES, 1)
        return counts / len(self.query_ids)

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Returns what additive scores [queries, train] predict, [subsets, queries].

        g(q, S) = sum of tau(q, n) over n in S.
        """
        return self.masks.astype(np.float64) @ np.asarray(scores, np.float64).T


def described_queries(run: "Run") -> dict[str, np.ndarray]:
    """Returns the ids and digests of all queries, one set after the other."""
    sets = run.queries.values()
    return {
        "query_ids": np.concatenate([examples.ids for examples in sets]),
        "query_digests": np.concatenate([examples.digests for examples in sets]),
    }


def save(run: "Run", losses: np.ndarray, masks: np.ndarray) -> None:
    """Writes the losses [subsets, seeds, queries] of all queries, set after set."""
    sizes = [len(examples) for examples in run.queries.values()]
    files.write_npz(
        run.outputs,
        outputs=losses.astype(np.float32),
        masks=masks,
        train_ids=run.splits.train.ids,
        **described_queries(run),
        query_set=np.repeat(list(run.queries), sizes),
        settings=run.config.ensemble.measured,
    )


def staleness(run: "Run") -> str:
    """Returns why the file is not of this config and data; "" if it is."""
    if not run.outputs.exists():
        return f"there is no {run.outputs}"
    saved, settings = files.read_npz(run.outputs), run.config.ensemble
    measured = (*saved["outputs"].shape[:2], str(saved["settings"]))
    expected = (settings.subsets, settings.seeds, settings.measured)
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
    if stale := staleness(run):
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
