"""Attribution scores, with all that is needed to read them later."""

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from dtrak_jax import files

SIGN = "positive: training on the example lowered the query's loss"


class Top(NamedTuple):
    """The strongest training examples of every query."""

    ids: np.ndarray
    """str [queries, count]"""
    scores: np.ndarray
    """[queries, count]"""
    index: np.ndarray
    """Columns of `Scores.scores` [queries, count]."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What each training example did for each query.

    Attributes:
      scores: float32 [queries, train]; positive means that training on the example
        lowered the query's loss.
      train_ids: str [train].
      query_ids: str [queries].
      method: such as "dtrak".
      damping: the setting: value, and whether it was absolute; None, as the next two,
        if the method has no kernel.
      lambdas: the lambda of every kernel whose scores were added [kernels].
      eigenvalues: of every kernel, ascending [kernels, min(train, k)]; None if solver
        "cg" made the scores.
    """

    scores: np.ndarray
    train_ids: np.ndarray
    query_ids: np.ndarray
    method: str
    damping: tuple[float, bool] | None = None
    lambdas: np.ndarray | None = None
    eigenvalues: np.ndarray | None = None

    def top(self, count: int, opposing: bool = False) -> Top:
        """The `count` training examples with the highest scores, highest first.

        Args:
          count: 1 to the number of training examples.
          opposing: the lowest scores instead, lowest first.

        Raises:
          ValueError: count is out of range.
        """
        if not 1 <= count <= self.scores.shape[1]:
            raise ValueError(
                f"count is {count}; it must be 1 to {self.scores.shape[1]}, the "
                "number of training examples."
            )
        # Stable, so that equal scores come in the order of the training set.
        order = np.argsort(
            self.scores if opposing else -self.scores, axis=1, kind="stable"
        )
        index = order[:, :count]
        return Top(
            self.train_ids[index], np.take_along_axis(self.scores, index, 1), index
        )

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz, whole or not at all."""
        arrays = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        if self.damping is not None:
            value, absolute = self.damping
            arrays["damping"] = json.dumps({"value": value, "absolute": absolute})
        there = {name: array for name, array in arrays.items() if array is not None}
        files.write_npz(path, **there, sign=SIGN)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Scores":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is none.
          ValueError: damaged, or no scores.
        """
        saved = files.read_npz(path)
        try:
            damping = None
            if "damping" in saved:
                setting = json.loads(str(saved["damping"]))
                damping = (setting["value"], setting["absolute"])
            return cls(
                scores=saved["scores"],
                train_ids=saved["train_ids"],
                query_ids=saved["query_ids"],
                method=str(saved["method"]),
                damping=damping,
                lambdas=saved.get("lambdas"),
                eigenvalues=saved.get("eigenvalues"),
            )
        except KeyError as error:
            raise ValueError(f"{path} holds no scores: {error} is missing.") from error


def ensemble_mean(scores: Sequence[Scores]) -> Scores:
    """The mean of the raw scores of S models: the TRAK and D-TRAK ensembles.

    tau(q, n) = (1/S) sum_s tau_s(q, n)

    Park et al., "TRAK" (arXiv 2303.14186) average over models trained on different
    subsets, each with its own features and kernel; so do the D-TRAK paper's ensembles.

    Args:
      scores: of the same method, queries and training set, one for each model.

    Returns:
      Scores with the method's name and "-ensemble". The damping is kept if all models
      have the same; their kernels are not.

    Raises:
      ValueError: there are none, or two that do not belong together.
    """
    if not scores:
        raise ValueError(
            "scores is empty; an ensemble needs those of one or more models."
        )
    first = scores[0]
    for index, one in enumerate(scores):
        for name in ("method", "train_ids", "query_ids"):
            if not np.array_equal(getattr(one, name), getattr(first, name)):
                raise ValueError(
                    f"scores[{index}] and scores[0] differ in {name}; an ensemble needs "
                    "scores of one method for the same queries and training examples, in "
                    "the same order."
                )
    total = sum(one.scores.astype(np.float64) for one in scores)
    dampings = {one.damping for one in scores}
    return Scores(
        scores=(total / len(scores)).astype(np.float32),
        train_ids=first.train_ids,
        query_ids=first.query_ids,
        method=f"{first.method}-ensemble",
        damping=first.damping if len(dampings) == 1 else None,
    )
