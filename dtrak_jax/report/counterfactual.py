"""Removal: what becomes of an image without its strongest training images?"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from dtrak_jax.report.charts import Style, interval_plot
from dtrak_jax.report.figures import INK, SUPPORT
from dtrak_jax.report.text import CONTROLS, SQUARED, method_name

METRICS = {
    "loss_increase": "increase of the original’s loss",
    "pixel_l2": "distance of pixels (L2)",
    "pixels_cosine": "cosine of pixels",
    "bottleneck_cosine": "cosine in the model’s bottleneck",
}
"""Labels of metrics; another one is called by its name."""

STYLES = {
    "median": Style("median", "o", SUPPORT, SUPPORT),
    "mean": Style("mean", "s", INK),
}
"""The look of points by their statistic."""


def counterfactual(
    result: Mapping, images: Mapping[str, np.ndarray], count: int
) -> dict:
    """Returns images before and after removal, with charts and rows of the effect.

    Args:
      result: the contents of counterfactual.json.
      images: the contents of counterfactual/images.npz, {} without that file:
        "query_ids" [Q], "original" [Q, H, W, C] and as many images for every removal,
        named by its method, with "-squared" after it for squared scores.
      count: how many queries are shown.
    """
    rows, summary, differences = (
        [row | {"removal": _removal(row)} for row in result[part]]
        for part in ("rows", "summary", "differences")
    )
    distances = {(row["query"], row["removal"]): row["pixel_l2"] for row in rows}
    names = [name for name in images if name not in ("query_ids", "original")]
    return {
        **result,
        "images": images,
        "removals": _ordered(names),
        "distances": distances,
        "shown": min(count, len(images.get("query_ids", ()))),
        "metrics": METRICS,
        "charts": [
            (metric, _chart([row for row in summary if row["metric"] == metric]))
            for metric in dict.fromkeys(row["metric"] for row in summary)
        ],
        "summary": summary,
        "differences": differences,
    }


def _removal(row: Mapping) -> str:
    """Returns the name of a removal: its method, with "-squared" for squared scores."""
    squared = row.get("transform") == "squared"
    return row["method"].removesuffix(SQUARED) + SQUARED if squared else row["method"]


def _ordered(removals: Iterable[str]) -> list[str]:
    """Returns methods in the order that they have, then the controls."""
    places = {name: place for place, name in enumerate(CONTROLS)}
    return sorted(removals, key=lambda name: places.get(name, -1))


def _chart(rows: Sequence[Mapping]) -> Markup:
    """Draws median and mean of a metric for every removal."""
    by_removal = {row["removal"]: row for row in rows}
    points = {
        method_name(name): [
            (style, row[key], row[f"{key}_low"], row[f"{key}_high"])
            for key, style in STYLES.items()
        ]
        for name in _ordered(by_removal)
        for row in [by_removal[name]]
    }
    label = METRICS.get(rows[0]["metric"], rows[0]["metric"])
    return interval_plot(points, label, f"Effect of removal, {label}", zero=False)
