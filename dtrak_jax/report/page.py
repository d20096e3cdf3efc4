"""The page: its views and the templates that show them."""

import json
from typing import TYPE_CHECKING

import jinja2

from dtrak_jax import files
from dtrak_jax.config import flatten
from dtrak_jax.methods import METHODS
from dtrak_jax.report import text
from dtrak_jax.report.ablations import ablations
from dtrak_jax.report.charts import score_histogram, training_curve
from dtrak_jax.report.counterfactual import counterfactual
from dtrak_jax.report.features import features
from dtrak_jax.report.figures import data_uri
from dtrak_jax.report.groups import groupings
from dtrak_jax.report.queries import frequent_supporters, query_set
from dtrak_jax.report.text import grouped
from dtrak_jax.report.trust import trust

if TYPE_CHECKING:
    from dtrak_jax.run import Run

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
        *(text.method_name, text.number, text.signed, data_uri),
    )
}


def page(run: "Run") -> str:
    """Returns the report as one HTML document that needs no other file and no network.

    The same run, which must have scores of every shown method, gives the same text.
    Results that are not in the run directory are left out.
    """
    config, train = run.config, run.splits.train
    methods = config.shown_methods
    top = min(config.report.top, len(train.ids))
    sets = sorted(run.queries)
    scores = {
        name: {m: run.scores(m, name) for m in methods if METHODS[m].applies_to(name)}
        for name in sets
    }
    every = [(name, s) for name in sets for s in scores[name].values()]
    by_method = grouped((s for _, s in every), lambda s: s.method)
    lds, removal, studies = map(run.json, ("lds", "counterfactual", "ablations"))
    path = run.workdir / "counterfactual" / "images.npz"
    images = files.read_npz(path) if path.exists() else {}
    shown = config.report.queries
    generated = run.queries.get("generated")
    prompts = {}
    if generated and generated.captions is not None:
        prompts = dict(zip(generated.ids, generated.captions, strict=True))
    datasets = (train, *run.queries.values())
    captioned = any(images.captions is not None for images in datasets)
    return TEMPLATES.get_template("page.html").render(
        run=run,
        train=train,
        methods=list(by_method),
        top=top,
        generated=generated,
        prompts=prompts,
        # Only then does the page have larger pictures, and what belongs to them.
        described=captioned or bool(train.groups),
        groupings=groupings(train, run.queries, scores, shown),
        lds=lds,
        trust=trust(lds, methods, config.attribution.absolute) if lds else [],
        sets=[query_set(n, run.queries[n], scores[n], shown, top) for n in sets],
        frequent=[frequent_supporters(*item, top) for item in by_method.items()],
        distributions=[(name, s, score_histogram(s, name)) for name, s in every],
        removal=removal and counterfactual(removal, images, shown),
        studies=studies and ablations(studies),
        curve=run.metrics and training_curve(run.metrics),
        features=features(run, by_method),
        settings=flatten(config),
    )
