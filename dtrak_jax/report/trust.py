"""The linear datamodeling score: do scores predict what retraining does?"""

from collections.abc import Callable, Collection, Mapping, Sequence

from markupsafe import Markup

from dtrak_jax.report.charts import Style, interval_plot, line_plot
from dtrak_jax.report.figures import INK, OPPOSE, SUPPORT
from dtrak_jax.report.text import grouped, listed, method_name, number

HONEST = Style("no λ, or λ chosen without retraining", "o", SUPPORT, SUPPORT)

STYLES = {
    None: HONEST,
    "label-free": HONEST,
    "cross-fitted": Style("cross-fitted: λ chosen on other subsets", "s", INK),
    "halves": Style("learned from other subsets", "^", INK),
    "oracle": Style("oracle: λ chosen on the same subsets", "D", OPPOSE),
}
"""The look of points by the rule that chose their λ; another rule has its name."""

HEADLINES = (None, "label-free", "halves")
"""Rules of headlines: no subset that is scored on had a say."""


def trust(lds: Mapping, methods: Collection[str], absolute: bool) -> list[dict]:
    """Returns the LDS of every method for each set of queries, best method first.

    Args:
      lds: the contents of lds.json.
      methods: the methods of the headlines.
      absolute: whether the run's own λ is in other units than the curves over λ.
    """
    views = []
    for name, result in lds["queries"].items():
        rows = _ordered(result["rows"])
        linear = [row for row in rows if row["transform"] == "linear"]
        headlines = [row for row in linear if row["damping_rule"] in HEADLINES]
        alt = f"LDS of every method for {name} images"
        views.append(
            {
                **result,
                "name": name,
                "rows": rows,
                "headlines": [row for row in headlines if row["method"] in methods],
                "chart": lds_chart(linear, _label, alt, result["ceiling"]),
                **_damping(name, result["curves"], [] if absolute else linear),
            }
        )
    return views


def lds_chart(
    rows: Sequence[Mapping], label: Callable, alt: str, ceiling: Mapping | None
) -> Markup:
    """Draws LDS with intervals, a row of the chart for all rows with the same label."""
    points = {
        name or "all": [
            (
                STYLES.get(row["damping_rule"]) or Style(row["damping_rule"], "v", INK),
                *(row[key] for key in ("lds", "low", "high")),
            )
            for row in members
        ]
        for name, members in grouped(rows, label).items()
    }
    return interval_plot(points, "LDS", alt, ceiling=ceiling)


def _label(row: Mapping) -> str:
    """Returns the label of a row's method."""
    return method_name(row["method"])


def _ordered(rows: Sequence[Mapping]) -> list[Mapping]:
    """Returns rows method by method, the one with the best headline first."""
    headlines = [row for row in rows if row["damping_rule"] in HEADLINES]
    best = {r["method"]: r["lds"] for r in headlines if r["transform"] == "linear"}
    rules = {rule: place for place, rule in enumerate(STYLES)}

    def key(row: Mapping) -> tuple:
        value = best.get(row["method"])
        place = rules.get(row["damping_rule"], len(rules))
        return value is None, -(value or 0), row["method"], row["transform"], place

    return sorted(rows, key=key)


def _damping(name: str, curves: Mapping, rows: Sequence[Mapping]) -> dict:
    """Returns a chart of LDS against λ, if there are curves, and where they are highest.

    The λ of those rows that had it chosen without labels are vertical lines.
    """
    free = [
        r for r in rows if r["method"] in curves and r["damping_rule"] == "label-free"
    ]
    chosen = grouped(free, lambda row: row["damping"])
    lines = {
        method_name(method): list(zip(curve["damping"], curve["lds"], strict=True))
        for method, curve in curves.items()
    }
    chart = lines and line_plot(
        lines,
        ("λ, in mean eigenvalues of its kernel", "LDS"),
        f"LDS against damping for {name} images",
        vertical={
            value: "label-free λ"
            + (f": {listed(list(map(_label, of_value)))}" if len(chosen) > 1 else "")
            for value, of_value in chosen.items()
        },
    )
    peaks = [
        f"{label} {number(lds)} at λ = {value:.3g}"
        for label, line in lines.items()
        for value, lds in [max(line, key=lambda point: point[::-1])]
    ]
    return {"damping": chart, "peaks": listed(peaks)}
