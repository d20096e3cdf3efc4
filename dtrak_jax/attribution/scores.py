"""Attribution scores, with all that is needed to read them later."""

import dataclasses
import json
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
      damping: the setting: value, and whether it was absolute.
      lambdas: the lambda of every kernel whose scores were added [kernels].
      eigenvalues: of every kernel, ascending [kernels, min(train, k)].
    """

    scores: np.ndarray
    train_ids: np.ndarray
    query_ids: np.ndarray
    method: str
    damping: tuple[float, bool]
    lambdas: np.ndarray
    eigenvalues: np.ndarray

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
        files.write_npz(
            path,
            scores=self.scores,
            train_ids=self.train_ids,
            query_ids=self.query_ids,
            method=self.method,
            damping=json.dumps({"value": self.damping[0], "absolute": self.damping[1]}),
            lambdas=self.lambdas,
            eigenvalues=self.eigenvalues,
            sign=SIGN,
        )

    @classmethod
    def load(cls, path: epath.PathLike) -> "Scores":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is none.
          ValueError: damaged, or no scores.
        """
        saved = files.read_npz(path)
        try:
            damping = json.loads(str(saved["damping"]))
            return cls(
                scores=saved["scores"],
                train_ids=saved["train_ids"],
                query_ids=saved["query_ids"],
                method=str(saved["method"]),
                damping=(damping["value"], damping["absolute"]),
                lambdas=saved["lambdas"],
                eigenvalues=saved["eigenvalues"],
            )
        except KeyError as error:
            raise ValueError(f"{path} holds no scores: {error} is missing.") from error
