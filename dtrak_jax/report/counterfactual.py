"""Removal: what becomes of an image without its strongest training images?"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from dtrak_jax.data import Dataset
from dtrak_jax.evaluation.removals import Choice
from dtrak_jax.report.charts import Style, interval_plot
from dtrak_jax.report.figures import INK, SUPPORT
from dtrak_jax.report.text import CONTROLS, grouped, method_name

METRICS = {
    "loss_increase": "increase of the original’s loss",
    "latent_l2": "distance of latents (L2)",
    "pixel_l2": "distance of pixels (L2)",
    "pixels_cosine": "cosine of pixels",
    "bottleneck_cosine": "cosine in the model’s bottleneck",
    "clip_cosine": "cosine of CLIP’s embeddings",
}
"""Labels of metrics."""

STYLES = {
    "median": Style("median", "o", SUPPORT, SUPPORT),
    "mean": Style("mean", "s", INK),
}
"""The look of points by their statistic."""


ROUNDING = 0.02
"""A difference of pixels in [-1, 1] that is more than two steps of 8 bits."""


def counterfactual(
    result: Mapping, images: Mapping[str, np.ndarray], count: int
) -> dict:
    """Returns images before and after removal, with charts and rows of the effect.

    The result is that of counterfactual.json, and the images, of which those of `count`
    queries are shown, that of counterfactual/images.npz; {} if there is no such file.
    """
    rows, summary, differences = (
        [row | {"removal": _removal(row)} for row in part]
        for part in (result["rows"], result["summary"], result["differences"])
    )
    charts = grouped(summary, lambda row: row["metric"])
    names = [name for name in images if name not in ("query_ids", "original")]
    return {
        **result,
        # Older files do not name what was removed.
        "removed": result.get("removed", {}),
        "images": images,
        "removals": _ordered(names),
        "sets": any(row["removal"].endswith("-set") for row in rows),
        "distances": {(r["query"], r["removal"]): r["pixel_l2"] for r in rows},
        "shown": min(count, len(images.get("query_ids", ()))),
        "metrics": {metric: label(metric) for metric in charts},
        "charts": [(metric, _chart(of_metric)) for metric, of_metric in charts.items()],
        "summary": summary,
        "differences": differences,
    }


def check(
    result: Mapping,
    images: Mapping[str, np.ndarray],
    train: Dataset,
    queries: Mapping[str, Dataset],
) -> None:
    """Raises a ValueError unless a result is of these queries and training images, and
    the images, if there are any, are those of the result; names what differs."""
    asked = list(result["settings"]["queries"])
    sets = [of for of in queries.values() if set(asked) <= set(of.ids.tolist())]
    if not asked or not sets:
        known = {query for of in queries.values() for query in of.ids.tolist()}
        unknown = [query for query in asked if query not in known][:1]
        what = f"such as {unknown[0]!r}, which is none here" if unknown else f"{asked}"
        raise ValueError(
            f"counterfactual is of other queries, {what}; it must be of queries of one "
            f"set: {', '.join(queries)}."
        )
    removed = result.get("removed", {}).values()
    gone = {i for of in removed for ids in of.values() for i in ids}
    if unknown := sorted(gone - set(train.ids.tolist())):
        raise ValueError(
            f"counterfactual is of other training images, such as {unknown[0]!r}."
        )
    if not images:
        return
    names = dict.fromkeys(_removal(row) for row in result["rows"])
    needed = ["query_ids", "original", *names]
    if set(images) != set(needed):
        differing = sorted(set(images) ^ set(needed))
        raise ValueError(
            f"removed differs from counterfactual in {', '.join(map(repr, differing))}; "
            f"it must have {', '.join(needed)}: the `images` of dtrak.counterfactual."
        )
    if list(map(str, images["query_ids"])) != asked:
        raise ValueError(
            "removed is of other queries than counterfactual: its query_ids must be "
            f"{', '.join(asked[:2])}, ..."
        )
    for name in needed:
        if len(images[name]) != len(asked):
            raise ValueError(
                f"removed[{name!r}] has {len(images[name])} pictures; there must be "
                f"{len(asked)}, one for each query of counterfactual."
            )
    if not any(_are_pictures(images["original"], asked, of) for of in sets):
        raise ValueError(
            "removed['original'] are other pictures than the queries with these ids."
        )


def _are_pictures(images: np.ndarray, ids: Sequence[str], queries: Dataset) -> bool:
    """Returns whether images are those of some queries, but for rounding to 8 bits."""
    places = {name: row for row, name in enumerate(queries.ids.tolist())}
    pictures = queries.images[[places[name] for name in ids]]
    same = np.shape(images) == pictures.shape
    return same and bool(np.abs(images - pictures).max() < ROUNDING)


def label(metric: str) -> str:
    """Returns the words for a metric, which may be of a user's own embedding."""
    return METRICS.get(metric, f"cosine of {metric.removesuffix('_cosine')}")


def _removal(row: Mapping) -> str:
    """Returns the name of a row's choice of what is removed."""
    # Older files have no transform, but "-squared" at the end of the method.
    return Choice(row["method"], row.get("transform", "linear")).name


def _ordered(removals: Iterable[str]) -> list[str]:
    """Returns methods in the order that they have, then the controls."""
    places = {name: place for place, name in enumerate(CONTROLS)}
    return sorted(removals, key=lambda name: places.get(name, -1))


def _chart(rows: Sequence[Mapping]) -> Markup:
    """Draws median and mean of a metric for every removal."""
    by_removal = {row["removal"]: row for row in rows}
    points = {}
    for name in _ordered(by_removal):
        row = by_removal[name]
        points[method_name(name)] = [
            (style, row[key], row[f"{key}_low"], row[f"{key}_high"])
            for key, style in STYLES.items()
        ]
    words = label(rows[0]["metric"])
    return interval_plot(points, words, f"Effect of removal, {words}", zero=False)
