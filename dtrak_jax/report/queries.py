"""Sections of the page about queries: who supports them, and do methods agree."""

import warnings
from collections.abc import Mapping
from html import escape

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.report.figures import captioned, data_uri, score_histogram
from dtrak_jax.report.text import listed, method_name

VISIBLE_ID = 11
"""Characters of an id below its image; all of it is in the tooltip."""

FREQUENT = 12


def query_section(
    name: str,
    images: np.ndarray,
    ids: np.ndarray,
    labels: Mapping[str, str],
    scores: Mapping[str, Scores],
    train: Dataset,
    *,
    count: int,
    top: int,
) -> str:
    """The first `count` queries of a set, with what each method found.

    Args:
      name: of the set: "generated" or "validation".
      images: the queries [q, H, W, C].
      ids: of the queries [q].
      labels: {id: label} of the queries whose label is known.
      scores: of each method, for these queries.
      train: the training images.
      count: queries shown.
      top: supporting and opposing images shown.
    """
    count = min(count, len(ids))
    shown = f"{count:,} of {len(ids):,}" if count < len(ids) else f"all {count:,}"
    paths = listed([f"<code>scores/{m}-{name}.npz</code>" for m in scores])
    more = "; <code>--report.queries</code> shows more" if count < len(ids) else ""
    top = min(top, len(train.ids))
    agreed = _agreement(scores, top)
    summary = f"<p>{_agreement_summary(*agreed, top)}</p>" if agreed else ""
    rows = {m: _rows(s, train, count, top) for m, s in scores.items()}
    cards = []
    for i in range(count):
        label = labels.get(str(ids[i]))
        methods = "".join(
            f'<div class="method"><h4>{method_name(m)}</h4>{rows[m][i]}</div>'
            for m in rows
        )
        line = ""
        if agreed:
            rho, overlap = agreed[0][i], agreed[1][i]
            line = (
                f'<p class="agreement">Agreement of the methods (not accuracy): '
                f"Spearman {_rho(rho)} over all training images, {overlap} of the top "
                f"{top} in common</p>"
            )
        cards.append(
            f'<article class="query"><header><img src="{data_uri(images[i])}" '
            f'alt="query {escape(str(ids[i]))}"><h3>{escape(str(ids[i]))}</h3>'
            + (f"<p>label {escape(label)}</p>" if label is not None else "")
            + f'</header><div class="methods">{methods}</div>{line}</article>'
        )
    return (
        f'<section id="{name}"><h2>{name.capitalize()} images</h2>'
        f'<p class="note">Showing {shown}; all scores are in {paths}{more}.</p>'
        f"{summary}{''.join(cards)}</section>"
    )


def frequent_section(
    scores: Mapping[tuple[str, str], Scores], train: Dataset, top: int
) -> str:
    """The training images that are most often among a query's top supporters."""
    top = min(top, len(train.ids))
    parts = []
    for method in dict.fromkeys(method for _, method in scores):
        tops = [s.top(top) for (_, m), s in scores.items() if m == method]
        named = np.concatenate([t.index[t.scores > 0] for t in tops])
        counts = np.bincount(named, minlength=len(train.ids))
        order = np.argsort(-counts, kind="stable")[:FREQUENT]
        order = order[counts[order] > 0]
        queries = sum(len(t.ids) for t in tops)
        items = "".join(
            _item(
                train, i, "", f"{counts[i]:,} of {queries:,} queries", f"{counts[i]}×"
            )
            for i in order
        )
        share = counts[order].sum() / max(1, counts.sum())
        parts.append(
            f'<div class="method"><h3>{method_name(method)}</h3>'
            f'<ol class="thumbs plain">{items}</ol>'
            f'<p class="note">{np.sum(counts > 0):,} of {len(counts):,} training images '
            f"are named at least once. These {len(order)} take {share:.0%} of all "
            f"places; spread evenly it would be {len(order) / len(counts):.1%}.</p>"
            "</div>"
        )
    return (
        '<section id="frequent"><h2>Frequent supporters</h2><p>The training images '
        f"named most often among the top {top} supporters, over all queries. If a few "
        "images dominate here, they say more about the method than about any single "
        f'query.</p><div class="methods">{"".join(parts)}</div></section>'
    )


def distribution_section(scores: Mapping[tuple[str, str], Scores]) -> str:
    """A histogram of the scores of every method and set of queries."""
    plots = []
    for name in dict.fromkeys(name for name, _ in scores):
        for (other, method), one in scores.items():
            if other == name:
                title = f"{method_name(method)}, {name} images"
                svg = score_histogram(one.scores, title)
                plots.append(captioned(svg, f"{title}: {one.scores.size:,} scores"))
    return (
        '<section id="distributions"><h2>Distribution of scores</h2><p>All pairs of a '
        "query and a training image; the number of pairs is on a logarithmic scale.</p>"
        f'<div class="plots">{"".join(plots)}</div></section>'
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two vectors; NaN if one of them is constant."""
    with warnings.catch_warnings(action="ignore", category=ConstantInputWarning):
        return float(spearmanr(a, b).statistic)


def signed(score: float) -> str:
    """A score with its sign and three digits, for people."""
    return f"{score:+#.3g}".removesuffix(".").replace("-", "−")


def _agreement(
    scores: Mapping[str, Scores], top: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(Spearman, number of common top supporters) of every query, of two methods."""
    if len(scores) != 2:
        return None
    a, b = scores.values()
    pairs = zip(a.top(top).index, b.top(top).index, strict=True)
    return (
        np.array([spearman(*rows) for rows in zip(a.scores, b.scores, strict=True)]),
        np.array([len(np.intersect1d(*indices)) for indices in pairs]),
    )


def _agreement_summary(rho: np.ndarray, overlap: np.ndarray, top: int) -> str:
    return (
        f"Over all {len(rho):,} queries the two methods' scores have a median Spearman "
        f"correlation of {_rho(np.median(rho))}, and on average "
        f"{overlap.mean():.1f} of their top {top} supporters are the same. This is "
        "agreement between methods; it does not say that either is right."
    )


def _rho(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:+.2f}".replace("-", "−")


def _rows(scores: Scores, train: Dataset, count: int, top: int) -> list[str]:
    """For each of the first queries, its supporting and its opposing images."""
    sides = {
        "supporting": scores.top(top),
        "opposing": scores.top(top, opposing=True),
    }
    rows = []
    for i in range(count):
        largest = max(abs(side.scores[i]).max() for side in sides.values()) or 1.0
        row = ""
        for name, side in sides.items():
            items = "".join(
                _item(
                    train,
                    index,
                    f'<span class="bar" style="width:{abs(value) / largest:.0%}">'
                    "</span>",
                    f"score {value:.6g}",
                    signed(value),
                )
                for index, value in zip(side.index[i], side.scores[i], strict=True)
                # With few training images one list would run into the other.
                if (value < 0 if name == "opposing" else value > 0)
            )
            none = '<p class="note">none: no score is of this sign</p>'
            row += f'<h5 class="{name}">{name}</h5>' + (
                f'<ol class="thumbs {name}">{items}</ol>' if items else none
            )
        rows.append(row)
    return rows


def _item(train: Dataset, index: int, bar: str, long: str, short: str) -> str:
    """One training image in a list, with a caption and more in its tooltip."""
    name = str(train.ids[index])
    known = [name]
    label = ""
    if train.labels is not None:
        text = train.label_names[train.labels[index]]
        known.append(f"label {text}")
        label = f"<span>{escape(text)}</span>"
    if train.captions is not None:
        known.append(train.captions[index])
    visible = name if len(name) <= VISIBLE_ID else f"…{name[1 - VISIBLE_ID :]}"
    return (
        f'<li title="{escape(" · ".join([*known, long]))}">'
        f'<img src="{data_uri(train.images[index])}" alt="{escape(name)}">{bar}'
        f"<b>{short}</b>{label}<small>{escape(visible)}</small></li>"
    )
