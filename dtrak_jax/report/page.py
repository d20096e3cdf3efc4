"""The page: its views and the templates that show them."""

import json

import jinja2

from dtrak_jax.methods import METHODS
from dtrak_jax.report import text
from dtrak_jax.report.ablations import ablations
from dtrak_jax.report.charts import score_histogram, training_curve
from dtrak_jax.report.counterfactual import counterfactual
from dtrak_jax.report.features import features, layers
from dtrak_jax.report.figures import data_uri
from dtrak_jax.report.groups import groupings
from dtrak_jax.report.health import alarm, findings, is_untrained, remaking
from dtrak_jax.report.overview import overview
from dtrak_jax.report.queries import (
    anchors,
    frequent_supporters,
    most_alike,
    query_set,
)
from dtrak_jax.report.record import Record
from dtrak_jax.report.standing import standings
from dtrak_jax.report.text import grouped
from dtrak_jax.report.trust import trust

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("dtrak_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {"between": text.between}
TEMPLATES.filters |= {"commas": "{:,}".format, "json": json.dumps}
TEMPLATES.filters |= {
    function.__name__: function
    for function in (
        *(text.capitalized, text.correlation, text.damping, text.listed),
        *(text.method_name, text.number, text.plus_minus, text.signed, data_uri),
    )
}


PAPER = "https://arxiv.org/abs/2311.00500"
"""The paper that this package began with."""


def page(record: Record) -> str:
    """Returns the report as one HTML document that needs no other file and no network.

    The same record gives the same text.
    """
    train, queries, scores = record.train, record.queries, record.scores
    top, shown = min(record.top, len(train.ids)), record.shown
    every = [(name, s) for name, of_set in scores.items() for s in of_set.values()]
    by_method = grouped((s for _, s in every), lambda s: s.method)
    untrained = is_untrained(record)
    standing = standings(scores, train.groups, untrained)
    alike = standings({n: {"": s} for n, s in record.pixels.items()}, {})
    generated = queries.get("generated")
    prompts = {}
    if generated and generated.captions is not None:
        prompts = dict(zip(generated.ids, generated.captions, strict=True))
    captioned = any(d.captions is not None for d in (train, *queries.values()))
    absolute = record.damping is not None and any(record.damping[1:])
    removal, lds, made = record.counterfactual, record.lds, remaking(record)
    places = anchors(queries)
    grouping_views = groupings(
        *(train, queries, scores, shown, standing, record.recipe)
    )
    return TEMPLATES.get_template("page.html").render(
        record=record,
        train=train,
        methods=list(by_method),
        sources={
            m: METHODS[m].source
            for m in by_method
            if m in METHODS and METHODS[m].source
        },
        paper=PAPER,
        top=top,
        generated=generated,
        prompts=prompts,
        # Only then does the page have larger pictures, and what belongs to them.
        described=captioned or bool(train.groups),
        untrained=untrained,
        alarm=alarm(record),
        other_models=bool(made and not made.is_remade),
        findings=grouped(findings(record, standing), lambda finding: finding.title),
        groupings=grouping_views,
        overview=overview(standing, grouping_views),
        copied=any(len(s.picture_rows) < len(s.train_ids) for _, s in every),
        lds=lds,
        trust=trust(lds, list(by_method), absolute) if lds else [],
        sets=[
            query_set(
                *(n, queries[n], train, s, (shown, top), standing[n], record.recipe)
            )
            | {
                "alike": most_alike(record.pixels.get(n), alike.get(n)),
                "anchors": places[n],
            }
            for n, s in scores.items()
        ],
        frequent=[frequent_supporters(*item, top) for item in by_method.items()],
        distributions=[(name, s, score_histogram(s, name)) for name, s in every],
        removal=removal and counterfactual(removal, record.removed, shown),
        studies=record.ablations and ablations(record.ablations),
        curve=record.metrics and training_curve(record.metrics),
        features=features(record.recipe, by_method),
        layers=layers(scores),
    )
