"""Makes the tables of what removing training images did; `tables.py` writes them."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from cells import Lines, interval, pick, read

MEASURED = {
    "loss_increase": "loss increase",
    "pixel_l2": "distance",
    "bottleneck_cosine": "cosine in the bottleneck",
}
REMOVED = {
    "pixel-cosine": "pixel-cosine",
    "dtrak": "dtrak",
    "dtrak-squared": "dtrak, largest squares",
    "trak": "trak",
    "reference": "dtrak by the paper's recipe",
    "random": "random images",
    "other-seed": "nothing, another seed",
    "everything": "nothing, the same seed",
}
IN_SETS = {
    "trak-set": "a set by trak's kernels",
    "pixel-cosine": "pixel-cosine",
    "dtrak": "dtrak, the highest scores",
    "random": "random images",
    "other-seed": "nothing, another seed",
}
"""The removals beside sets."""

COVERING = {
    "coverage-set": "the set that covers most",
    "coverage": "coverage, the highest scores",
}
"""The removals by coverage."""

CURVED = {
    "gauss-newton": "gauss-newton, the highest scores",
    "trak": "trak, the highest scores",
}
"""The removals by scores with the curvature of the output, and those of the same gradients
without it."""


def one_by_one(part: str) -> list[dict]:
    """Returns "rows" or "summary" of both runs; the second one has "reference"."""
    reference = [
        row | {"method": "reference"}
        for row in read("digits_reference_counterfactual")[part]
        if row["method"] == "dtrak"
    ]
    return read("digits_counterfactual")[part] + reference


def removal() -> Lines:
    """What removing 200 training images did to generated digits."""
    return [heads("removed"), *means(one_by_one("summary"), REMOVED)]


def removal_differences() -> Lines:
    """How much more one removal did than another, image by image."""
    rows = one_by_one("rows")
    pairs = [("dtrak", name) for name in ("trak", "dtrak-squared", "reference")]
    pairs.append(("pixel-cosine", "dtrak"))
    return [heads("removed", "compared with"), *differences(rows, REMOVED, pairs)]


def sets(result: str) -> Lines:
    """What the removal of a set did to generated digits, beside other removals."""
    return [heads("removed"), *means(read(result)["summary"], IN_SETS)]


def set_differences(result: str) -> Lines:
    """How much more the removal of a set did than another, image by image."""
    pairs = [("trak-set", "pixel-cosine"), ("trak-set", "dtrak")]
    rows = differences(read(result)["rows"], IN_SETS, pairs)
    return [heads("removed", "compared with"), *rows]


def beside_sets(of: str, said: dict[str, str]) -> Lines:
    """What some removals did, and how much more than others on the same pictures."""
    result, others = read(of), read("digits_sets_counterfactual")["rows"]
    pictures = result["settings"]["queries"]
    others = [row for row in others if row.get("query") in pictures]
    lines = [[text, "", *cells] for text, *cells in means(result["summary"], said)]
    for name, text in said.items():
        ours = removed(result["rows"], name)
        for other in ("trak-set", "pixel-cosine", "dtrak"):
            less = difference(ours, removed(others, other))
            lines.append([text, f"less {IN_SETS[other]}", *less])
    return [heads("removed", ""), *lines]


def heads(*first: str) -> list[str]:
    """Returns the heads of columns: some, and those of what is measured."""
    return [*first, *MEASURED.values()]


def means(summary: Sequence[dict], said: dict[str, str]) -> Lines:
    """Returns a line for each removal: in words, and the means of what is measured."""
    lines = []
    for name, text in said.items():
        own = [pick(removed(summary, name), metric=metric) for metric in MEASURED]
        cells = [interval(row, "mean", "mean_low", "mean_high") for row in own]
        lines.append([text, *cells])
    return lines


def differences(
    rows: Sequence[dict], said: dict[str, str], pairs: Iterable[tuple[str, str]]
) -> Lines:
    """Returns a line for each pair of removals of the same pictures."""
    return [
        [said[a], said[b], *difference(removed(rows, a), removed(rows, b))]
        for a, b in pairs
    ]


def difference(ours: Sequence[dict], theirs: Sequence[dict]) -> list[str]:
    """Returns what is measured of one removal less that of another, picture by picture."""
    cells = []
    for metric in MEASURED:
        values = [(a[metric], b[metric]) for a, b in zip(ours, theirs, strict=True)]
        cells.append(interval(paired(np.subtract(*np.transpose(values))), "value"))
    return cells


def removed(rows: Sequence[dict], name: str) -> list[dict]:
    """Returns the rows of one removal, such as "trak-set"."""
    method, _, rule = name.rpartition("-")
    key = (method, "set") if rule == "set" else (name, "linear")
    # Where no set was removed, rows name no rule.
    return [r for r in rows if (r["method"], r.get("transform", "linear")) == key]


def paired(differences: np.ndarray) -> dict:
    """Returns the mean and its 95% interval over 10,000 resamples."""
    shape = (10_000, len(differences))
    draws = np.random.default_rng(0).integers(len(differences), size=shape)
    low, high = np.percentile(differences[draws].mean(axis=1), [2.5, 97.5])
    return {"value": differences.mean(), "low": low, "high": high}


LARGE, SMALL = "digits_sets_counterfactual", "digits_small_sets_counterfactual"

TABLES = {
    "removal": removal,
    "removal differences": removal_differences,
    "covering removals": functools.partial(
        beside_sets, "digits_coverage_counterfactual", COVERING
    ),
    "gauss-newton removals": functools.partial(
        beside_sets, "digits_gauss_newton_counterfactual", CURVED
    ),
    "sets": functools.partial(sets, LARGE),
    "set differences": functools.partial(set_differences, LARGE),
    "mnist sets": functools.partial(sets, "mnist_sets_counterfactual"),
    "mnist set differences": functools.partial(
        set_differences, "mnist_sets_counterfactual"
    ),
    "small sets": functools.partial(sets, SMALL),
    "small set differences": functools.partial(set_differences, SMALL),
}
