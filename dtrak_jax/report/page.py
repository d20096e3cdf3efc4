"""The page: its head, and all sections in order."""

from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import PurePath

import numpy as np
from etils import epath

from dtrak_jax import files
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.config import Config, shown_methods
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.report.ablations import ablations_section
from dtrak_jax.report.counterfactual import counterfactual_section
from dtrak_jax.report.queries import (
    distribution_section,
    frequent_section,
    query_section,
)
from dtrak_jax.report.run import (
    configuration_section,
    features_section,
    files_section,
    model_section,
)
from dtrak_jax.report.text import listed, method_name
from dtrak_jax.report.trust import damping_section, trust_section, trust_words

SETS = ("generated", "validation")

LINKS = {
    "trust": "How far to trust it",
    "generated": "Generated images",
    "validation": "Validation images",
    "frequent": "Frequent supporters",
    "distributions": "Distribution of scores",
    "counterfactual": "Without the strongest images",
    "damping": "LDS against damping",
    "ablations": "Ablations",
    "features": "Features and kernels",
    "configuration": "Configuration",
}
"""Sections, by id, in the order of the page."""

PIXELATED_BELOW = 64
"""Smaller images are enlarged with their pixels visible."""


def page(
    config: Config,
    workdir: epath.PathLike,
    train: Dataset,
    *,
    queries: Mapping[str, tuple[np.ndarray, np.ndarray]],
    scores: Mapping[tuple[str, str], Scores],
) -> str:
    """The report as one HTML document that needs no other file and no network.

    The same run gives the same text.

    Args:
      config: of the run.
      workdir: the run directory; what is not in it is left out of the page.
      train: the training images.
      queries: (images in [-1, 1], ids) of "generated" and "validation" images, or of
        one of them.
      scores: by (set of queries, method); of `shown_methods`, others are left out.

    Raises:
      ValueError: scores are of other images than those given.
    """
    workdir = epath.Path(workdir)
    methods = shown_methods(config)
    scores = {key: one for key, one in scores.items() if key[1] in methods}
    for (name, method), one in scores.items():
        same_queries = np.array_equal(queries[name][1], one.query_ids)
        if not same_queries or not np.array_equal(train.ids, one.train_ids):
            raise ValueError(
                f"the {method} scores of the {name} images are of other images; run "
                "`dtrak-jax attribute` again."
            )
    labels = _validation_labels(workdir)
    lds = _read(workdir / "lds.json")
    removal = _read(workdir / "counterfactual.json")
    ablations = _read(workdir / "ablations.json")
    sections = [trust_section(lds)] if lds else []
    for name in (name for name in SETS if name in queries):
        of_set = {m: s for (other, m), s in scores.items() if other == name}
        sections.append(
            query_section(
                name,
                *queries[name],
                labels if name == "validation" else {},
                of_set,
                train,
                count=config.report.queries,
                top=config.report.top,
            )
        )
    sections += [
        frequent_section(scores, train, config.report.top),
        distribution_section(scores),
        counterfactual_section(removal, workdir, config.report.queries)
        if removal
        else "",
        damping_section(lds, config.attribution.absolute) if lds else "",
        ablations_section(ablations) if ablations else "",
        model_section(workdir, queries),
        features_section(config, workdir, scores),
        configuration_section(config, workdir),
        files_section(workdir),
    ]
    body = "\n".join(filter(None, sections))
    style = resources.files("dtrak_jax.report").joinpath("page.css").read_text("utf-8")
    pixelated = ' class="pixelated"' if train.images.shape[1] < PIXELATED_BELOW else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        '<link rel="icon" href="data:,"><title>Data attribution report</title>'
        f"<style>{style}</style></head>\n<body{pixelated}><main>\n"
        + "\n".join([_head(config, train, queries, scores, lds, body), body])
        + "\n</main></body></html>\n"
    )


def _read(path: epath.Path) -> dict | None:
    """A JSON file; None if there is none."""
    return files.read_json(path) if path.exists() else None


def _validation_labels(workdir: epath.Path) -> dict[str, str]:
    """{id: label} of the validation images, as far as splits.npz knows."""
    path = workdir / "splits.npz"
    saved = files.read_npz(path) if path.exists() else {}
    if "validation_labels" not in saved:
        return {}
    names = saved["label_names"][saved["validation_labels"]]
    return dict(zip(map(str, saved["validation_ids"]), map(str, names), strict=True))


def _head(
    config: Config,
    train: Dataset,
    queries: Mapping,
    scores: Mapping,
    lds: dict | None,
    body: str,
) -> str:
    """Title, links to the sections in `body`, and how to read them."""
    names = [method_name(m) for m in dict.fromkeys(method for _, method in scores)]
    data = {
        "digits": "scikit-learn's digits",
        "tfds": config.data.name,
        "folder": f"the folder {PurePath(config.data.name).name}",
    }[config.data.source]
    n, height, width, channels = train.images.shape
    asked = " and ".join(
        f"{len(queries[name][1]):,} {name} images" for name in SETS if name in queries
    )
    toc = " ".join(
        f'<a href="#{anchor}">{text}</a>'
        for anchor, text in LINKS.items()
        if f'<section id="{anchor}">' in body
    )
    return f"""<header class="head"><h1>Data attribution report</h1>
<p class="lead">Which of {n:,} training images stand behind what a diffusion model does
with {asked}, according to {listed(names)}.</p>
<p class="note">Training images: {n:,} from {escape(data)}, {height}×{width}
{"grey" if channels == 1 else "RGB"}.</p><nav>{toc}</nav></header>
<section id="reading"><h2>How to read it</h2><ul>
<li>Every training image has a score for every query, an estimate of its influence. A
<b class="supporting">positive</b> score means that training on the image lowered the
query's loss (<b class="supporting">supporting</b>), a <b class="opposing">negative</b>
one that it raised it (<b class="opposing">opposing</b>).</li>
<li>Compare scores within one query and one method only. They are no probabilities, and
their scale differs between queries and between methods. Bars are relative to the
strongest image of that query and method. Below each image are its score, its label if
it has one, and its id.</li>
{trust_words(lds, shown_methods(config))}</ul></section>"""
