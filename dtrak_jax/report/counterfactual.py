"""The section of the page about removal: what becomes of an image without its top k?"""

from collections.abc import Mapping
from html import escape

import numpy as np
from etils import epath

from dtrak_jax import files
from dtrak_jax.report.charts import Look, Mark, dots, known
from dtrak_jax.report.figures import INK, SUPPORT, captioned, data_uri
from dtrak_jax.report.text import between, capitalized, method_name, number, table

METRICS = {
    "loss_increase": "increase of the original’s loss",
    "pixel_l2": "distance of pixels (L2)",
    "pixels_cosine": "cosine of pixels",
    "bottleneck_cosine": "cosine in the model’s bottleneck",
}

CONTROLS = ("random", "everything", "other-seed")
"""What the methods are compared with; they come last."""

STATISTICS = {
    "median": Look("median", "o", SUPPORT, filled=True),
    "mean": Look("mean", "s", INK),
}

ENDS = ("", "_low", "_high")
"""Of the fields of a statistic: the value and its interval."""


def counterfactual_section(result: Mapping, workdir: epath.Path, count: int) -> str:
    """Images before and after their top training images were removed.

    Args:
      result: what counterfactual.json holds.
      workdir: the run directory.
      count: queries shown.
    """
    settings = result["settings"]
    path = workdir / "counterfactual" / "images.npz"
    pictures = _pictures(result, files.read_npz(path), count) if path.exists() else ""
    summary = result["summary"]
    charts = "".join(
        _chart(metric, [row for row in summary if row["metric"] == metric])
        for metric in dict.fromkeys(row["metric"] for row in summary)
    )
    tables = _table("Effect of removal over all queries", summary) + _table(
        "The same, less the effect of random removal on the same query",
        result["differences"],
    )
    return f"""<section id="counterfactual"><h2>Without the strongest images</h2>
<p>For each of {len(settings["queries"]):,} generated images, the {settings["count"]:,}
training images that a method puts highest were removed, a model was trained on the rest,
and the same noise was turned into an image again. The more that image differs from the
original, and the more the new model’s loss of the original exceeds the old one’s, the more
the removed images did.</p>
<p class="note">Controls: {settings["count"]:,} random images removed; nothing removed and
the same seed, which should change nothing; nothing removed and another seed of training,
which shows how much an image differs by chance.</p>
{pictures}<div class="plots">{charts}</div>{tables}</section>"""


def _order(methods: list[str]) -> list[str]:
    """Methods as they came, then the controls."""
    return [m for m in methods if m not in CONTROLS] + [
        m for m in CONTROLS if m in methods
    ]


def _pictures(result: Mapping, images: Mapping[str, np.ndarray], count: int) -> str:
    """A row of pictures for each query."""
    methods = _order([m for m in images if m not in ("query_ids", "original")])
    distances = {(r["query"], r["method"]): r["pixel_l2"] for r in result["rows"]}
    ids = list(map(str, images["query_ids"]))[:count]
    rows = ""
    for i, query in enumerate(ids):
        items = _picture(images["original"][i], "original", "", query)
        for method in methods:
            distance = number(distances.get((query, method)))
            name = method_name(method)
            items += _picture(images[method][i], name, distance, query)
        rows += f'<article class="removed"><h3>{escape(query)}</h3><ol>{items}</ol></article>'
    total = len(images["query_ids"])
    shown = f"{len(ids):,} of {total:,}" if len(ids) < total else f"all {total:,}"
    return (
        f'<p class="note">Showing {shown}; below an image is its distance from the '
        f"original (L2 of pixels in [−1, 1]).</p>{rows}"
    )


def _picture(image: np.ndarray, name: str, distance: str, query: str) -> str:
    return (
        f'<li><img src="{data_uri(image)}" alt="{escape(query)}, {escape(name)}">'
        f"<b>{distance}</b><span>{escape(name)}</span></li>"
    )


def _chart(metric: str, summary: list[Mapping]) -> str:
    """Median and mean of a metric, by method."""
    by_method = {row["method"]: row for row in summary}
    rows = {
        method_name(method): [
            Mark(look, *(known(by_method[method][f"{name}{end}"]) for end in ENDS))
            for name, look in STATISTICS.items()
        ]
        for method in _order(list(by_method))
    }
    name = METRICS.get(metric, metric)
    # Distances grow with what was removed, and cosines shrink.
    more = "lower" if metric.endswith("_cosine") else "higher"
    return captioned(
        dots(rows, name, f"Effect of removal, {name}", zero=False),
        f"{escape(capitalized(name))}, with 95% intervals over queries; {more} is more "
        "effect.",
    )


def _table(caption: str, summary: list[Mapping]) -> str:
    def cells(row: Mapping) -> list[str]:
        values = [
            cell
            for name in STATISTICS
            for cell in (
                number(row[name]),
                between(row[f"{name}_low"], row[f"{name}_high"]),
            )
        ]
        return [
            method_name(row["method"]),
            METRICS.get(row["metric"], row["metric"]),
            *values,
        ]

    head = ("removed by", "metric", "median", "95% interval", "mean", "95% interval")
    return table(caption, head, map(cells, summary))
