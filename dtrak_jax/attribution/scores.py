"""Scores with all that is needed to read them later, and their file."""

import dataclasses
import json
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from dtrak_jax import files
from dtrak_jax.attribution.groups import group_scores
from dtrak_jax.attribution.kernel import Damping
from dtrak_jax.checks import at_least, instance, shown

if TYPE_CHECKING:
    from dtrak_jax.report.gallery import Gallery

SIGN = "positive: training on the example lowered the query's loss"


class Top(NamedTuple):
    """The strongest training examples of every query, all [queries, count]."""

    ids: np.ndarray
    scores: np.ndarray
    index: np.ndarray  # columns of `Scores.scores`


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of every training example for every query.

    Positive means that training on the example lowered the query's loss. Damping, lambdas
    and eigenvalues are None for a method without a kernel.
    """

    scores: np.ndarray  # float32 [queries, train]
    train_ids: np.ndarray  # str [train]
    query_ids: np.ndarray  # str [queries]
    method: str
    damping: Damping | None = None
    lambdas: np.ndarray | None = None
    """The lambda of every kernel whose scores were added [kernels]."""
    eigenvalues: np.ndarray | None = None
    """The eigenvalues of every kernel, ascending [kernels, min(train, k)]; None of solver
    "cg"."""
    made_from: str = ""
    """A hash of what the scores were made from; "" if nobody keeps it."""

    def __post_init__(self):
        instance("method", self.method, str)
        instance("damping", self.damping, Damping, NoneType)
        for name in ("scores", "train_ids", "query_ids"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        for name in ("train_ids", "query_ids"):
            ids = getattr(self, name)
            if ids.ndim != 1 or ids.dtype.kind != "U":
                raise TypeError(
                    f"{name} is {shown(ids)}; it must be a list of strings."
                )
        shape = len(self.query_ids), len(self.train_ids)
        if self.scores.shape != shape:
            raise ValueError(
                f"scores have shape {self.scores.shape}; for the ids of {shape[0]} "
                f"queries and {shape[1]} training examples it must be {shape}."
            )

    def __repr__(self) -> str:
        queries, train = self.scores.shape
        damping = ""
        if self.damping is not None:
            unit = "λ = " if self.damping.absolute else "damping "
            damping = f", {unit}{self.damping.value:g}"
        shape = f"{queries} queries × {train} training images"
        return f"Scores({self.method}, {shape}{damping})"

    def __getitem__(self, query: str) -> Top:
        """Returns all training examples of the query with this id, the strongest first.

        Its arrays are [train]. An unknown id is a KeyError.
        """
        names = self.query_ids.tolist() if isinstance(query, str) else []
        rows = [row for row, name in enumerate(names) if name == query]
        if not rows:
            known = ", ".join(map(repr, map(str, self.query_ids[:5])))
            more = ", ..." if len(self.query_ids) > 5 else ""
            raise KeyError(f"{shown(query)} is no query's id; they are {known}{more}")
        ids = self.query_ids[rows]
        alone = dataclasses.replace(self, scores=self.scores[rows], query_ids=ids)
        return Top(*(column[0] for column in alone.top(len(self.train_ids))))

    def to_pandas(self):
        """Returns a `pandas.DataFrame` with a row for each query and a column for each
        training example, named by their ids."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'to_pandas needs pandas: pip install "dtrak-jax[pandas]"'
            ) from error
        columns = pandas.Index(self.train_ids, name="train")
        index = pandas.Index(self.query_ids, name="query")
        return pandas.DataFrame(self.scores, index, columns)

    def show(self, images, queries, top: int = 5, count: int = 10) -> "Gallery":
        """Returns a table of the first `count` queries, each with the pictures of its
        `top` strongest training examples, which a notebook shows.

        Images and queries are what was scored, in its order: pictures in [-1, 1] or of
        uint8, [n, height, width, 1 or 3], or data sets. Else it is a ValueError.
        """
        # What draws takes a second to import.
        from dtrak_jax.report.gallery import gallery

        return gallery(self, images, queries, top, count)

    def top(self, count: int, opposing: bool = False) -> Top:
        """Returns every query's highest scores, or the lowest, the strongest first."""
        instance("opposing", opposing, bool, np.bool_)
        count = at_least("count", count, 1, self.scores.shape[1])
        order = self.scores if opposing else -self.scores
        # Stable, so that equal scores come in the order of the training set.
        index = np.argsort(order, axis=1, kind="stable")[:, :count]
        scores = np.take_along_axis(self.scores, index, axis=1)
        return Top(self.train_ids[index], scores, index)

    def group(
        self, column: Sequence[str] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the names of the groups of a column, and their scores [queries, groups],
        see `group_scores`."""
        return group_scores(self.scores, column)

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz, whole or not at all."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.damping is not None:
            fields["damping"] = json.dumps(self.damping._asdict())
        arrays = {name: value for name, value in fields.items() if value is not None}
        files.write_npz(path, **arrays, sign=SIGN)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Scores":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is damaged, or holds no scores.
        """
        saved = files.read_npz(path)
        missing = {"scores", "train_ids", "query_ids", "method"} - saved.keys()
        if missing:
            raise ValueError(f"{path} holds no scores: {min(missing)!r} is missing.")
        if "damping" in saved:
            saved["damping"] = Damping(**json.loads(str(saved["damping"])))
        for name in ("method", "made_from"):
            saved[name] = str(saved.get(name, ""))
        return cls(**{f.name: saved.get(f.name) for f in dataclasses.fields(cls)})


def ensemble_mean(scores: Sequence[Scores]) -> Scores:
    """Returns the mean of the scores of S models, (1/S) sum_s tau_s(q, n).

    Park et al., "TRAK" (arXiv 2303.14186) average over models trained on different
    subsets, each with its own features and kernel; so do the D-TRAK paper's ensembles.
    The mean keeps a damping that all models share, and no kernel. Scores that do not
    belong together raise a ValueError.
    """
    if not scores:
        raise ValueError("scores is empty; an ensemble needs those of a model or more.")
    first = scores[0]
    compared = {"method": "method", "train_ids": "training images"}
    compared["query_ids"] = "queries"
    for index, member in enumerate(scores):
        for name, what in compared.items():
            if not np.array_equal(getattr(member, name), getattr(first, name)):
                raise ValueError(
                    f"scores[{index}] and scores[0] differ in {what}; an ensemble needs "
                    "scores of one method for the same queries and training examples, in "
                    "the same order."
                )
    mean = sum(member.scores.astype(np.float64) for member in scores) / len(scores)
    dampings = {member.damping for member in scores}
    return Scores(
        *(mean.astype(np.float32), first.train_ids, first.query_ids, first.method),
        first.damping if len(dampings) == 1 else None,
    )
