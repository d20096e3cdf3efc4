"""Scores with all that is needed to read them later, and their file."""

import dataclasses
import json
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.stats
from etils import epath

from dtrak_jax import files
from dtrak_jax.attribution.damping import Damping
from dtrak_jax.attribution.duplicates import COUNTED_ONCE, merge, once_in_each_group
from dtrak_jax.attribution.groups import (
    Shares,
    check_column,
    check_columns,
    group_scores,
    names_hash,
    overall,
    shares,
)
from dtrak_jax.checks import at_least, between, instance, one_of, shown

if TYPE_CHECKING:
    from dtrak_jax.report.gallery import Gallery

SIGN = "positive: training on the example lowered the query's loss"
NO_SIGN = "none"

NO_ERRORS = (
    "no errors: they take 2 noise draws or more at each timestep, kept apart, and a "
    "method that adds up pairs"
)
"""The reason that goes behind what has none."""

BY_GROUPING = ("columns", "group_errors", "group_freedom")
"""The fields that are dicts, a key of the file for each grouping."""

BY_NAME = (*BY_GROUPING, "layers")
"""All fields that are dicts."""


class Top(NamedTuple):
    """The strongest training examples of every query, all [queries, count]."""

    ids: np.ndarray
    scores: np.ndarray
    index: np.ndarray  # columns of `Scores.scores`
    errors: np.ndarray  # standard errors of the scores; NaN where there are none


class Groups(NamedTuple):
    """The scores of groups of training examples, in the order of their names."""

    names: np.ndarray  # str [groups]
    scores: np.ndarray  # float64 [queries, groups], see `group_scores`
    errors: np.ndarray  # [queries, groups]: their standard errors; NaN without
    sizes: np.ndarray  # int [groups]: the training examples of each
    freedom: float = 0.0  # the degrees of freedom of the errors; 0 if nobody knows

    def shares(self) -> Shares:
        """Returns each query's positive scores as shares that add up to one, and how much
        negative they leave out; see `groups.shares`."""
        return shares(self.scores)

    def overall(self) -> np.ndarray:
        """Returns the value by which groups are ranked over all queries [groups], see
        `groups.overall`."""
        return overall(self.scores)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of every training example for every query.

    Positive means that training on the example lowered the query's loss, unless `signed`
    is False: then all are sizes, and say nothing of a direction. Damping, lambdas
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
    errors: np.ndarray | None = None
    """The standard errors of the scores, float32 [queries, train], see `PairSum`; NaN
    where there are none."""
    spread: np.ndarray | None = None
    """The standard deviation of several models' scores, float32 [queries, train]; None
    of one model."""
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Each training example's group, str [train], by the name of the grouping, such as
    "contributor"."""
    group_errors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """The standard errors of the groups' scores [queries, groups], by `names_hash` of the
    grouping that was scored."""
    group_freedom: dict[str, float] = dataclasses.field(default_factory=dict)
    """The degrees of freedom of `group_errors`, by the same key, see `PairSum`."""
    copies: np.ndarray | None = None
    """The id of the first of each training example's near-duplicates, its own where it
    has none, str [train]; None if nobody looked."""
    freedom: float = 0.0
    """The degrees of freedom of the errors, see `PairSum`; 0 without errors."""
    layers: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """The weight and the share of each group of layers, see `LayerWeights`; {} of a method
    that weighs none."""
    signed: bool = True
    """False where scores have no sign, such as those of coverage."""

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
        if self.errors is None or np.isnan(self.errors).all():
            none = np.broadcast_to(np.float32(np.nan), shape)
            object.__setattr__(self, "errors", none)
        for name in ("scores", "errors", "spread"):
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"{name} have shape {array.shape}; for the ids of {shape[0]} "
                    f"queries and {shape[1]} training examples it must be {shape}."
                )
        object.__setattr__(self, "columns", check_columns(self.columns, shape[1]))
        if self.copies is not None and np.shape(self.copies) != shape[1:]:
            raise ValueError(
                f"copies have shape {np.shape(self.copies)}; they must name an image for "
                f"each of the {shape[1]} training examples."
            )

    def __repr__(self) -> str:
        queries, train = self.scores.shape
        damping = ""
        if self.damping is not None:
            damping = f", {self.damping.words}"
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
        top = self.take(rows).top(len(self.train_ids))
        return Top(*(column[0] for column in top))

    def take(self, rows: Sequence[int] | np.ndarray) -> "Scores":
        """Returns the scores of the queries at these positions."""
        by_group = self.group_errors.items()
        return dataclasses.replace(
            self,
            scores=self.scores[rows],
            query_ids=self.query_ids[rows],
            errors=self.errors[rows],
            spread=None if self.spread is None else self.spread[rows],
            group_errors={key: errors[rows] for key, errors in by_group},
        )

    def to_pandas(self, values: str = "scores"):
        """Returns a `pandas.DataFrame` with a row for each query and a column for each
        training example, named by their ids.

        The values are the "scores", their standard "errors", or the "spread" of several
        models' scores.
        """
        one_of("values", values, ("scores", "errors", "spread"))
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'to_pandas needs pandas: pip install "dtrak-jax[pandas]"'
            ) from error
        columns = pandas.Index(self.train_ids, name="train")
        index = pandas.Index(self.query_ids, name="query")
        return pandas.DataFrame(getattr(self, values), index, columns)

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
        """Returns every query's highest scores, or the lowest, the strongest first.

        Every image is an entry: `merged().top(count)` counts copies of a picture once.
        """
        instance("opposing", opposing, bool, np.bool_)
        count = at_least("count", count, 1, self.scores.shape[1])
        order = self.scores if opposing else -self.scores
        # Stable, so that equal scores come in the order of the training set.
        index = np.argsort(order, axis=1, kind="stable")[:, :count]
        scores, errors = (
            np.take_along_axis(array, index, axis=1)
            for array in (self.scores, self.errors)
        )
        return Top(self.train_ids[index], scores, index, errors)

    @property
    def picture_ids(self) -> np.ndarray:
        """The id of the picture that each training example is, str [train]: its entry of
        `copies`, and its own without them."""
        return self.train_ids if self.copies is None else self.copies

    @property
    def picture_rows(self) -> np.ndarray:
        """The positions of the training examples that are the columns of `merged`."""
        return np.sort(np.unique(self.picture_ids, return_index=True)[1])

    def merged(self) -> "Scores":
        """Returns the scores of pictures: a cluster of `copies` is one training example.

        It has the id of its first image and the sum of its images' scores, the estimate
        for removing all of them; or, by a method in `duplicates.COUNTED_ONCE`, of which
        each copy has the whole score, the highest of them. Its standard error and spread
        are the sum, or the highest, of its images': copies share their noise. Groupings
        are left out; their scores are those of all images, see `group`. Without copies
        it is the same.
        """
        if self.copies is None:
            return self
        function = np.maximum if self.method in COUNTED_ONCE else np.add
        arrays = {}
        for name in ("scores", "errors", "spread"):
            array = getattr(self, name)
            if array is not None:
                first, arrays[name] = merge(array, self.copies, function)
        ids, plain = self.train_ids[first], {key: {} for key in BY_GROUPING}
        return dataclasses.replace(self, **arrays, train_ids=ids, copies=ids, **plain)

    def group(self, column: str | Sequence[str] | np.ndarray) -> Groups:
        """Returns the groups' scores, each the sum of its training examples' scores.

        Copies count as they are, as a score is lower where there is one; but for a
        method in `duplicates.COUNTED_ONCE`, of which a group's copies of a picture count
        with the highest of their scores, and the errors of groups with copies are NaN.

        Args:
          column: the name of a grouping in `columns`, or a group's name for each training
            example [train]. Errors are NaN but for the groupings that were scored, since
            they need the sums made within each draw.

        Raises:
          ValueError: a grouping that is not there, or names of other examples.
        """
        if isinstance(column, str):
            one_of("column", column, self.columns)
            column = self.columns[column]
        column = check_column("column", column, len(self.train_ids))
        key = names_hash(column)
        errors = self.group_errors.get(key)
        names, sums = group_scores(self.counted(column), column)
        if errors is None:
            errors = np.full(sums.shape, np.nan)
        as_they_are = group_scores(self.scores, column)[1]
        errors = np.where(sums == as_they_are, errors, np.nan)
        sizes = np.unique(column, return_counts=True)[1]
        freedom = float(self.group_freedom.get(key, 0))
        return Groups(names, sums, errors, sizes, freedom)

    def counted(self, column: Sequence[str] | np.ndarray) -> np.ndarray:
        """Returns the scores that groups add up [queries, train]: 0 where another copy
        counts, see `group`."""
        if self.copies is None or self.method not in COUNTED_ONCE:
            return self.scores
        return once_in_each_group(self.scores, column, self.copies)

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ends of intervals around the scores, float64 [queries, train] each.

        They are score -+ t error, with t the quantile (1 + level) / 2 of Student's
        distribution with `freedom` degrees of freedom, and are meant to hold the share
        `level` of the scores that many noise draws would give.

        Raises:
          ValueError: there are no errors, or the level is not between 0 and 1.
        """
        level = between("level", level, 0, 1)
        if not self.freedom:
            raise ValueError(f"the scores of {self.method!r} have {NO_ERRORS}.")
        half = scipy.stats.t.ppf((1 + level) / 2, self.freedom) * self.errors
        return self.scores - half, self.scores + half

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz, whole or not at all."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.damping is not None:
            fields["damping"] = json.dumps(self.damping._asdict())
        for name in BY_NAME:
            by_name = fields.pop(name)
            fields |= {f"{name}/{key}": array for key, array in by_name.items()}
        sign = SIGN if fields.pop("signed") else NO_SIGN
        arrays = {name: value for name, value in fields.items() if value is not None}
        files.write_npz(path, **arrays, sign=sign)

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
        saved["freedom"] = float(saved.get("freedom", 0))
        saved["signed"] = str(saved.get("sign", SIGN)) != NO_SIGN
        for name in BY_NAME:
            keys = [key for key in saved if key.startswith(f"{name}/")]
            saved[name] = {key.removeprefix(f"{name}/"): saved[key] for key in keys}
        return cls(**{f.name: saved.get(f.name) for f in dataclasses.fields(cls)})
