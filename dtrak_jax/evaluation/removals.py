"""The models of counterfactuals: which examples each is trained without, and how long."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dtrak_jax import data, training
from dtrak_jax.attribution import Scores
from dtrak_jax.checks import at_least, instance
from dtrak_jax.digests import short_digest

RANDOM = "random"
"""Removes random examples, as many as the methods do."""
EVERYTHING = "everything"
"""Removes nothing and keeps the seed: makes the same image but for rounding."""
OTHER_SEED = "other-seed"
"""Removes nothing and takes another seed: how far images move by retraining alone."""
FULL = (EVERYTHING, OTHER_SEED)
CONTROLS = (RANDOM, *FULL)


NOT_CHOICES = ("original", "query_ids")
"""The names of arrays in images.npz that are of no choice."""

SET = "set"
"""Removes what `removal_set` chooses by the kernels of a method."""


class Choice(NamedTuple):
    """The rule by which examples are removed."""

    method: str
    """A method, or one of `CONTROLS`."""
    transform: str = "linear"
    """"linear" removes the highest scores, "squared" the largest squares, and "set" the
    `removal_set`."""

    @property
    def name(self) -> str:
        """The choice in names of files."""
        linear = self.transform == "linear"
        return self.method if linear else f"{self.method}-{self.transform}"


class Model(NamedTuple):
    """A model to train, and the positions of the queries that it generates again."""

    choice: Choice
    queries: list[int]
    member: training.Member
    steps: int


def check_count(name: str, count: int, n: int) -> None:
    """Raises a ValueError unless something is removed, and something is left."""
    if at_least(name, count, 1) > n - 1:
        raise ValueError(
            f"{name} is {count}; it must be 1 to {n - 1}, as there are {n} training "
            "images and one must be left."
        )


def check_names(scores: Collection[Choice], sets: Collection[str]) -> None:
    """Raises an error unless scores and sets have names that keep all pictures apart:
    a TypeError of what is no string, and a ValueError of a name that is taken."""
    taken = {*CONTROLS, *NOT_CHOICES}
    for kind, name, choice in (
        *(("scores", choice.method, choice) for choice in scores),
        *(("sets", name, Choice(name, SET)) for name in sets),
    ):
        instance(f"a name of {kind}", name, str)
        if choice.name in taken:
            called = f", whose pictures are called {choice.name!r}"
            raise ValueError(
                f"{kind} has the name {name!r}{called * (choice.name != name)}: that name "
                "is taken. Others that must not be used are "
                f"{', '.join(map(repr, sorted(taken - {choice.name})))}."
            )
        taken.add(choice.name)


def chosen_queries(ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the positions of the queries with the smallest hashes of (seed, id)."""
    return data.choose(ids, None, count, seed, "counterfactual")


def removed_rows(
    scores: Mapping[Choice, Scores],
    queries: Sequence[str],
    train_ids: np.ndarray,
    count: int,
    seed: int,
    sets: Mapping[tuple[Choice, str], np.ndarray] | None = None,
) -> dict[tuple[Choice, str], np.ndarray]:
    """Returns the rows of the training set that are removed, by (choice, query).

    A method removes the `count` examples with the highest scores for the query, or with
    the largest squares, the strongest first, near-duplicates together (see `strongest`),
    as without one of them the others make up for it; or a set that was chosen as a set:
    `sets` has its rows. A random choice removes the examples with the smallest hashes of
    (seed, query, id), whichever other queries there are.
    """
    removed = {}
    for choice, ranked in scores.items():
        positions = ranked.query_ids.tolist()
        squared = choice.transform == "squared"
        for query in queries:
            row = positions.index(query)
            removed[choice, query] = strongest(ranked, row, count, squared)
    removed |= sets or {}
    for query in queries:
        chosen = data.choose(train_ids, None, count, seed, f"{RANDOM}/{query}")
        removed[Choice(RANDOM), query] = chosen
    return removed


def removed_ids(
    removed: Mapping[tuple[Choice, str], np.ndarray], train_ids: np.ndarray
) -> dict[str, dict[str, list[str]]]:
    """Returns the part "removed" of counterfactual.json: the ids of the removed examples,
    {name of the choice: {query: ids}}."""
    ids: dict[str, dict[str, list[str]]] = {}
    for (choice, query), rows in removed.items():
        ids.setdefault(choice.name, {})[query] = train_ids[rows].tolist()
    return ids


def strongest(
    scores: Scores, row: int, count: int, squared: bool = False
) -> np.ndarray:
    """Returns the training images to remove for a query, the strongest first, int [count].

    Pictures are taken by their `merged` scores, or the squares of these, each with all
    of its copies; one that has more copies than may still be removed is passed over.
    Where nothing fits any more, copies of the strongest of these fill the rest.
    """
    (pictures,) = scores.take([row]).merged().scores
    values = np.square(pictures) if squared else pictures
    # Stable, so that equal scores come in the order of the training set.
    order = np.argsort(-values, kind="stable")
    _, picture = np.unique(scores.picture_ids, return_inverse=True)
    first = picture[scores.picture_rows]
    members = np.split(
        np.argsort(picture, kind="stable"), np.cumsum(np.bincount(picture))[:-1]
    )
    ranked = [members[first[column]] for column in order]
    chosen, passed, left = [], [], count
    for rows in ranked:
        fits = len(rows) <= left
        (chosen if fits else passed).append(rows)
        left -= len(rows) * fits
    return np.concatenate([*chosen, *passed])[:count]


class Removal(NamedTuple):
    """A model to train: its examples, and the positions of the queries that it makes."""

    choice: Choice
    queries: list[int]
    rows: np.ndarray
    seed: int


def removals(
    removed: Mapping[tuple[Choice, str], np.ndarray],
    queries: Sequence[str],
    n: int,
    seed: int,
) -> list[Removal]:
    """Returns the models to train, on ascending rows: one for each removal, then the two
    controls."""
    models = [
        Removal(choice, [queries.index(query)], np.delete(np.arange(n), rows), seed)
        for (choice, query), rows in removed.items()
    ]
    everyone = list(range(len(queries)))
    for name, its_seed in ((EVERYTHING, seed), (OTHER_SEED, seed + 1)):
        models.append(Removal(Choice(name), everyone, np.arange(n), its_seed))
    return models


def plan(
    config: training.TrainConfig,
    removed: Mapping[tuple[Choice, str], np.ndarray],
    queries: Sequence[str],
    n: int,
) -> list[Model]:
    """Returns the models of `removals`, named, with their steps of training.

    A model of r of n rows takes round(steps * r / n) steps, at least 1: as many epochs
    as the original had. Folders are named by a hash of the rows too, so that no model
    of older scores is taken for a new one.
    """
    models = []
    for choice, positions, rows, seed in removals(removed, queries, n, config.seed):
        of_query = [] if choice.method in FULL else [queries[i] for i in positions]
        content = short_digest(rows.astype("<i8").tobytes())
        name = "-".join([choice.name, *of_query, content])
        steps = max(1, round(config.steps * len(rows) / n))
        member = training.Member(name, rows, seed)
        models.append(Model(choice, positions, member, steps))
    return models
