"""The LDS for a model of one's own: retraining by any function, and what scores predict.

The stages `retrain` and `lds` of a run choose the same subsets and compute the same
numbers; they differ in that they train and measure many models at once.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dtrak_jax import files
from dtrak_jax.attribution import Predictions, Scores
from dtrak_jax.checks import (
    at_least,
    between,
    check_ids,
    function,
    instance,
    items,
    real_numbers,
)
from dtrak_jax.digests import digest_tree
from dtrak_jax.evaluation.datamodeling import bootstrap, ceiling
from dtrak_jax.evaluation.lds import scored_rows, with_controls
from dtrak_jax.evaluation.statistics import Estimate, interval, spearman
from dtrak_jax.evaluation.truth import (
    WORDS,
    RetrainedLosses,
    by_subset,
    check_fraction,
    check_subsets,
    ensemble,
    named,
    subset_masks,
)
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard

AnyScores = Scores | np.ndarray


@standard()
def retrain(
    train: Callable[[np.ndarray, int], Any],
    n: int,
    losses: Callable[[Any], np.ndarray],
    *,
    subsets: int = 64,
    seeds: int = 1,
    fraction: float = 0.5,
    ids: Sequence[str] | None = None,
    labels: Sequence | None = None,
    query_ids: Sequence[str] | None = None,
    seed: int = 0,
    store: epath.PathLike | None = None,
    version: str = "",
) -> RetrainedLosses:
    """Trains a model on each of many random subsets, and measures every query's loss.

    Subsets are stratified choices of round(fraction n) examples, functions of seed, ids
    and labels. 64 subsets show a strong method; from 2 seeds on there is a ceiling.

    Args:
      train: (rows, seed) -> a model trained as the one that was attributed, but on the
        examples with these indices alone, for as many epochs; in any framework. `rows`
        is int [m], ascending; `seed` is 0, 1, ... and decides all else that is random.
      n: the number of training examples.
      losses: model -> the loss of every query, [queries], with the same noise for every
        model: `QueryLosses`, or a function of one's own.
      ids: the names of the training examples as in `featurize`; "0", "1", ... if None.
      labels: a label for each, of which every subset gets its share; or None.
      query_ids: the names of the queries, in the order of `losses`, whose own they must
        be if it has any; those, or "0", "1", ... if None.
      store: a folder that gets a file for each model once it is measured, so that the
        same call continues where it was stopped. It compares the examples of each model,
        the queries' ids and the settings of `QueryLosses`, and no other functions.
      version: a name of these, such as "lr 1e-4", which the store compares too.

    Raises:
      ValueError: a setting is wrong or the store is of other settings, before anything
        is trained; or losses are not finite, of the wrong shape, or the same whatever a
        model was trained on.
      OSError: before anything is trained, where `store` is a file.
    """
    function("train", train)
    function("losses", losses)
    instance("version", version, str)
    if store is not None:
        files.check_folder("store", store)
    _check_sizes(n, subsets, seeds, fraction)
    at_least("seed", seed, 0)
    train_ids, labels = named(ids, n), None if labels is None else np.asarray(labels)
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"labels have shape {labels.shape}; they must be [{n}].")
    masks = subset_masks(train_ids, labels, seed, subsets, fraction)
    query_ids = getattr(losses, "ids", None) if query_ids is None else query_ids
    measured_by = getattr(losses, "made_from", "")
    made_from = {"measured": np.array(measured_by), "version": np.array(version)}
    if query_ids is not None:
        query_ids = check_ids(query_ids, len(items("query_ids", query_ids)))
        check_order(losses, query_ids, "query_ids")
        made_from["query_ids"] = np.array(query_ids, str)
    measured: list[np.ndarray] = []
    members = ensemble(masks, seeds)
    for member in progress(members, "retrain", unit="model"):
        rows_from = made_from | {"train_ids": train_ids[member.rows]}
        path = None if store is None else files.at(store) / f"{member.name}.npz"
        saved = kept(path, rows_from) or {}
        values = saved.get("outputs")
        if values is None:
            values = losses(train(member.rows.copy(), member.seed))
        expected = query_ids if query_ids is not None or not measured else measured[0]
        values = checked(member.name, values, expected)
        if path and not saved:
            files.write_npz(path, outputs=values, **rows_from)
        measured.append(values)
        if len(measured) == 2 and (masks[0] != masks[1]).any():
            _check_differing(*measured)
    outputs = by_subset(measured, subsets)
    _warn_of_equal(outputs)
    return RetrainedLosses(outputs, masks, query_ids, train_ids)


def _warn_of_equal(outputs: np.ndarray) -> None:
    """Warns of losses [subsets, seeds, queries] that do not depend on the seed."""
    seeds = outputs.shape[1]
    if seeds > 1 and (outputs == outputs[:, :1]).all():
        warnings.warn(
            f"the losses are the same for all {seeds} seeds: unless training is "
            "deterministic, train does not use its seed, and the noise ceiling is "
            "meaningless.",
            stacklevel=3,
        )


def check_order(losses: Any, ids: Sequence[str], name: str) -> None:
    """Raises a ValueError if losses, such as `QueryLosses`, have the ids of other queries,
    or in another order, than what is called `name`.

    Ids "0", "1", ... are no names that anybody gave.
    """
    given = getattr(losses, "ids", None)
    if given is None:
        return
    own, others = list(map(str, given)), list(map(str, ids))
    unnamed = [of for of in (own, others) if of == named(None, len(of)).tolist()]
    if own == others or unnamed:
        return
    i = next((i for i, (a, b) in enumerate(zip(own, others)) if a != b), 0)
    raise ValueError(
        f"losses are of {len(own)} queries and {name} of {len(others)}: at position {i} "
        f"is {own[i]!r} and {others[i]!r}. They must be of the same queries, in the same "
        "order."
    )


def _check_sizes(n: int, subsets: int, seeds: int, fraction: float) -> None:
    """Raises a ValueError unless there are enough subsets, of some examples each."""
    for name, value, low in (("n", n, 2), ("subsets", subsets, 1), ("seeds", seeds, 1)):
        at_least(name, value, low)
    check_subsets(subsets)
    between("fraction", fraction, 0.01, 0.99)
    check_fraction("fraction", fraction, n)


def kept(path: epath.Path | None, made_from: Mapping[str, np.ndarray]) -> dict | None:
    """Returns what a store has of a model, or None; a ValueError if of something else."""
    if not path or not path.exists():
        return None
    saved = files.read_npz(path)
    for name, value in made_from.items():
        # A file without a version is of functions without one.
        if not np.array_equal(saved.get(name, ""), value):
            raise ValueError(
                f"{path} is of a call with other {WORDS.get(name, name)}. Name another "
                "store, or delete this one."
            )
    return saved


def checked(name: str, values: Any, queries: Sequence | None) -> np.ndarray:
    """Returns a model's losses, float64 [queries], once they are sure to be right.

    `queries` has an item for each query; None if nobody knows how many there are.
    """
    values = real_numbers("what losses returns", values)
    count = values.size if queries is None else len(queries)
    if values.shape != (count,) or not count:
        raise ValueError(
            f"losses has returned an array of shape {values.shape}; it must have a loss "
            f"for each query, [{'queries' if queries is None else count}]."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"the losses of the model {name} are not all finite.")
    return values


def _check_differing(first: np.ndarray, second: np.ndarray) -> None:
    """Raises a ValueError if models trained on different examples have equal losses."""
    if np.array_equal(first, second):
        raise ValueError(
            "two models that were trained on different examples have exactly the same "
            "losses: train must use its rows, and losses the model that it is given."
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LDS:
    """The linear datamodeling score: do scores predict what retraining does?"""

    value: float
    """The mean over queries of Spearman's correlation over subsets, in [-1, 1]."""
    low: float
    """The 95% interval, of other subsets and other queries."""
    high: float
    ceiling: Estimate | None
    """The LDS that the truth itself would have, with its interval; None of one seed."""
    per_query: np.ndarray
    """Spearman's correlation of each query [queries]."""
    query_ids: np.ndarray
    train: int
    """The number of training examples."""
    shape: tuple[int, int]
    """The numbers of subsets and of seeds."""
    samples: np.ndarray
    """The bootstrap samples behind the interval."""
    truth: str
    """A hash of the retrained models' subsets and losses."""

    def less(self, other: "LDS") -> Estimate:
        """Returns the difference to another LDS of the same truth, with its interval.

        It is that of a paired comparison, and sharper than the two intervals.
        """
        instance("other", other, LDS)
        if self.truth != other.truth:
            raise ValueError("the two LDS are not of the same retrained models.")
        return interval(self.value - other.value, self.samples - other.samples)

    def __repr__(self) -> str:
        best, (subsets, seeds) = self.ceiling, self.shape
        words = [f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"]
        words += [f"ceiling {best.value:.3f}"] if best else []
        words += [
            f"{len(self.per_query)} queries",
            f"{subsets} subsets × {seeds} seeds",
        ]
        return f"LDS({', '.join(words)})"


@standard()
def lds(scores: AnyScores | Predictions, truth: RetrainedLosses) -> LDS:
    """Returns the linear datamodeling score (Park et al., arXiv 2303.14186, section 3).

    For each query: Spearman's correlation, over the subsets of `retrain`, of the sum of
    the scores of a subset's examples and minus the query's loss after training on it.
    It is 0 for scores that predict nothing, and counts as 0, with a warning, for a query
    whose predictions or losses are the same for all subsets. The ceiling is what noise of
    training leaves to be predicted.

    Args:
      scores: of `attribute`, matched by ids; or an array [queries, train] in the order
        of the truth, positive where the example lowers the query's loss; or what `predict`
        says of each of the truth's subsets.
      truth: of `retrain`.

    Raises:
      ValueError: scores and truth are of other queries or training examples; or no query
        has a correlation.
    """
    instance("truth", truth, RetrainedLosses)
    predictions = predicted(scores, truth)
    unranked, sentence = truth.unranked(predictions)
    if unranked.all():
        raise ValueError(
            f"{sentence}. Scores must differ between training examples, and losses "
            "between subsets."
        )
    if unranked.any():
        warnings.warn(f"{sentence}, and counts as 0.", stacklevel=2)
    estimate, samples = bootstrap(predictions, truth)
    per_query = spearman(predictions, truth.target)
    shape = truth.outputs.shape[:2]
    sizes = per_query, truth.query_ids, len(truth.train_ids), shape
    models = digest_tree((truth.masks, truth.outputs, truth.query_ids.tolist()))
    return LDS(*estimate, ceiling(truth), *sizes, samples, models)


def record(scores: Mapping[str, AnyScores], truth: RetrainedLosses) -> dict:
    """Returns what lds.json says of one set of queries, of scores by method."""
    rows, compared = [], {}
    for name, given in scores.items():
        compared[name], squared = scored_rows(name, fitting(given, truth), truth)
        rows += [compared[name][0], squared]
    return with_controls(rows, compared, truth) | {"curves": {}}


def predicted(scores: AnyScores | Predictions, truth: RetrainedLosses) -> np.ndarray:
    """Returns what scores, or predictions of the same subsets, say [subsets, queries]."""
    if not isinstance(scores, Predictions):
        return truth.predict(fitting(scores, truth))
    queries, train = _orders(scores, truth)
    shape = len(scores.subsets), len(scores.query_ids)
    if np.shape(scores.values) != shape or not np.isfinite(scores.values).all():
        raise ValueError(
            f"predictions have shape {np.shape(scores.values)}; they must be finite, and "
            f"{list(shape)}: a row for each subset and a column for each query."
        )
    if not np.array_equal(scores.subsets[:, train], truth.masks):
        raise ValueError(
            "the predictions are of other subsets than the truth: give `predict` its masks."
        )
    return scores.values[:, queries]


def _orders(scores: Scores | Predictions, truth: RetrainedLosses) -> list[list[int]]:
    """Returns where the queries and the training examples of the truth are in scores."""
    orders = []
    for name in ("query_ids", "train_ids"):
        ids = getattr(truth, name).tolist()
        places = {str(key): i for i, key in enumerate(getattr(scores, name))}
        if places.keys() != set(ids):
            differing = min(places.keys() ^ set(ids))
            raise ValueError(
                f"the ids of {WORDS[name]} differ between scores and truth, such as "
                f"by {differing!r}: give `retrain` the ids of `featurize`."
            )
        orders.append([places[key] for key in ids])
    return orders


def fitting(scores: AnyScores, truth: RetrainedLosses) -> np.ndarray:
    """Returns scores [queries, train] in the order of the truth; see `lds`."""
    if isinstance(scores, Scores):
        values = np.asarray(scores.scores)[np.ix_(*_orders(scores, truth))]
    else:
        values = real_numbers("scores", scores)
    shape = len(truth.query_ids), len(truth.train_ids)
    if values.shape != shape or not np.isfinite(values).all():
        raise ValueError(
            f"scores have shape {values.shape}; they must be finite, and {list(shape)}: "
            "a row for each query and a column for each training example of the truth."
        )
    return values
