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
    "effective": HONEST,
    "cross-fitted": Style("cross-fitted: λ chosen on other subsets", "s", INK),
    "halves": Style("learned from other subsets", "^", INK),
    "oracle": Style("oracle: λ chosen on the same subsets", "D", OPPOSE),
}
"""The look of points by the rule that chose their λ."""

HEADLINES = (None, "label-free", "effective", "halves")
"""Rules of headlines: no subset that is scored on had a say."""


def trust(lds: Mapping, methods: Collection[str], absolute: bool) -> list[dict]:
    """Returns the views of lds.json's sets of queries, with the best method first.

    The methods are those of the headlines; `absolute` says that the run's own λ is in
    other units than the curves over λ.
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
            (STYLES[row["damping_rule"]], row["lds"], row["low"], row["high"])
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
    rules = list(STYLES)

    def key(row: Mapping) -> tuple:
        value, place = best.get(row["method"]), rules.index(row["damping_rule"])
        return value is None, -(value or 0), row["method"], row["transform"], place

    return sorted(rows, key=key)


def _damping(name: str, curves: Mapping, rows: Sequence[Mapping]) -> dict:
    """Returns a chart of LDS against λ, if there are curves, and where they are highest.

    The λ of those rows that had it chosen without labels are vertical lines.
    """
    with_curve = [row for row in rows if row["method"] in curves]
    free = [row for row in with_curve if row["damping_rule"] == "label-free"]
    chosen = grouped(free, lambda row: row["damping"])
    vertical = dict.fromkeys(chosen, "label-free λ")
    if len(chosen) > 1:
        for value, of_value in chosen.items():
            vertical[value] += f": {listed(list(map(_label, of_value)))}"
    lines, peaks = {}, []
    for method, curve in curves.items():
        label = method_name(method)
        lines[label] = list(zip(curve["damping"], curve["lds"], strict=True))
        value, lds = max(lines[label], key=lambda point: point[::-1])
        peaks.append(f"{label} {number(lds)} at λ = {value:.3g}")
    axes = ("λ, in mean eigenvalues of its kernel", "LDS")
    alt = f"LDS against damping for {name} images"
    chart = lines and line_plot(lines, axes, alt, vertical=vertical)
    return {"damping": chart, "peaks": listed(peaks)}
