"""Counterfactuals of a model of one's own: pictures without their strongest examples.

The stage `counterfactual` of a run removes the same examples and computes the same
numbers; it differs in that it trains many models at once.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
from etils import epath

from dtrak_jax import files
from dtrak_jax.attribution import Scores
from dtrak_jax.checks import at_least, instance, real_numbers
from dtrak_jax.digests import short_digest
from dtrak_jax.evaluation.changes import distances, flattened, loss_increase, tables
from dtrak_jax.evaluation.functions import Functions, check_pictures
from dtrak_jax.evaluation.removals import (
    EVERYTHING,
    SET,
    Choice,
    Removal,
    check_count,
    check_names,
    chosen_queries,
    removals,
    removed_ids,
    removed_rows,
)
from dtrak_jax.evaluation.trust import AnyScores, check_order, kept
from dtrak_jax.evaluation.truth import named
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Counterfactual:
    """The pictures without the training examples that scores rank first, and metrics."""

    settings: dict[str, Any]
    rows: list[dict]
    """The metrics of every choice of what is removed, and query."""
    summary: list[dict]
    """The median and mean of every choice's metrics, with 95% intervals."""
    differences: list[dict]
    """The same of every method's metrics less those of random removal, by query."""
    removed: dict[str, dict[str, list[str]]]
    """The ids of the training examples that were removed, {choice: {query: ids}}, the
    strongest first."""
    images: dict[str, np.ndarray]
    """The pictures by choice, beside "original" and "query_ids"."""

    def __repr__(self) -> str:
        words = [
            "{0} {median:.3g} [{median_low:.3g}, {median_high:.3g}]".format(
                Choice(row["method"], row["transform"]).name, **row
            )
            for row in self.summary
            if row["metric"] == "pixel_l2"
        ]
        return (
            f"Counterfactual({len(self.settings['queries'])} queries, "
            f"{self.settings['count']} of {self.settings['train']} removed, median "
            f"pixel_l2: {', '.join(words)})"
        )

    def record(self) -> dict:
        """Returns what counterfactual.json says."""
        parts = ("settings", "rows", "summary", "differences", "removed")
        return {name: getattr(self, name) for name in parts}


@standard()
def counterfactual(
    scores: AnyScores | Mapping[str, AnyScores],
    train: Callable[[np.ndarray, int], Any],
    generate: Callable[[Any, np.ndarray], np.ndarray],
    originals: np.ndarray,
    *,
    count: int,
    sets: Mapping[str, np.ndarray] | None = None,
    queries: int | None = None,
    train_seed: int = 0,
    embeddings: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    losses: Callable[[Any], np.ndarray] | None = None,
    seed: int = 0,
    store: epath.PathLike | None = None,
    version: str = "",
) -> Counterfactual:
    """Retrains without the strongest examples of each query, and makes its picture again.

    The last evaluation of Zheng et al. (arXiv 2311.00500): the more a picture changes,
    compared with removing as many random examples, the better the scores. For every
    method and query a model is trained, for every query one without random examples,
    and two on everything: with the same seed ("everything", which makes the same
    pictures where training is deterministic) and with the next one ("other-seed").

    Args:
      scores: of `attribute`, or an array [queries, train]; or several by name.
      train: (rows, seed) -> a model trained on the examples with these indices, int
        [m], for as many epochs as the original.
      generate: (model, positions) -> the pictures of the queries with these positions,
        [m, ...], each from the seed and condition of its original. It is called twice
        with the first model of every call, to see that it is not random.
      originals: the pictures of all queries [queries, ...], in the order of the scores.
      count: the number of examples to remove.
      sets: the positions of training examples to remove for each query, int [queries,
        count], such as of `removal_set`, by name: what "NAME-set" removes.
      queries: how many queries to take, chosen by a hash of their ids; all if None.
      train_seed: the seed of the original model, which is passed to `train`.
      embeddings: functions pictures -> vectors [m, d] by name, for "NAME_cosine" beside
        the distance "pixel_l2" and the cosine "pixels_cosine".
      losses: model -> the losses of all queries, such as `QueryLosses`, for
        "loss_increase", the loss less that of "everything": see `changes.loss_increase`.
      seed: chooses queries and random examples.
      store: a folder that gets a file for each model, as of `retrain`. It compares its
        examples and seed, ids and originals, and the settings of `QueryLosses`.
      version: a name of these functions, which the store compares, as of `retrain`.

    Raises:
      ValueError: before anything is trained, where arguments do not fit together; or
        pictures are of another shape than the originals, not finite, or others in a
        second call of `generate` with the first model.
      TypeError: before anything is trained, where an argument is of another class.
      OSError: before anything is trained, where `store` is a file.
    """
    functions = Functions(train, generate, losses, version)
    functions.check(embeddings)
    instance("sets", sets, Mapping, NoneType)
    if store is not None:
        files.check_folder("store", store)
    ranked = _ranked(scores, sets or {})
    first, originals = next(iter(ranked.values())), real_numbers("originals", originals)
    n, total = len(first.train_ids), len(first.query_ids)
    check_pictures("originals", originals, (total, *originals.shape[1:]))
    check_count("count", count, n)
    at_least("train_seed", train_seed, 0)
    at_least("seed", seed, 0)
    check_order(losses, first.query_ids, "scores")
    number = total if queries is None else at_least("queries", queries, 1)
    positions = chosen_queries(first.query_ids, min(number, total), seed)
    names = first.query_ids[positions].tolist()
    of_sets = {
        (Choice(name, SET), query): rows[position]
        for name, rows in _checked_sets(sets or {}, (total, count), n).items()
        for query, position in zip(names, positions, strict=True)
    }
    removed = removed_rows(ranked, names, first.train_ids, count, seed, of_sets)
    models = removals(removed, names, n, train_seed)
    parts = _parts(functions, models, first, originals, positions, store)
    settings = {"count": count, "queries": names, "seed": seed, "train": n}
    ids = removed_ids(removed, first.train_ids)
    return _result(settings, originals[positions], parts, ids, embeddings)


def _parts(
    functions: Functions,
    models: Sequence[Removal],
    scores: Scores,
    originals: np.ndarray,
    positions: np.ndarray,
    store: epath.PathLike | None,
) -> dict[Choice, list[dict]]:
    """Returns what the models of each choice give, made or read from the store."""
    names, parts = scores.query_ids[positions].tolist(), {}
    is_tried = False
    for model in progress(models, "counterfactual", unit="model"):
        rows = positions[model.queries]
        made_from = {
            "train_ids": scores.train_ids[model.rows],
            "query_ids": scores.query_ids[rows],
            "originals": originals[rows],
            "seed": np.array(model.seed),
        } | functions.made_from
        path = None if store is None else files.at(store) / _file_name(model, names)
        saved = kept(path, made_from)
        if saved is None:
            saved = functions.make(model, originals, rows, again=not is_tried)
            is_tried = True
            if path:
                files.write_npz(path, **saved, **made_from)
        parts.setdefault(model.choice, []).append(saved)
    return parts


def _ranked(
    scores: AnyScores | Mapping[str, AnyScores], sets: Collection[str]
) -> dict[Choice, Scores]:
    """Returns the scores by choice, all with the ids of the first that has some."""
    if not isinstance(scores, Mapping):
        method = scores.method if isinstance(scores, Scores) else "scores"
        scores = {method: scores}
    if not scores:
        raise ValueError("scores are empty; they must be one or more, by name.")
    check_names(list(map(Choice, scores)), sets)
    with_ids = [given for given in scores.values() if isinstance(given, Scores)]
    first = next(iter(scores.values()))
    shape = np.shape(first.scores if isinstance(first, Scores) else first)
    if len(shape) != 2:
        raise ValueError(
            f"scores have shape {shape}; they must be [queries, training examples]."
        )
    ids = {
        name: named(getattr(with_ids[0], name) if with_ids else None, shape[axis])
        for axis, name in enumerate(("query_ids", "train_ids"))
    }
    return {Choice(name): _fitting(name, given, ids) for name, given in scores.items()}


def _fitting(method: str, given: AnyScores, ids: Mapping[str, np.ndarray]) -> Scores:
    """Returns scores that have these ids, or a ValueError."""
    values = real_numbers(
        "scores", given.scores if isinstance(given, Scores) else given
    )
    same = values.shape == tuple(map(len, ids.values()))
    if isinstance(given, Scores):
        same = all(np.array_equal(getattr(given, name), ids[name]) for name in ids)
    if not same or not np.isfinite(values).all():
        raise ValueError(
            f"the scores of {method!r} have shape {values.shape}; they must be finite, "
            "and of the same queries and training examples as the others, in the same "
            "order."
        )
    return Scores(values, ids["train_ids"], ids["query_ids"], method)


def _checked_sets(
    sets: Mapping[str, np.ndarray], shape: tuple[int, int], n: int
) -> dict[str, np.ndarray]:
    """Returns sets as arrays of different positions, or raises a ValueError."""
    checked_sets = {}
    for name, rows in sets.items():
        try:
            rows = np.asarray(rows)
        except ValueError as error:
            raise ValueError(
                f"sets[{name!r}] has rows of different lengths; it must be int "
                f"{list(shape)}."
            ) from error
        fits = rows.shape == shape and np.issubdtype(rows.dtype, np.integer)
        if fits:
            ascending = np.sort(rows, axis=1)
            fits = (rows >= 0).all() and (rows < n).all()
            fits = fits and np.diff(ascending, axis=1).all()
        if not fits:
            raise ValueError(
                f"sets[{name!r}] has shape {rows.shape} and type {rows.dtype}; it must "
                f"be int {list(shape)}, with different positions below {n} in each row."
            )
        checked_sets[name] = rows
    return checked_sets


def _file_name(model: Removal, names: Sequence[str]) -> str:
    """Returns a model's file in the store, which differs for other rows and queries."""
    queries = [names[i] for i in model.queries]
    content = repr((model.choice, queries, model.seed, model.rows.tolist()))
    words = re.sub(r"[^\w.-]+", "_", model.choice.name)
    return f"{words}-{short_digest(content.encode(), 8)}.npz"


def _result(
    settings: dict,
    originals: np.ndarray,
    parts: Mapping[Choice, Sequence[Mapping[str, np.ndarray]]],
    removed: dict[str, dict[str, list[str]]],
    embeddings: Mapping[str, Callable] | None,
) -> Counterfactual:
    """Returns the metrics of all pictures, and says if none of them has moved."""

    def column(choice: Choice, name: str) -> np.ndarray:
        # The models of a choice are in the order of their queries.
        return np.concatenate([part[name] for part in parts[choice]])

    cosines = {"pixels": flattened} | dict(embeddings or {})
    images, metrics, losses = {}, {}, {}
    if "losses" in parts[Choice(EVERYTHING)][0]:
        losses = {choice: column(choice, "losses") for choice in parts}
    for choice in parts:
        made = images[choice.name] = column(choice, "images")
        metrics[choice] = distances(originals, made, {"pixel": flattened}, cosines)
        if losses:
            metrics[choice]["loss_increase"] = loss_increase(losses, choice)
    if all(np.array_equal(made, images[EVERYTHING]) for made in images.values()):
        warnings.warn(
            "all models make exactly the same pictures: does train use its rows and its "
            "seed, and generate the model that it is given?",
            stacklevel=3,
        )
    described = {"query_ids": np.array(settings["queries"]), "original": originals}
    tabled = tables(metrics, settings["queries"])
    return Counterfactual(
        settings, **tabled, removed=removed, images=described | images
    )
