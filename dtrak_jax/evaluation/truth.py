"""The truth that scores must predict: the queries' losses under retrained models."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from dtrak_jax import data, files, training
from dtrak_jax.checks import check_ids, real_numbers

if TYPE_CHECKING:
    from dtrak_jax.run import Run

MIN_SUBSETS = 8
"""The fewest subsets of which an interval says anything; what is chosen on one half of
them and scored on the other needs twice as many."""

WORDS = {
    "train_ids": "training images",
    "query_ids": "queries",
    "query_digests": "pictures of queries",
    "query_set": "sets of queries",
    "measured": "settings of losses",
    "settings": "settings of losses",
}
"""The words for what files of losses are compared by, where their names are others."""


def check_subsets(count: int) -> None:
    """Raises a ValueError unless there are enough subsets for an LDS."""
    if count < MIN_SUBSETS:
        raise ValueError(
            f"the ensemble has {count} subsets; an interval needs at least "
            f"{MIN_SUBSETS}: set ensemble.subsets, or subsets of dtrak.retrain, and "
            "retrain on more."
        )


def check_fraction(name: str, fraction: float, n: int) -> None:
    """Raises a ValueError unless a subset has some of n training images, and not all."""
    size = round(fraction * n)
    if not 1 <= size < n:
        raise ValueError(
            f"{name} is {fraction}: of {n} training images a subset would have {size}; "
            f"it must have 1 to {n - 1}."
        )


def named(ids: Sequence[str] | np.ndarray | None, count: int) -> np.ndarray:
    """Returns the ids of `count` examples once they are checked; "0", "1", ... if None."""
    ids = map(str, range(count)) if ids is None else check_ids(ids, count)
    return np.array(list(ids), str)


@dataclass(frozen=True, eq=False, repr=False)
class RetrainedLosses:
    """The losses of queries under models that were retrained on subsets.

    Raises:
      ValueError: too few subsets, arrays that do not fit together, or losses that are
        not finite.
    """

    outputs: np.ndarray
    """The losses [subsets, seeds, queries]; [subsets, queries] where there is one seed."""
    masks: np.ndarray
    """True where a training image is in a subset, bool [subsets, train]."""
    query_ids: np.ndarray | None = None
    """str [queries]; "0", "1", ... if None."""
    train_ids: np.ndarray | None = None
    """str [train]; "0", "1", ... if None."""

    def __post_init__(self):
        outputs, masks = real_numbers("outputs", self.outputs), np.array(self.masks)
        outputs = outputs[:, None] if outputs.ndim == 2 else outputs
        if masks.dtype != bool:
            raise ValueError(f"masks are {masks.dtype}; they must be bool.")
        if outputs.ndim != 3 or masks.ndim != 2 or len(outputs) != len(masks):
            raise ValueError(
                f"outputs have shape {outputs.shape} and masks {masks.shape}; they must "
                "be [subsets, seeds, queries] and [subsets, train]."
            )
        check_subsets(len(masks))
        if not np.isfinite(outputs).all():
            raise ValueError("the ensemble's outputs are not all finite.")
        for name, value in (
            ("outputs", outputs),
            ("masks", masks),
            ("query_ids", named(self.query_ids, outputs.shape[2])),
            ("train_ids", named(self.train_ids, masks.shape[1])),
        ):
            object.__setattr__(self, name, value)
        if (masks == masks[0]).all():
            raise ValueError(
                f"all {len(masks)} masks are the same subset; nothing can be learnt from "
                "models that differ in no example."
            )

    def __repr__(self) -> str:
        subsets, seeds, queries = self.outputs.shape
        inside = round(self.masks.sum(axis=1).mean())
        return (
            f"RetrainedLosses({queries} queries, {subsets} subsets × {seeds} seeds, "
            f"{inside} of {self.masks.shape[1]} images in each)"
        )

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
        scores, masks = np.asarray(scores, np.float64), self.masks.astype(np.float64)
        # Sums of a constant would differ by rounding, and ranks take that for an order.
        first = scores[:, :1]
        return masks @ (scores - first).T + masks.sum(axis=1, keepdims=True) * first.T

    def unranked(self, predictions: np.ndarray) -> tuple[np.ndarray, str]:
        """Returns the queries that have no correlation, bool [queries], and a sentence.

        Their predictions [subsets, queries], or their losses, are the same in all subsets.
        """
        same, clauses = np.zeros(len(self.query_ids), bool), []
        for name, values in (("prediction", predictions), ("loss", self.target)):
            constant = np.ptp(values, axis=0) == 0
            same |= constant
            if constant.any():
                query = str(self.query_ids[np.argmax(constant)])
                clauses.append(
                    f"{constant.sum()} of {len(same)} queries, such as {query!r}, have "
                    f"the same {name} for every subset"
                )
        return same, f"{', and '.join(clauses)}: no correlation is defined for them"


def subset_masks(
    ids: Sequence[str] | np.ndarray,
    labels: Sequence | np.ndarray | None,
    seed: int,
    subsets: int,
    fraction: float,
) -> np.ndarray:
    """Returns which examples are in each subset, bool [subsets, n]; see
    `data.subset_mask`."""
    members = range(subsets)
    masks = [data.subset_mask(ids, labels, seed, m, fraction) for m in members]
    return np.stack(masks)


def member_names(subsets: int, seeds: int) -> list[str]:
    """Returns the models' names: all subsets with the seed 0, then with the next one."""
    return [f"{m:04d}-{seed}" for seed in range(seeds) for m in range(subsets)]


def ensemble(masks: np.ndarray, seeds: int) -> list[training.Member]:
    """Returns the models to train, in the order of `member_names`."""
    names = iter(member_names(len(masks), seeds))
    return [
        training.Member(next(names), np.flatnonzero(mask), seed)
        for seed in range(seeds)
        for mask in masks
    ]


def by_subset(losses: Sequence[np.ndarray], subsets: int) -> np.ndarray:
    """Returns the losses [q] of each model of `ensemble` as [subsets, seeds, q]."""
    losses = np.asarray(losses)
    return losses.reshape(-1, subsets, losses.shape[1]).swapaxes(0, 1)


# The file ensemble/outputs.npz of a run


def measured_from(run: "Run") -> dict[str, np.ndarray]:
    """Returns what losses are measured of: all queries, one set after the other."""
    sets = run.queries.values()
    return {
        "query_ids": np.concatenate([examples.ids for examples in sets]),
        "query_digests": np.concatenate([examples.digests for examples in sets]),
        "settings": np.array(run.config.ensemble.measured),
    }


def query_inputs(run: "Run") -> tuple:
    """Returns what the network is given of all queries [queries, ...], and conditions."""
    x = np.concatenate([run.space.x(name) for name in run.queries])
    conds = [run.space.cond(name) for name in run.queries]
    return x, jax.tree.map(lambda *parts: np.concatenate([p[:] for p in parts]), *conds)


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
    if words := [WORDS.get(name, name) for name in differing(run)]:
        raise ValueError(
            f"{run.outputs} is missing, or of other {', '.join(words)} than this run; run "
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
