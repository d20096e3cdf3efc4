"""The report of scores from anywhere, without a run directory."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType

import numpy as np
from etils import epath

from dtrak_jax import files
from dtrak_jax.attribution import Scores
from dtrak_jax.attribution.groups import check_columns
from dtrak_jax.checks import check_images, instance, items, one_of, shown
from dtrak_jax.data import Dataset
from dtrak_jax.diffusion import Schedule
from dtrak_jax.digests import digest, settings_text
from dtrak_jax.evaluation import trust
from dtrak_jax.evaluation.statistics import RESAMPLES
from dtrak_jax.evaluation.truth import RetrainedLosses
from dtrak_jax.features import Features
from dtrak_jax.report.counterfactual import check as check_removal
from dtrak_jax.report.learning import learning
from dtrak_jax.report.page import page
from dtrak_jax.report.record import (
    Recipe,
    Record,
    digests_of,
    similarities,
)

Images = Dataset | np.ndarray
"""Pictures with their ids and columns, or an array [n, H, W, C] in [-1, 1]."""


def write_report(
    path: epath.PathLike,
    scores: Scores | Sequence[Scores] | Mapping[str, Scores | Sequence[Scores]],
    images: Images,
    queries: Images | Mapping[str, Images],
    *,
    features: Features | Mapping[str, Features] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    schedule: Schedule | None = None,
    truth: RetrainedLosses | Mapping[str, RetrainedLosses] | None = None,
    **options,
) -> epath.Path:
    """Writes the page that a run writes, of scores that were made anywhere; returns its path.

    It judges each query: which training images stand out (`attribution.floor`), and what
    speaks against believing any of it. It is one file that asks for no other.

    Args:
      path: of the HTML file, which is written whole or not at all.
      scores: of one method or several; {set: scores} for several sets of queries.
      images: the training images in the order of the scores, as a `Dataset` with what is
        known of them, or an array [n, H, W, C] of pixels in [-1, 1].
      queries: the queries, likewise; or {set: queries}.
      features: of the training images, which tell how they were made.
      schedule: the model's, if it works on these pixels: then the features' losses tell
        whether it was trained.
      groups: {column: a name for each training image}, beyond those of a `Dataset` and of
        the scores.
      truth: of `retrain`, for the LDS; or {set: truth}.
      **options: further fields of `report.Record`, such as `shown` (the queries of a set
        that are shown), `top` (their images on each side), `metrics` (lines of step, loss
        and learning_rate), `counterfactual` and `removed` (the `record()` and the
        `images` of `dtrak.counterfactual`), `settings` or `provenance`.

    Raises:
      ValueError: scores, images and queries that do not belong together, or scores
        without a sign, such as those of "coverage"; says which.
      TypeError: an argument is of another class.
      OSError: before anything is computed, where no file can be written at `path`.
    """
    path = files.check_file("path", path)
    _check_options(options)
    instance("schedule", schedule, Schedule, NoneType)
    by_method, sets = _sets(scores, queries)
    first = next(iter(next(iter(by_method.values())).values()))
    train = _dataset("images", images, first.train_ids)
    datasets = {}
    for name, of_set in by_method.items():
        query_ids = next(iter(of_set.values())).query_ids
        datasets[name] = _dataset(f"queries {name}", sets[name], query_ids)
        for s in of_set.values():
            what = f"scores {s.method} of {name}"
            _check_ids(what, s.train_ids, train, "images")
            _check_ids(what, s.query_ids, datasets[name], "queries")
    columns = {n: c for n, c in first.columns.items() if n != "label"}
    columns |= train.groups | check_columns(groups, len(train))
    train = dataclasses.replace(train, groups=columns)
    if removal := options.get("counterfactual"):
        check_removal(removal, options.get("removed", {}), train, datasets)
    fields = {
        "pixels": similarities(train, datasets),
        "damping": first.damping,
        "provenance": {"training images": train.digest},
    }
    if truth is not None:
        fields["lds"] = _lds(by_method, truth)
    if isinstance(features, Mapping):
        features = next(iter(features.values()), None)
    instance("features", features, Features, NoneType)
    if features is not None:
        _check_ids("features", features.ids, train, "images")
        _check_schedule(schedule, features)
        fields["recipe"] = _recipe(features.fingerprint)
        fields["provenance"] |= digests_of(features)
    metrics = options.get("metrics", ())
    fields["learning"] = learning(metrics, features, schedule, train.images)
    fields |= {"train": train, "queries": datasets, "scores": by_method}
    record = Record(**fields | options)
    files.write_bytes(path, page(record).encode())
    return path


def _check_schedule(schedule: Schedule | None, features: Features) -> None:
    """Raises a ValueError if features were made with another schedule."""
    if schedule is None:
        return
    expected = digest(settings_text(schedule))
    if features.fingerprint.get("schedule", expected) != expected:
        raise ValueError(
            f"schedule is {schedule!r}, and the features were made with another one; "
            "give that of their task."
        )


def _check_options(options: Mapping) -> None:
    """Raises an error for options that are no field of `Record`, or not as it has them."""
    for name in options:
        one_of("an option", name, [f.name for f in dataclasses.fields(Record)])
    if "lds" in options and not isinstance(options["lds"], Mapping):
        raise TypeError(
            f"lds is {shown(options['lds'])}; give truth=, which `retrain` returns: the "
            "page has the LDS of its own scores."
        )
    needed = {
        "a line of metrics": ("step", "loss", "learning_rate"),
        "counterfactual": ("settings", "rows", "summary", "differences"),
    }
    instance("removed", options.get("removed", {}), Mapping)
    if options.get("removed") and not options.get("counterfactual"):
        raise ValueError("removed needs counterfactual=, the `record()` beside it.")
    given = [("counterfactual", options.get("counterfactual"))]
    lines = items("metrics", options.get("metrics", ()))
    given += [("a line of metrics", line) for line in lines]
    for name, value in given:
        instance(name, value, Mapping, NoneType)
        if value is not None and not value.keys() >= set(needed[name]):
            raise ValueError(
                f"{name} has {', '.join(map(repr, value))}; it must have "
                f"{', '.join(needed[name])}."
            )


def _sets(
    scores: Scores | Sequence[Scores] | Mapping, queries: Images | Mapping
) -> tuple[dict[str, dict[str, Scores]], Mapping[str, Images]]:
    """Returns {set: {method: scores}} and {set: queries}."""
    sets = queries if isinstance(queries, Mapping) else {"query": queries}
    named = scores if isinstance(scores, Mapping) else {"query": scores}
    if not sets or set(sets) != set(named):
        raise ValueError(
            f"scores are of the sets {sorted(named)} and queries of {sorted(sets)}; they "
            "must be of the same, one or more."
        )
    by_method = {}
    for name, of_set in named.items():
        several = [of_set] if isinstance(of_set, Scores) else items("scores", of_set)
        for given in several:
            instance("an entry of scores", given, Scores)
            if not given.signed:
                raise ValueError(
                    f"scores {given.method} of {name} have no sign, and a page says what "
                    "supports and what opposes a query; leave them out."
                )
        if not several:
            raise ValueError(f"scores of {name} are empty; give those of a method.")
        by_method[name] = {given.method: given for given in several}
        if len(by_method[name]) < len(several):
            raise ValueError(
                f"scores of {name} are of the methods {[s.method for s in several]}; give "
                "those of each method once."
            )
    return by_method, sets


def _lds(
    by_method: Mapping[str, Mapping[str, Scores]],
    truth: RetrainedLosses | Mapping[str, RetrainedLosses],
) -> dict:
    """Returns what lds.json says, as far as it is known, of each set that has a truth."""
    truths = truth if isinstance(truth, Mapping) else dict.fromkeys(by_method, truth)
    if not truths or not truths.keys() <= by_method.keys():
        raise ValueError(
            f"truth is of the sets {sorted(truths)}; scores are of {sorted(by_method)}."
        )
    for of_set in truths.values():
        instance("truth", of_set, RetrainedLosses)
    first = next(iter(truths.values()))
    subsets, seeds, _ = first.outputs.shape
    settings = {"subsets": subsets, "seeds": seeds, "resamples": RESAMPLES}
    return {
        "settings": settings | {"fraction": float(first.masks.mean())},
        "queries": {
            name: trust.record(by_method[name], of_set)
            for name, of_set in truths.items()
        },
    }


def _dataset(name: str, images: Images, ids: np.ndarray) -> Dataset:
    """Returns pictures as a data set, with the scores' ids if they have none."""
    if isinstance(images, Dataset):
        return images
    try:
        images = check_images(images)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if len(images) != len(ids):
        raise ValueError(
            f"{name} has {len(images)} pictures and the scores {len(ids)}; they must be "
            "the same pictures in the same order."
        )
    return Dataset.of(images, ids)


def _check_ids(what: str, ids: np.ndarray, images: Dataset, name: str) -> None:
    """Raises a ValueError unless scores or features are of these pictures."""
    if not np.array_equal(ids, images.ids):
        raise ValueError(
            f"the {what} are of other {name}, or in another order: ids must be "
            f"equal, and begin with {_listed(ids)} and {_listed(images.ids)}."
        )


def _listed(ids: Sequence[str]) -> str:
    """Returns the first two ids as text."""
    return ", ".join(repr(str(name)) for name in ids[:2])


def _recipe(fingerprint: Mapping) -> Recipe:
    """Returns how features were made, from what they say of themselves."""
    names = ("timesteps", "draws", "per_timestep", "noise", "projection", "dim")
    return Recipe(*(fingerprint[name] for name in names))
