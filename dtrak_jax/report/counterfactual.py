"""Removal: what becomes of an image without its strongest training images?"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

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


def counterfactual(
    result: Mapping, images: Mapping[str, np.ndarray], count: int
) -> dict:
    """Returns images before and after removal, with charts and rows of the effect.

    The result is that of counterfactual.json, and the images, of which those of `count`
    queries are shown, that of counterfactual/images.npz; {} if there is no such file.
    """
    rows, summary, differences = (
        # Older files have no transform, but "-squared" at the end of the method.
        [
            r | {"removal": Choice(r["method"], r.get("transform", "linear")).name}
            for r in part
        ]
        for part in (result["rows"], result["summary"], result["differences"])
    )
    charts = grouped(summary, lambda row: row["metric"])
    names = [name for name in images if name not in ("query_ids", "original")]
    return {
        **result,
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


def label(metric: str) -> str:
    """Returns the words for a metric, which may be of a user's own embedding."""
    return METRICS.get(metric, f"cosine of {metric.removesuffix('_cosine')}")


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
