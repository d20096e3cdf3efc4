"""Sections of the page about retraining: do scores predict what it does?"""

from collections.abc import Collection, Mapping
from html import escape

from dtrak_jax.report.charts import Line, Look, Mark, dots, known, lines
from dtrak_jax.report.figures import INK, OPPOSE, SUPPORT, captioned
from dtrak_jax.report.text import (
    between,
    capitalized,
    damping,
    listed,
    method_name,
    number,
    table,
)

HONEST = Look("no λ, or λ chosen without retraining", "o", SUPPORT, filled=True)

LOOKS = {
    None: HONEST,
    "label-free": HONEST,
    "cross-fitted": Look("cross-fitted: λ chosen on other subsets", "s", INK),
    "halves": Look("learned from other subsets", "^", INK),
    "oracle": Look("oracle: λ chosen on the same subsets", "D", OPPOSE),
}
"""By the rule that chose the damping."""


def look(rule: str | None) -> Look:
    """Of a rule; one that has no look of its own is called what it is."""
    return LOOKS.get(rule, Look(str(rule), "v", INK))


def trust_words(lds: Mapping | None, methods: Collection[str]) -> str:
    """How far to trust the scores of these methods, in an HTML list item."""
    if lds is None:
        return (
            "<li>How far to trust the scores has not been measured for this run. "
            "<code>dtrak-jax retrain</code> and then <code>dtrak-jax lds</code>, with "
            "this config and workdir, retrain on subsets of the data and measure it "
            "(the linear datamodeling score); until then, images that look alike are "
            "no evidence of influence.</li>"
        )
    items = "".join(
        f"<li>{escape(name)} images: {escape(_headline(one, methods))}.</li>"
        for name, one in lds["queries"].items()
    )
    return (
        '<li>How far to trust the scores: their <a href="#trust">linear datamodeling '
        "score</a> (LDS), the rank correlation of what they predict with what "
        "retraining on subsets of the data did, is 1 at best and 0 for chance. With "
        f"no λ, or one chosen without retraining, and 95% intervals: <ul>{items}</ul>"
        "</li>"
    )


def _headline(one: Mapping, methods: Collection[str]) -> str:
    """LDS of the methods for a set of queries, best first, and the ceiling."""
    parts = [
        f"{method_name(row['method'])} {_estimate(row, 'lds')}"
        for row in sorted(filter(_is_headline, one["rows"]), key=_strength)
        if row["method"] in methods
    ]
    return "; ".join([*parts, f"noise ceiling {_ceiling(one)}"])


def _is_headline(row: Mapping) -> bool:
    return row["transform"] == "linear" and look(row["damping_rule"]) in (
        HONEST,
        LOOKS["halves"],
    )


def _strength(row: Mapping) -> float:
    """To sort by, best first; what is not known comes last."""
    return float("inf") if row["lds"] is None else -row["lds"]


def _estimate(one: Mapping, value: str, sign: str = "") -> str:
    return f"{number(one[value], sign)} {between(one['low'], one['high'])}"


def _ceiling(one: Mapping) -> str:
    ceiling = one["ceiling"]
    return _estimate(ceiling, "value") if ceiling else "not known, with one seed only"


def trust_section(lds: Mapping) -> str:
    """The LDS of every method, as a chart and as tables."""
    parts = "".join(_queries(name, one) for name, one in lds["queries"].items())
    settings = lds["settings"]
    seeds, timesteps = settings["seeds"], settings["timesteps"]
    models = f"{seeds:,} models each" if seeds > 1 else "one model each"
    # How many, or which.
    timesteps = timesteps if isinstance(timesteps, int) else len(timesteps)
    return f"""<section id="trust"><h2>How far the scores can be trusted</h2>
<p>{settings["subsets"]:,} random subsets, each with {settings["fraction"]:.0%} of the
training images, got {models}. A good score predicts
on which subsets the loss of a query is low. The linear datamodeling score (LDS) is the
mean over queries of the Spearman correlation, over subsets, of a subset's summed scores
with minus its loss.</p>
<p class="note">Losses are of {timesteps:,} timesteps with
{settings["draws"]:,} noise draws each. Intervals hold 95% of {settings["resamples"]:,}
bootstrap samples of subsets and queries together. The noise ceiling is the LDS that
the true mean loss would have: the seeds of retraining leave no more to predict. An
<b>oracle</b> chose λ on the very subsets that it is scored on and is too good; a
cross-fitted λ was chosen on the other half of them.</p>{parts}</section>"""


def _queries(name: str, one: Mapping) -> str:
    """The chart and the tables of one set of queries."""
    rows = _ordered(one["rows"])
    chart = captioned(
        dots(
            _marks(rows),
            "LDS",
            f"LDS of every method for {name} images",
            band=_band(one["ceiling"]),
        ),
        f"{escape(capitalized(name))} images: LDS with 95% interval. Squared scores "
        "are in the table only.",
    )
    differences = table(
        f"Differences in LDS, {name} images",
        ("pair", "difference", "95% interval"),
        (
            (
                f"{method_name(d['a'])} − {method_name(d['b'])}",
                number(d["value"], "+"),
                between(d["low"], d["high"]),
            )
            for d in one["differences"]
        ),
    )
    note = (
        '<p class="note">Differences are paired, over the same subsets and queries: '
        "an interval without 0 tells two methods apart even where their own intervals "
        "overlap.</p>"
    )
    pairs = f"<div>{differences}{note}</div>" if one["differences"] else ""
    return (
        f"<h3>{escape(capitalized(name))} images</h3>"
        f'<div class="plots">{chart}{pairs}</div>{_table(name, rows, one)}'
    )


def _ordered(rows: list[Mapping]) -> list[Mapping]:
    """Method by method, the one with the best headline first."""
    best = {row["method"]: _strength(row) for row in rows if _is_headline(row)}
    rules = list(LOOKS)

    def key(row: Mapping) -> tuple:
        method, rule = row["method"], row["damping_rule"]
        place = rules.index(rule) if rule in rules else len(rules)
        squared = row["transform"] != "linear"
        return best.get(method, float("inf")), method, squared, place

    return sorted(rows, key=key)


def _marks(rows: list[Mapping]) -> dict[str, list[Mark]]:
    """The marks of every method."""
    marks: dict[str, list[Mark]] = {}
    for row in rows:
        if row["transform"] == "linear":
            values = (known(row[field]) for field in ("lds", "low", "high"))
            mark = Mark(look(row["damping_rule"]), *values)
            marks.setdefault(method_name(row["method"]), []).append(mark)
    return marks


def _band(ceiling: Mapping | None) -> tuple[str, float, float, float] | None:
    if not ceiling:
        return None
    return "noise ceiling", *(known(ceiling[key]) for key in ("value", "low", "high"))


def _table(name: str, rows: list[Mapping], one: Mapping) -> str:
    def cells(row: Mapping) -> tuple[str, ...]:
        reference = row.get("reference") or dict.fromkeys(
            ("low", "high", "mean", "std")
        )
        return (
            method_name(row["method"]),
            row["transform"],
            row["damping_rule"] or "–",
            damping(row["damping"]),
            number(row["lds"]),
            between(row["low"], row["high"]),
            between(reference["low"], reference["high"]),
            number(reference["mean"]),
            number(reference["std"]),
        )

    head = (
        "method",
        "scores",
        "rule for λ",
        "λ",
        "LDS",
        "95% interval",
        "paper's interval",
        "paper's mean",
        "paper's std",
    )
    return (
        table(f"LDS of every method, {name} images", head, map(cells, rows))
        + f'<p class="note">Noise ceiling: {_ceiling(one)}. “Paper’s” are the '
        "numbers of the D-TRAK paper’s notebooks, for comparison with its tables: 64 "
        "bootstrap samples of subsets, queries held fixed, which is too narrow.</p>"
    )


def damping_section(lds: Mapping, absolute: bool) -> str:
    """LDS against λ, for every method with a kernel; "" if there is none.

    Args:
      lds: what lds.json holds.
      absolute: whether the run's own λ is in other units than the curves.
    """
    plots = [
        captioned(
            lines(
                {
                    method_name(method): Line(curve["damping"], curve["lds"])
                    for method, curve in one["curves"].items()
                },
                ("λ, in mean eigenvalues of its kernel", "LDS"),
                f"LDS against damping for {name} images",
                vertical={} if absolute else _chosen(one),
            ),
            f"{escape(capitalized(name))} images, {_peaks(one)}.",
        )
        for name, one in lds["queries"].items()
        if one["curves"]
    ]
    if not plots:
        return ""
    return (
        '<section id="damping"><h2>LDS against damping</h2><p>What another λ would have '
        "given. A broad top means that the choice matters little. Picking the top of a "
        "curve is what the oracle does.</p>"
        f'<div class="plots">{"".join(plots)}</div></section>'
    )


def _chosen(one: Mapping) -> dict[float, str]:
    """{λ: label} of the λ that were chosen without labels."""
    methods: dict[float, list[str]] = {}
    for row in one["rows"]:
        free = row["damping_rule"] == "label-free" and row["transform"] == "linear"
        if free and row["method"] in one["curves"]:
            name = method_name(row["method"])
            methods.setdefault(row["damping"], []).append(name)
    if len(methods) == 1:
        return dict.fromkeys(methods, "label-free λ")
    return {value: f"label-free λ: {listed(m)}" for value, m in methods.items()}


def _peaks(one: Mapping) -> str:
    """Where the curves are highest, in words."""
    tops = []
    for method, curve in one["curves"].items():
        value, where = max(zip(curve["lds"], curve["damping"], strict=True))
        tops.append(f"{escape(method_name(method))} {number(value)} at λ = {where:.3g}")
    return f"highest: {listed(tops)}"
