"""The export: scores and groups with all that decides them, for other programs."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dtrak_jax import data, files, score_sets
from dtrak_jax.attribution.duplicates import COUNTED_ONCE, THRESHOLD, members
from dtrak_jax.attribution.scores import NO_ERRORS, SIGN, Scores
from dtrak_jax.methods import METHODS
from dtrak_jax.report.learning import learning
from dtrak_jax.report.record import features_of, provenance_of, recipe_of
from dtrak_jax.report.standing import Standing, standings

if TYPE_CHECKING:
    from dtrak_jax.run import Run

SCHEMA = 2
"""The version of the schema, which README.md describes."""

UNIT = "unit of the query"
"""The unit of scores in the header of a CSV: they are comparable within a query only."""

IMAGES = (
    *("query", "rank", "image", f"score [{UNIT}]", f"standard_error [{UNIT}]"),
    *(f"spread [{UNIT}]", "stands_out", "is_query", "copies"),
)
"""The columns of METHOD-QUERIES.csv."""

GROUPS = (
    *("grouping", "query", "rank", "group", "images", f"score [{UNIT}]"),
    *(f"standard_error [{UNIT}]", "stands_out"),
)
"""The columns of METHOD-QUERIES-groups.csv."""

SHARE = "share [of the query's positive scores]"
"""A further column, if shares are asked for."""


def exports(run: "Run") -> Iterator[tuple[str, bytes]]:
    """Yields the name and content of each file of export/, see `document`.

    They have the pictures and formats that the settings `export` ask for.
    """
    train, settings, scores = run.splits.train, run.config.export, {}
    for method, name in score_sets.wanted(run):
        scores.setdefault(name, {})[method] = run.scores(method, name)
    learnt = learning(
        *(run.metrics, features_of(run), run.schedule, run.space.x("train"))
    )
    untrained = learnt is not None and learnt.is_nothing
    standing, shared = standings(scores, train.groupings, untrained), _facts(run)
    for name, of_set in scores.items():
        same = data.trained_on(run.queries[name], train)
        for method, s in of_set.items():
            facts = {"schema": SCHEMA, "queries_of": name} | shared
            whole = facts | document(
                *(s, standing[name][method], same, settings.top, settings.shares)
            )
            whole["copies"]["looked_for"] = not run.copies().why
            whole["copies"]["why"] = run.copies().why or None
            place = f"{method}-{name}"
            if settings.format != "csv":
                text = files.json_text(whole, allow_nan=False)
                yield f"{place}.json", f"{text}\n".encode()
            if settings.format != "json":
                yield f"{place}.csv", image_table(whole)
                if whole["groups"]:
                    header = (*GROUPS, *[SHARE] * settings.shares)
                    yield f"{place}-groups.csv", _table(header, _group_rows(whole))


def _facts(run: "Run") -> dict:
    """Returns what decides the scores of all methods: features, versions, digests."""
    recipe = recipe_of(run)
    names = ("timesteps", "draws", "per_timestep", "noise", "projection", "dim")
    features = {name: getattr(recipe, name) for name in names}
    features["timesteps"] = list(map(int, features["timesteps"]))
    return {
        "features": features,
        "training_images": len(run.splits.train),
        "versions": run.versions,
        "provenance": provenance_of(run, features_of(run)),
    }


def document(
    scores: Scores,
    standing: Standing,
    same: Sequence[Sequence[str]],
    top: int,
    shares: bool = False,
) -> dict:
    """Returns the part of the JSON that is one method's: its scores and their errors.

    A picture is a training image with its near-duplicates, as `Scores.merged` has it.

    Args:
      scores: of one method for one set of queries.
      standing: what stands out of them.
      same: for each query the training images that it is, see `data.trained_on`.
      top: pictures with the highest scores, and as many with the lowest; 0 takes all.
      shares: give groups shares too, and say what these leave out.
    """
    copies, pictures = scores.picture_ids, scores.merged()
    picture_of = dict(zip(scores.train_ids.tolist(), copies.tolist(), strict=True))
    clusters = members(scores.train_ids, copies)
    above = standing.supporting
    if above is not None:
        above = above | standing.opposing
        above = above[:, scores.picture_rows]
    queries = []
    for i, (query, ids) in enumerate(zip(scores.query_ids, same, strict=True)):
        training_image = ids[0] if ids else None
        entries = _ranked(pictures, i, top)
        for position, entry in entries:
            name = entry["image"]
            entry["stands_out"] = None if above is None else bool(above[i, position])
            entry["is_query"] = picture_of.get(training_image) == name
            entry["copies"] = clusters.get(name, [name])
        images = [entry for _, entry in entries]
        queries.append(
            {"query": str(query), "training_image": training_image, "images": images}
        )
    method = METHODS[scores.method]
    return {
        "method": method.name,
        "label": method.label,
        "source": method.source,
        "measurement": method.measurement,
        "sign": SIGN if scores.signed else None,
        "comparable": "within a query; the sizes of different queries say nothing",
        "damping": scores.damping and scores.damping._asdict(),
        "lambdas": None if scores.lambdas is None else _numbers(scores.lambdas),
        "layers": _layers(scores),
        "made_from": scores.made_from,
        "errors": {"degrees_of_freedom": scores.freedom}
        if scores.freedom
        else {"degrees_of_freedom": 0, "why": NO_ERRORS},
        "not_judged": standing.why or None,
        "copies": {
            "threshold": THRESHOLD,
            "score": "highest" if scores.method in COUNTED_ONCE else "sum",
            "clusters": clusters,
        },
        "top": top or None,
        "queries": queries,
        "groups": {
            name: _grouping(scores, name, standing, shares) for name in scores.columns
        },
    }


def _layers(scores: Scores) -> list[dict] | None:
    """Returns the weight and share of each group of layers; None of a method without."""
    names = "group", "weight", "share"
    rows = ((name, *map(float, pair)) for name, pair in scores.layers.items())
    return [dict(zip(names, row, strict=True)) for row in rows] or None


def _ranked(pictures: Scores, row: int, top: int) -> list[tuple[int, dict]]:
    """Returns (position, rank, id, score and errors) of a query's pictures at both ends."""
    order = np.argsort(-pictures.scores[row], kind="stable")
    ranks = np.arange(1, len(order) + 1)
    if 0 < 2 * top < len(order):
        ranks = np.concatenate([ranks[:top], ranks[-top:]])
    chosen = order[ranks - 1]
    spread = pictures.spread
    columns = {
        "rank": ranks.tolist(),
        "image": pictures.train_ids[chosen].tolist(),
        "score": _numbers(pictures.scores[row, chosen]),
        "error": _numbers(pictures.errors[row, chosen]),
        "spread": [None] * len(ranks)
        if spread is None
        else _numbers(spread[row, chosen]),
    }
    rows = zip(*columns.values(), strict=True)
    return [
        (int(position), dict(zip(columns, values, strict=True)))
        for position, values in zip(chosen, rows, strict=True)
    ]


def _grouping(scores: Scores, name: str, standing: Standing, shares: bool) -> dict:
    """Returns the rankings of a grouping: over all queries, and for each of them."""
    groups, above = scores.group(name), standing.groups.get(name)
    first = np.bincount(groups.scores.argmax(axis=1), minlength=len(groups.names))
    kept = {"group": groups.names.tolist(), "images": groups.sizes.tolist()}
    value, (parts, left_out) = groups.overall(), groups.shares()
    overall = kept | {"value": _numbers(value), "first_of_queries": first.tolist()}
    queries = []
    for i, query in enumerate(scores.query_ids):
        columns = kept | {
            "score": _numbers(groups.scores[i]),
            "error": _numbers(groups.errors[i]),
            "stands_out": [None] * len(first) if above is None else above[i].tolist(),
        }
        more = {}
        if shares:
            columns["share"] = _numbers(parts[i])
            (more["left_out"],) = _numbers(left_out[i : i + 1])
        ranking = _ranking(columns, groups.scores[i])
        queries.append({"query": str(query)} | more | {"groups": ranking})
    return {
        "degrees_of_freedom": groups.freedom,
        "overall": _ranking(overall, value),
        "queries": queries,
    }


def _ranking(columns: dict[str, list], values: np.ndarray) -> list[dict]:
    """Returns a row of columns for each group, from the highest value to the lowest."""
    order = np.argsort(-values, kind="stable")
    return [
        {"rank": rank} | {name: column[i] for name, column in columns.items()}
        for rank, i in enumerate(order, 1)
    ]


def _numbers(values: np.ndarray) -> list[float | None]:
    """Returns numbers with as many digits as tell them from all others of their type;
    None for NaN."""
    return [float(str(value)) if np.isfinite(value) else None for value in values]


def image_table(whole: dict) -> bytes:
    """Returns METHOD-QUERIES.csv; ids of copies are a JSON list in their cell."""
    rows = [
        [query["query"], *fields, json.dumps(copies, ensure_ascii=False)]
        for query in whole["queries"]
        for *fields, copies in (image.values() for image in query["images"])
    ]
    return _table(IMAGES, iter(rows))


def _group_rows(whole: dict) -> Iterator[list]:
    """Yields the rows of METHOD-QUERIES-groups.csv."""
    for grouping, rankings in whole["groups"].items():
        for query in rankings["queries"]:
            for group in query["groups"]:
                yield [grouping, query["query"], *group.values()]


def _table(header: Sequence[str], rows: Iterator[list]) -> bytes:
    """Returns a CSV in UTF-8; what nobody knows is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        words = {True: "yes", False: "no"}
        writer.writerow([words[c] if isinstance(c, bool) else c for c in row])
    return text.getvalue().encode()
