"""The report: one page that holds everything it shows and asks for nothing else."""

import base64
import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.attribution import Damping, Scores
from dtrak_jax.attribution.groups import names_hash
from dtrak_jax.config import (
    AttributionConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    ReportConfig,
    SampleConfig,
)
from dtrak_jax.data import Dataset
from dtrak_jax.diffusion import Schedule, linear_schedule
from dtrak_jax.diffusion.config import build_schedule
from dtrak_jax.digests import digest_rows
from dtrak_jax.features import Task
from dtrak_jax.report import figures, of_run
from dtrak_jax.report import page as page_of
from dtrak_jax.report.ablations import ablations
from dtrak_jax.report.groups import matrix, ranking, right
from dtrak_jax.report.learning import baseline
from dtrak_jax.report.queries import agreement, anchors
from dtrak_jax.report.record import Recipe
from dtrak_jax.report.text import signed
from dtrak_jax.report.trust import STYLES
from dtrak_jax.report.uncertainty import group_uncertainty, uncertainty

RESULTS = Path(__file__).parents[1] / "configs" / "results"
TIMESTEPS = (100, 300)
HOSTILE = "<script>alert('&')</script>\" onload=\"x"
LONG = "x" * 60
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)


@dataclasses.dataclass
class FakeRun:
    """A run as the page sees it, made of arrays."""

    config: Config
    workdir: Path
    splits: SimpleNamespace
    queries: dict
    made: dict
    """{(queries, method): scores}"""
    results: dict = dataclasses.field(default_factory=dict)
    """What `json` reads."""
    metrics: list = dataclasses.field(default_factory=list)
    versions: dict = dataclasses.field(default_factory=dict)
    losses: np.ndarray | None = None
    """Those of the features of training images [T, n]."""
    schedule: Schedule = dataclasses.field(default_factory=linear_schedule)

    @property
    def space(self):
        return SimpleNamespace(x=lambda name: self.splits.train.images)

    def scores(self, method, queries):
        return self.made[queries, method]

    def features(self, name, measurement):
        if self.losses is None:
            raise FileNotFoundError
        fingerprint = {"network": "n3t", "params": "par4ms", "timesteps": TIMESTEPS}
        return SimpleNamespace(losses=self.losses, fingerprint=fingerprint)

    def json(self, name):
        return self.results.get(name)

    def task(self):
        settings = self.config.features
        fields = ("timesteps", "strategy", "draws", "per_timestep")
        return Task(
            lambda *_: None,
            build_schedule(self.config.diffusion),
            **{name: getattr(settings, name) for name in fields},
        )

    def change(self, section, **changes):
        """Changes fields of a section of the config."""
        changed = dataclasses.replace(getattr(self.config, section), **changes)
        self.config = dataclasses.replace(self.config, **{section: changed})


class Pictures(SimpleNamespace):
    """A data set whose images a test may change."""

    @property
    def digests(self):
        return np.array(digest_rows(self.images))


def page(run):
    """The page of a run."""
    return page_of(of_run(run))


def make(
    workdir, *, n=20, channels=1, size=8, methods=("dtrak", "trak"), top=3, shown=2,
    sets=("validation", "generated"), hostile=False,
):  # fmt: skip
    """A run with 5 queries in each set, and nothing but scores."""
    rng = np.random.default_rng(0)

    def dataset(ids, **known):
        shape = (len(ids), size, size, channels)
        images = rng.uniform(-1, 1, shape).astype(np.float32)
        nothing = {"labels": None, "label_names": (), "captions": None}
        nothing["digest"] = "d4ta"
        columns = nothing | {"groups": {}} | known
        return Pictures(images=images, ids=np.array(ids), **columns)

    ids = [*(f"train-{i:03d}" for i in range(n - 1)), LONG]
    known = {"labels": np.arange(n) % 2, "label_names": ("cat", "dog")}
    if hostile:
        ids[0] = HOSTILE
        known |= {"label_names": ("cat&", HOSTILE), "captions": np.full(n, HOSTILE)}
    train = dataset(ids, **known)
    queries = {
        name: dataset(
            [HOSTILE if hostile and i == 0 else f"{name}-{i}" for i in range(5)],
            **(
                known | {"labels": np.array([1, 0, 0, 0, 0])}
                if name == "validation"
                else {}
            ),
        )
        for name in sets
    }
    kernels = len(TIMESTEPS)
    scores = {
        (name, method): Scores(
            scores=rng.normal(size=(5, n)).astype(np.float32),
            train_ids=train.ids,
            query_ids=queries[name].ids,
            method=method,
            damping=Damping(0.1),
            lambdas=np.full(kernels, 0.1),
            eigenvalues=np.sort(rng.exponential(size=(kernels, n)), 1),
        )
        for name in sets
        for method in methods
    }
    if hostile:
        for one in scores.values():
            one.scores[:, 0] = 9
    config = Config(
        data=DataConfig(source="digits", train=n, validation=5),
        sample=SampleConfig(count=5),
        features=FeaturesConfig(timesteps=TIMESTEPS, dim=64),
        attribution=AttributionConfig(methods=methods),
        report=ReportConfig(queries=shown, top=top),
    )
    return FakeRun(config, workdir, SimpleNamespace(train=train), queries, scores)


def fill(run):
    """Adds what all stages of a run leave, but for evaluations."""
    line = {"learning_rate": 1e-3, "steps_per_second": 9.0}
    run.metrics = [{"step": 50 * i, "loss": 1 / i} | line for i in (1, 2, 3)]
    errors = {"rms": 0.0123, "largest": 0.0456, "norm_rms": 0.01, "examples": 8}
    run.results["features/distortion"] = {"square": errors}
    run.versions = {"jax": "0.0.1"}
    for name in ("metrics.jsonl", "config.json", "features/distortion.json"):
        files.write_bytes(run.workdir / name, b"")


HANDS = np.array(["ada", "ben", "ben", "cleo", "ben"] * 4)


def describe(run, *, hands=HANDS, column="contributor"):
    """Adds contributors and captions; a picture's own contributor has the highest sums.

    Prompts are captions of ada's alone, of ben's and cleo's, and of nobody.
    """
    train = run.splits.train
    words = {"ada": "a red hat", "ben": "a shoe", "cleo": "a shoe"}
    train.captions = np.array([words.get(hand, "a glove") for hand in hands])
    train.groups = {column: hands}
    own = np.array(["ada", "cleo", "ada", "zoe", "ben"])
    for name, images in run.queries.items():
        if name == "validation":
            images.groups = {column: own}
        else:
            images.captions = np.array(["a red hat", "a shoe", "", "x", "a red hat"])
        for method in run.config.attribution.methods:
            scores = run.scores(method, name).scores
            scores[:] = scores + 5 * (hands == own[:, None])
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(page, run) of a run with all its artefacts and with real figures."""
    run = make(tmp_path_factory.mktemp("run"))
    for write in dict.fromkeys([fill, *WRITERS.values()]):
        write(run)
    return page(run), run


def draw_nothing(draw, alt, height=0):
    return Markup('<svg role="img" aria-label="{}"></svg>').format(alt)


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing is what takes time."""
    monkeypatch.setattr(figures, "inline", draw_nothing)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """(page, run) of a run with contributors and captions, without figures."""
    run = describe(make(tmp_path_factory.mktemp("described"), shown=5))
    for write in (fill, write_counterfactual):
        write(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "inline", draw_nothing)
        return page(run), run


VOID = ("meta", "link", "img")


class Outline(HTMLParser):
    """The tables of a page by their captions, its headings, tags and attributes."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.headings, self.open, self.text = {}, [], [], ""
        self.tags, self.attributes = set(), set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.text = ""
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        if re.fullmatch(r"h\d", tag):
            self.headings.append((int(tag[1]), self.text))
        if tag == "caption":
            self.tables[self.text] = self.rows
        if tag in ("td", "th"):
            self.rows[-1].append(self.text)


def words(html):
    """The text of a page with single spaces, as it is read."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))


def section(html, name):
    return re.search(f'<section id="{name}">.*?</section>', html, re.DOTALL)[0]


def lists(html):
    """The ids of every list of training images, by its class, in order."""
    found = re.findall(r'<ol class="thumbs (\w+)">(.*?)</ol>', html, re.DOTALL)
    alt = 'alt="(?:training|generated) image ([^"]*)"'
    return [(kind, re.findall(alt, items)) for kind, items in found]


def estimate(value, key="lds"):
    return {key: value, "low": value - 0.03, "high": value + 0.02}


def write_lds(run, *, unknown="newest-method"):
    """Adds an lds.json: kernels by each rule, controls, a method without a label."""
    reference = {"low": 0.541, "high": 0.559, "mean": 0.547, "std": 0.0081}
    rows = [
        {"method": method, "damping_rule": rule, "damping": damping}
        | {"transform": "linear", "reference": reference}
        | estimate(value + better)
        for method, value in (("trak", 0.411), ("dtrak", 0.611))
        for rule, damping, better in (
            ("label-free", 0.1, 0),
            ("cross-fitted", [0.1, 0.3], 0.01),
            ("oracle", 0.3, 0.05),
        )
    ]
    rows.append(rows[0] | {"transform": "squared"} | estimate(-0.123))
    none = {"damping_rule": None, "damping": None, "transform": "linear"}
    rows.append({"method": "constant", "lds": None, "low": None, "high": None} | none)
    rows.append({"method": unknown} | none | estimate(0.222))
    halves = {"method": "datamodels", "damping_rule": "halves", "damping": None}
    rows.append(halves | {"transform": "linear"} | estimate(0.333))
    difference = {"a": "dtrak", "b": "trak"} | estimate(0.2, "value")
    curve = {"damping": [1e-4, 1e-2, 1.0], "lds": [0.1, 0.4, 0.2]}
    result = {
        "rows": rows,
        "differences": [difference],
        "curves": {"dtrak": curve, "trak": curve},
    }
    run.results["lds"] = {
        "settings": {"subsets": 64, "seeds": 2, "timesteps": 25, "draws": 2}
        | {"resamples": 1000, "fraction": 0.5},
        "queries": {
            "validation": result | {"ceiling": estimate(0.82, "value")},
            "generated": result | {"ceiling": None},
        },
    }


def write_counterfactual(
    run,
    *,
    ids=("generated-0", "generated-1"),
    squared=("transform", "squared"),
    same=1.0,
):
    """Adds a counterfactual.json with its images."""
    removals = [{"method": m} for m in ("random", "dtrak", "everything", "other-seed")]
    removals.append({"method": "dtrak"} | dict([squared]))
    metrics = ("pixel_l2", "pixels_cosine")
    ends = {"median_low": 1, "median_high": 3, "mean_low": 2, "mean_high": 4}
    run.results["counterfactual"] = {
        "settings": {"count": 7, "queries": ids, "seed": 0, "steps": 10},
        "rows": [
            removal | {"query": query, "pixel_l2": 1.234, "pixels_cosine": 0.9}
            for removal in removals
            for query in ids
        ],
        "summary": [
            removal
            | {"metric": metric, "mean": 3.5}
            | {"median": same if removal["method"] == "everything" else 2.468}
            | ends
            for removal in removals
            for metric in metrics
        ],
        "removed": {"dtrak": {ids[0]: list(run.splits.train.ids[[3, 1, 2, 0, 4]])}},
        "differences": [
            {"method": "dtrak", "metric": "pixel_l2", "median": 1.357, "mean": 2} | ends
        ],
    }
    images = np.zeros((len(ids), 8, 8, 1), np.float32)
    names = ("original", "random", "dtrak", "everything", "other-seed", "dtrak-squared")
    files.write_npz(
        run.workdir / "counterfactual" / "images.npz",
        query_ids=np.array(ids),
        **dict.fromkeys(names, images),
    )


def write_ablations(run, *, study="draws"):
    """Adds an ablations.json of two studies, one of them along an axis."""
    base = {"measurement": "loss", "noise": "common", "kernel": "apart", "seed": 0}
    base |= {"projection": "sketch", "dim": 64, "checkpoint": 9, "draws": 1}
    base |= {"transform": "linear", "queries": "validation", "timesteps": [100, 300]}
    rules = (
        ("label-free", 0.1, 0),
        ("cross-fitted", [0.1, 0.3], 0.01),
        ("oracle", 1, 0.1),
    )
    arms = [{"name": study, "draws": n, "kernel": k} for n in (1, 2, 4) for k in "ab"]
    arms += [{"name": "noise", "noise": n} for n in ("common", "cyclic")]
    rows = [
        base | arm | {"damping_rule": rule, "damping": damping} | estimate(0.4 + better)
        for arm in arms
        for rule, damping, better in rules
    ]
    none = {"name": "noise", "kernel": "cosine", "damping_rule": None, "damping": None}
    rows.append(base | none | estimate(0.271))
    ceiling = {"validation": estimate(0.82, "value"), "generated": None}
    run.results["ablations"] = {"rows": rows, "ceiling": ceiling}


def plant(run, query=1, image=4):
    """Gives a query of every set one training image far above all others."""
    for scores in run.made.values():
        scores.scores[query, image] = 50
    return run.splits.train.ids[image]


WRITERS = {
    "trust": write_lds,
    "damping": write_lds,
    "counterfactual": write_counterfactual,
    "ablations": write_ablations,
}


def test_every_shown_image_and_score_is_there_in_order(whole):
    html, run = whole
    expected = []
    for name in ("generated", "validation"):
        for query in range(2):
            for method in ("dtrak", "trak"):
                scores = run.scores(method, name)
                for kind in ("supporting", "opposing"):
                    top = scores.top(3, opposing=kind == "opposing")
                    expected.append((kind, list(top.ids[query])))
                    for value in top.scores[query]:
                        assert f"score {value:.6g}" in html
                        assert f"<b>{signed(value)}</b>" in html
    assert [found for found in lists(html) if found[0] != "plain"] == expected
    for shown in ("generated-0", "validation-1", "<p>label dog</p>", "Showing 2 of 5"):
        assert shown in html
    assert 'id="query-validation-2"' not in html
    assert "scores/dtrak-validation.npz" in html and "--report.queries" in html


def test_what_the_run_left_is_told(whole):
    html, _ = whole
    for told in ("Training loss, from 1 at", "by 0.012 (at most 0.046)", "0.0.1"):
        assert told in words(html) or told in html
    # Scores, kernels, training; LDS, λ, removal, studies.
    assert html.count("<svg") == 4 + 2 + 1 + 2 + 2 + 2 + 2
    for name in ("t = 100", "t = 300", "train.learning_rate", "metrics.jsonl"):
        assert name in html


@pytest.mark.parametrize("name", ["whole", "described"])
def test_the_page_is_sound_html(name, request):
    """All that is opened is closed, no heading skips a level, every image is named."""
    html, _ = request.getfixturevalue(name)
    outline = Outline(html)
    assert not outline.open
    levels = [level for level, _ in outline.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(title.strip() for _, title in outline.headings)
    images = re.findall("<img [^>]*>", html)
    assert images and all(re.search(' alt="[^"]+"', image) for image in images)
    charts = re.findall('<svg role="img" aria-label="([^"]+)"', html)
    assert len(charts) == html.count("<svg") == len(set(charts))
    regions = re.findall('role="region" aria-label="([^"]+)"', html)
    assert len(regions) == len(set(regions)) == html.count('class="scroll"')
    assert '<html lang="en">' in html and '<meta charset="utf-8">' in html


@pytest.mark.parametrize("name", ["whole", "described"])
def test_the_answer_comes_first_then_the_evidence_then_the_details(name, request):
    """The contents name the sections in the order of the page."""
    html, _ = request.getfixturevalue(name)
    begin = '<section id="(.*?)"|<p class="part">(.*?)<'
    order = [a or b for a, b in re.findall(begin, html)]
    answer = ["answer", "generated", "validation", "groups", "frequent"]
    evidence = ["trust", "counterfactual", "health"]
    details = ["reading", "distributions", "damping", "ablations", "model", "features"]
    details += ["provenance", "configuration", "files"]
    expected = answer + ["The evidence"] + evidence + ["The details"] + details
    left_out = {"whole": {"groups"}, "described": {"trust", "damping", "ablations"}}
    assert order == [part for part in expected if part not in left_out[name]]
    contents = re.search('<nav aria-label="Contents">.*?</nav>', html, re.DOTALL)[0]
    links = re.findall('href="#(.*?)"|<b>(The .*?)</b>', contents)
    unlisted = {"model", "files", "The answer"}
    assert [a or b for a, b in links if {a, b}.isdisjoint(unlisted)] == [
        part for part in order if part not in unlisted
    ]
    assert html.index("<header") < html.index("<main") < html.index('id="answer"')


def test_every_query_has_a_place_and_a_link_to_it(whole):
    html, _ = whole
    for query in ("generated-0", "generated-1", "validation-0", "validation-1"):
        assert html.count(f'<article class="query" id="query-{query}">') == 1
        assert f'href="#query-{query}" aria-label="Link to {query}">#</a>' in html
        assert f'<a href="#query-{query}" title="{query}"><img' in html
    ids = ("a b", "a-b", HOSTILE, "ü/1.png")
    sets = {name: SimpleNamespace(ids=np.array(ids)) for name in ("one", "two 2")}
    places = [place for of_set in anchors(sets).values() for place in of_set]
    assert len(set(places)) == 8
    assert all(re.fullmatch(r"query-[\w.-]+", place) for place in places)
    assert places[0] == "query-a-b" and places[3] == "query-ü-1.png"


def test_text_can_be_read_on_white_and_on_black(whole):
    """The contrast of WCAG 2: 4.5 for text, 3 for lines; print is light."""
    css = re.search("<style>(.*?)</style>", whole[0], re.DOTALL)[1]
    assert css.count("prefers-color-scheme") == 1
    assert "@media screen and (prefers-color-scheme: dark)" in css

    def luminance(colour):
        digits = colour * 2 if len(colour) == 3 else colour
        value = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(
            value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92
        )
        return linear @ (0.2126, 0.7152, 0.0722)

    for block in re.findall(r":root {(.*?)}", css, re.DOTALL):
        colours = dict(re.findall("--([a-z]+): #([0-9a-f]+)", block))
        light = {name: luminance(colour) for name, colour in colours.items()}
        for name, least in {
            **dict.fromkeys(("text", "muted", "support", "oppose"), 4.5),
            "faint": 3,
        }.items():
            high, low = sorted((light[name], light["background"]), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, name


def with_fields(run, **fields):
    """Gives all scores errors, a tenth of each, and further fields."""
    run.made = {
        key: dataclasses.replace(s, errors=abs(s.scores) / 10, freedom=2, **fields)
        for key, s in run.made.items()
    }
    return run


BAR = re.compile(
    r'class="bar[^"]*" style="[^"]*width:([0-9.]+)%"></span>'
    r'(?:<span class="whisker" style="left:([0-9.]+)%;width:([0-9.]+)%">)?'
)


@pytest.mark.usefixtures("no_figures")
def test_scores_have_their_errors_beside_them(tmp_path):
    """As numbers, and as whiskers on the scale of the bars, which they do not leave."""
    run = make(tmp_path)
    html = page(run)
    assert html.count("No errors: one draw.") == 2 * 2 * 2
    assert "whisker" not in section(html, "generated") and "±" not in section(
        html, "validation"
    )
    found = section(page(with_fields(run)), "generated")
    assert found.count("± standard error (2 degrees of freedom).") == 2 * 2
    score = run.scores("dtrak", "generated").top(1)
    shown = f'<b>{signed(score.scores[0, 0])}</b><span class="error">± '
    assert f"{shown}{score.errors[0, 0]:#.2g}</span>" in found
    for items in re.findall('<div class="method">.*?</div>', found, re.DOTALL):
        bars = np.array(BAR.findall(items), float)
        assert len(bars) == 6
        np.testing.assert_allclose(bars[:, 1], 0.9 * bars[:, 0], atol=0.11)
        np.testing.assert_allclose(bars[:, 2], 0.2 * bars[:, 0], atol=0.11)
        assert bars[:, 1:].sum(axis=1).max() == pytest.approx(100, abs=0.11)


def test_it_is_said_what_the_errors_are_or_why_there_are_none(tmp_path):
    one, *_ = make(tmp_path).made.values()
    several = Recipe(TIMESTEPS, 2, True, "common", "sketch", 64)
    averaged = several._replace(per_timestep=False)
    pixels = dataclasses.replace(one, method="pixel-cosine")
    spread = dataclasses.replace(one, spread=np.full_like(one.scores, 0.5))
    both = dataclasses.replace(spread, errors=np.full_like(one.scores, 0.25))
    for scores, recipe, expected in (
        (one, several._replace(draws=1), "No errors: one draw"),
        (one, averaged, "No errors: features are averaged over draws"),
        (one, None, "No errors: nothing tells them"),
        (pixels, several, "No errors: this method draws no noise"),
        (spread, several, "± the standard deviation of several models' scores"),
        (
            both,
            several,
            "± standard error (0 degrees of freedom); models differ by 2",
        ),
    ):
        errors, text = uncertainty(scores, recipe)
        assert text.startswith(expected)
        assert np.isnan(errors).all() == expected.startswith("No errors")


def test_it_is_said_why_groups_have_no_errors(tmp_path):
    one, *_ = make(tmp_path).made.values()
    recipe = Recipe(TIMESTEPS, 1, True, "common", "sketch", 64)
    column = np.array(["a"] * 5 + ["b"] * 15)
    copies = one.train_ids.copy()
    copies[1] = copies[0]
    errors = {names_hash(column): np.ones((len(one.query_ids), 2))}
    known = {"errors": np.ones_like(one.scores), "group_errors": errors}
    once = known | {"method": "gradient-dot", "copies": copies}
    for fields, expected in (
        ({}, "No errors: one draw"),
        (known, "± standard error of the sum"),
        (known | {"group_errors": {}}, "No errors: they were not among the groups"),
        (once, "± standard error of the sum; some groups have none: copies of a"),
    ):
        scores = dataclasses.replace(one, **fields)
        text = group_uncertainty(scores, scores.group(column), recipe)
        assert text.startswith(expected)


@pytest.mark.usefixtures("no_figures")
def test_groups_have_the_errors_that_scores_have_of_them(tmp_path):
    run = describe(make(tmp_path, sets=("validation",)))
    columns = {"contributor": HANDS}
    errors = {names_hash(HANDS): np.full((5, 3), 0.25)}
    freedom = {"group_freedom": dict.fromkeys(errors, 1.5)}
    html = page(with_fields(run, columns=columns, group_errors=errors, **freedom))
    found = rankings(section(html, "validation"))
    assert all("± 0.25" in rest[1] for table in found for _, rest in table)
    text = section(html, "validation")
    assert text.count("· ± standard error of the sum (1.5 degrees of freedom)") == 4
    # The mean over queries has none, and of other groups these errors are not.
    assert "±" not in "".join(str(t) for t in rankings(section(html, "groups")))
    run.splits.train.groups = {"contributor": HANDS[::-1]}
    html = page(run)
    assert "± 0.25" not in html
    assert html.count("No errors: they were not among the groups that were scored") == 4
    found = ranking(
        np.array(["a", "b"]), np.array([2.0, -1]), np.full(2, 0.5), np.ones(2), 8
    )
    assert found["zero"] == 1.5 / 4
    assert [place.whisker for place in found["places"]] == [(0.75, 0.25), (0, 0.25)]


@pytest.mark.usefixtures("no_figures")
def test_near_duplicates_are_one_entry(tmp_path):
    run = make(tmp_path, shown=5)
    train = run.splits.train.ids
    hands = HANDS.copy()
    hands[6] = "cleo"
    run.splits.train.groups = {"contributor": hands}
    copies = train.copy()
    copies[[4, 6, 9]] = train[4]
    for scores in run.made.values():
        scores.scores[:, [9, 4, 6]] = 50, 40, 30
    found = section(page(with_fields(run, copies=copies)), "generated")
    assert found.count("<small>3 copies: train-004, train-006, train-009</small>") == 10
    # A picture that several gave is of them all.
    assert found.count("<span>ben, cleo</span>") == 10
    # So are labels.
    assert found.count("<span>cat, dog</span>") == 10 and "label cat, dog" in found
    frequent = section(page(run), "frequent")
    assert frequent.count("3 copies: train-004, train-006, train-009") == 2
    for kind, ids in lists(found):
        assert (ids[0] == train[4]) == (kind == "supporting") and len(ids) == 3
        assert train[6] not in ids and train[9] not in ids
    assert found.count('<b>+120</b><span class="error">± 12</span>') == 10


@pytest.mark.usefixtures("no_figures")
def test_what_is_missing_is_left_out(tmp_path):
    html = page(make(tmp_path, sets=("generated",)))
    assert "Training loss" not in html and "root mean square" not in html
    assert "Validation images" not in html and "metrics.jsonl" not in html
    assert html.count("<svg") == 2 + 2
    html = page(make(tmp_path, sets=("validation",)))
    assert "Generated images" not in html and 'id="model"' not in html


@pytest.mark.usefixtures("no_figures")
def test_frequent_supporters_are_counted_over_all_queries(tmp_path):
    run = make(tmp_path, methods=("dtrak",))
    for scores in run.made.values():
        scores.scores[:, 7] = 9
        scores.scores[:2, 4] = 8
        scores.scores[:, 5] = -9
    html = page(run)
    frequent = next(ids for kind, ids in lists(html) if kind == "plain")
    assert frequent[0] == "train-007" and "train-005" not in frequent
    assert "10 of 10 queries" in html


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_embedded(tmp_path, channels):
    run = make(tmp_path, channels=channels)
    html = page(run)
    sources = re.findall(r'<img src="data:image/png;base64,([^"]*)"', html)
    assert len(sources) == html.count("<img ") > 0
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(sources[0]))))
    expected = run.queries["generated"].images[0].squeeze() * 127.5 + 127.5
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= 0.501


@pytest.mark.usefixtures("no_figures")
def test_large_images_are_scaled_down_and_not_pixelated(tmp_path):
    html = page(make(tmp_path, n=2, size=200, shown=1, sets=("generated",)))
    article = html[html.index("<article") :]
    source = re.search(r"base64,([^\"]*)", article)[1]
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (128, 128)
    assert '<body class="">' in html


def test_text_is_escaped(tmp_path):
    """Ids, labels, captions, methods, studies and settings, in text and attributes."""
    run = make(tmp_path, hostile=True)
    fill(run)
    write_lds(run, unknown=HOSTILE)
    write_counterfactual(run, ids=(HOSTILE,))
    write_ablations(run, study=HOSTILE)
    run.versions = {HOSTILE: HOSTILE}
    run.results["features/distortion"] |= {
        HOSTILE: run.results["features/distortion"]["square"]
    }
    run.change("data", source="folder", name=f"/data/{HOSTILE}")
    for images in run.queries.values():
        images.captions = np.full(5, HOSTILE)
    run.splits.train.groups = {HOSTILE: np.full(20, HOSTILE)}
    html = page(run)
    assert html.count("&lt;script") >= 40
    outline = Outline(html)
    assert "script" not in outline.tags and "onload" not in outline.attributes
    assert not outline.open
    assert ["version of " + HOSTILE, HOSTILE] in outline.rows
    assert f"LDS, study {HOSTILE}" in outline.tables
    assert (3, HOSTILE) in outline.headings
    assert (3, f"By {HOSTILE}: generated images") in outline.headings
    for column in (f"The first {HOSTILE} is", f"First {HOSTILE} (columns) for"):
        assert any(caption.startswith(column) for caption in outline.tables)
    assert f"{HOSTILE} {HOSTILE}, like all training" in unescape(words(html))


def rankings(html):
    """The groups of every ranking: (rank, name, sum, number of images), own with a *."""
    found = []
    for items in re.findall('<ol class="ranking">(.*?)</ol>', html, re.DOTALL):
        rows = re.findall("<li(.*?)</li>", items, re.DOTALL)
        cells = [
            re.findall(r"<(?:small|b|span class=\"name\")>(.*?)</", row, re.DOTALL)
            for row in rows
        ]
        names = [
            re.sub(" <i>its own", "*", name) for _, name, *_ in filter(None, cells)
        ]
        rest = [(cell[0], *cell[2:]) for cell in cells if cell]
        found.append(list(zip(names, rest, strict=True)))
    return found


def test_groups_are_ranked_for_every_query(described):
    html, run = described
    tables = rankings(section(html, "validation"))
    assert len(tables) == 5 * 2
    names, index, sizes = np.unique(HANDS, return_inverse=True, return_counts=True)
    for i, own in enumerate(run.queries["validation"].groups["contributor"]):
        scores = run.scores("dtrak", "validation").scores[i]
        sums = np.bincount(index, scores.astype(np.float64))
        order = np.argsort(-sums)
        assert tables[2 * i] == [
            (
                names[j] + "*" * (names[j] == own),
                (str(rank), signed(sums[j]), f"{sizes[j]} images"),
            )
            for rank, j in enumerate(order, 1)
        ]
    found = words(section(html, "validation"))
    assert found.count("contributor ada ") == 2 and "contributor zoe" in found


def test_prompts_tell_whose_a_picture_is_or_nobody_does(described):
    html, _ = described
    found = section(html, "generated")
    told = re.findall("<p>contributor <b>(.*?)</b>(.*?)</p>", found)
    assert told == [("ada", ", like all training images with this prompt")] * 2
    tables = rankings(found)
    own = [[name for name, _ in table if "*" in name] for table in tables[::2]]
    assert own == [["ada*"], [], [], [], ["ada*"]]
    assert "2 of 5 pictures have such a prompt" in words(section(html, "groups"))
    assert "1 of 5 pictures are of groups without" in words(section(html, "groups"))


def test_first_groups_are_held_against_the_queries_own(described):
    html, _ = described
    tables = Outline(section(html, "groups")).tables
    expected = {
        "validation": ["D-TRAK", "4 of 4", "100%", "33%", "38%"],
        "generated": ["D-TRAK", "1 of 2", "50%", "33%", "50%"],
    }
    for name, row in expected.items():
        rows = tables[f"The first contributor is the query's own: {name} images"]
        assert len(rows) == 3 and rows[1] == row
    caption = "First contributor (columns) for the pictures of each (rows): D-TRAK, "
    head, *rows = tables[caption + "validation images"]
    assert [head[0], *head[-1:]] == ["contributor", "zoe"]
    counts = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert [counts[name][name] for name in ("ada", "ben", "cleo")] == ["2", "1", "1"]
    assert sum(int(n) for row in counts.values() for n in row.values()) == 5


def test_one_group_for_every_query_is_no_better_than_shuffled():
    own = ["a"] * 6 + ["b"] * 3 + [None, "unknown"]
    found = right(own, ["a"] * 11, ["a", "b", "c"])
    assert (found["hits"], found["queries"]) == (6, 9)
    assert found["share"] == found["shuffled"] == 6 / 9
    assert right([None, "unknown"], ["a", "a"], ["a"]) is None


def test_rare_groups_share_a_row_and_a_column():
    own = ["x"] * 5 + [f"{i:02d}" for i in range(30)]
    found = matrix(own, ["x"] * 20 + ["y"] * 15)
    assert found["columns"][-3:] == ["x", "y", None] and len(found["columns"]) == 11
    rows = dict(found["rows"])
    assert rows["x"][-3:] == [(5, 1.0, True), (0, 0.0, False), (0, 0.0, False)]
    assert sum(count for row in rows.values() for count, *_ in row) == len(own)
    assert not any(is_right for *_, is_right in rows[None])


@pytest.mark.usefixtures("no_figures")
def test_of_many_groups_the_ends_and_the_own_one_are_listed(tmp_path):
    run = make(tmp_path, methods=("dtrak",), shown=1, sets=("validation",))
    run.splits.train.groups = {"artist": np.array([f"{i:02d}" for i in range(20)])}
    run.queries["validation"].groups = {"artist": np.full(5, "07")}
    run.scores("dtrak", "validation").scores[:] = -np.arange(20)
    html = page(run)
    short, query, everything = rankings(html)
    names = [name for name, _ in short]
    assert names == ["00", "01", "02", "03", "18", "19"]
    assert [name for name, _ in query] == [
        *("00", "01", "02", "03", "04", "05", "07*", "18", "19"),
    ]
    assert "… 1 more" in html and "… 14 more" in html and "1 image<" in html
    assert len(everything) == 20
    # Of the mean over queries, each relative to its largest.
    assert everything[-1][1][1:] == ("−1.00", "1 image, first for 0 of 5")


@pytest.mark.usefixtures("no_figures")
def test_groups_without_captions_and_captions_without_groups(tmp_path):
    run = describe(make(tmp_path))
    run.splits.train.captions = run.queries["generated"].captions = None
    html = page(run)
    assert "like all training" not in html and "<q>" not in html
    groups = words(section(html, "groups"))
    assert "By contributor: generated images" in groups and "4 of 4" in groups
    run = describe(make(tmp_path))
    run.splits.train.groups = {}
    html = page(run)
    assert 'id="groups"' not in html and "<q>a red hat</q>" in html


def test_captions_are_beside_pictures(described):
    html, run = described
    train = run.splits.train
    items = re.findall("<li title.*?</li>", html, re.DOTALL)
    shown = [item for item in items if 'alt="training image train-' in item]
    assert shown
    for item in shown:
        index = int(re.search('image train-([0-9]+)"', item)[1])
        assert f"<q>{train.captions[index]}</q><span>{HANDS[index]}</span>" in item
        assert f" · contributor {HANDS[index]} · " in item
    for name, count in (("generated", 1), ("counterfactual", 1), ("model", 2)):
        pattern = "<article.*?</h3>.*?<q>a red hat</q>|<li.*?<q>a red hat</q>"
        assert len(re.findall(pattern, section(html, name), re.DOTALL)) >= count
    assert "<q></q>" not in html


@pytest.mark.usefixtures("no_figures")
def test_nothing_changes_without_groups_and_captions(tmp_path):
    """Not even a template of theirs is read, and pictures stay what they are."""
    run = make(tmp_path, size=80, channels=3, sets=("generated",))
    fill(run)
    write_counterfactual(run)
    html = page(run)
    for word in ("<q>", "ranking", "Group", "groups if", "matrix", "subgrid", "jpeg"):
        assert word not in html
    described = page(describe(run))
    assert "subgrid" in described and "data:image/jpeg" in described
    run.splits.train.captions = run.queries["generated"].captions = None
    run.splits.train.groups = {}
    fresh = make(tmp_path, size=80, channels=3, sets=("generated",))
    run.made = fresh.made
    assert page(run) == html


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("size", [8, 32, 256])
def test_pictures_have_a_size_that_one_can_see(tmp_path, size):
    run = describe(make(tmp_path, size=size, channels=3, shown=1))
    grey = np.linspace(-1, 1, size)[:, None, None] * np.ones((1, size, 3))
    for images in (run.splits.train, *run.queries.values()):
        images.images = np.tile(grey.astype(np.float32), (len(images.ids), 1, 1, 1))
    html = page(run)
    sources = re.findall(
        r'<img src="data:image/(\w+);base64,([^"]*)" alt="(\w*)[^"]*" tabindex', html
    )
    assert '<body class="pixelated">' in html or size == 256
    for kind, source, alt in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source)))
        largest = 256 if alt == "query" else 128
        assert max(picture.size) == min(size, largest)
        assert kind == ("png" if size <= 64 else "jpeg") and len(source) < 20_000


def test_only_charts_are_markup():
    """Templates cannot switch escaping off, and one module says what is HTML."""
    folder = Path(figures.__file__).parent
    templates = "".join(path.read_text() for path in folder.glob("templates/*.html"))
    assert templates and not re.search(r"\bsafe\b|autoescape", templates)
    makers = [p.name for p in folder.glob("*.py") if "Markup(" in p.read_text()]
    assert makers == ["figures.py"]


def test_nothing_is_asked_of_the_network(whole):
    html, _ = whole
    # But for links, which are followed by hand only.
    loaded = re.sub(r'<a href="https://arxiv.org/abs/[0-9.]+">', "<a>", html)
    targets = re.findall(r'(?:src|href|action|data)="([^"]*)"', loaded)
    assert targets and all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"https?://|@import|<link [^>]*stylesheet|<script", loaded)
    urls = re.findall(r"url\(([^)]*)\)", html)
    assert all(url.startswith("#") for url in urls)
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', html)[
        1
    ]
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize("name", ["whole", "described"])
def test_ids_of_elements_are_unique_and_links_lead_somewhere(name, request):
    html, _ = request.getfixturevalue(name)
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]*)"', html) + re.findall(r"url\(#([^)]*)\)", html)
    assert set(used) <= set(ids)


def test_charts_follow_the_colours_of_the_page(whole):
    html, _ = whole
    charts = "".join(re.findall("<svg.*?</svg>", html, re.DOTALL))
    for colour in ("var(--support)", "var(--oppose)", "var(--faint)", "currentColor"):
        assert colour in charts
    assert not re.search("#0000a|<style|<metadata|xmlns|#000000", charts)


def test_same_bytes_twice(whole):
    html, run = whole
    files.write_bytes(run.workdir / "report.html", html.encode())
    assert page(run) == html


@pytest.mark.usefixtures("no_figures")
def test_top_may_exceed_the_training_images(tmp_path):
    run = make(tmp_path, n=3, top=50, shown=50)
    html = page(run)
    scores = run.scores("dtrak", "generated")
    order = np.argsort(-scores.scores[0])
    positive = [scores.train_ids[i] for i in order if scores.scores[0, i] > 0]
    assert lists(html)[0] == ("supporting", positive)
    assert "Showing all 5" in html


@pytest.mark.usefixtures("no_figures")
def test_no_query_shown(tmp_path):
    html = page(make(tmp_path, shown=0))
    assert "Showing 0 of 5" in html and '<article class="query">' not in html


@pytest.mark.usefixtures("no_figures")
def test_agreement_needs_two_methods(tmp_path):
    run = make(tmp_path)
    a, b = (run.scores(method, "generated") for method in ("dtrak", "trak"))
    b.scores[:] = a.scores
    assert "Spearman +1.00 over all" in words(page(run))
    html = page(make(tmp_path, methods=("trak",)))
    assert "Spearman" not in html and "D-TRAK" not in html


@pytest.mark.usefixtures("no_figures")
def test_agreement_of_constant_scores_is_undefined(tmp_path):
    run = make(tmp_path)
    run.scores("trak", "generated").scores[1] = 0.0
    text = words(section(page(run), "generated"))
    assert text.count("Spearman undefined over all") == 1
    assert "median Spearman correlation of undefined" in text
    assert "none: no score has this sign" in text
    rho = agreement(
        run.scores("dtrak", "generated"), run.scores("trak", "generated"), 3
    )
    assert np.isnan(rho["rho"]).tolist() == [False, True, False, False, False]


@pytest.mark.usefixtures("no_figures")
def test_averaged_features_have_one_kernel(tmp_path):
    run = make(tmp_path)
    run.config = dataclasses.replace(
        run.config, features=FeaturesConfig.reference(dim=64)
    )
    for name, scores in run.made.items():
        kernel = {"eigenvalues": scores.eigenvalues[:1], "lambdas": scores.lambdas[:1]}
        run.made[name] = dataclasses.replace(scores, **kernel)
    assert "at 100 timesteps from 0 to 990, averaged" in words(page(run))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("write", dict.fromkeys(WRITERS.values()))
def test_sections_of_an_evaluation_need_their_file(tmp_path, write):
    run = make(tmp_path)
    write(run)
    html = page(run)
    for name, writer in WRITERS.items():
        assert (f'<section id="{name}">' in html) == (writer is write)
        assert (f'<a href="#{name}">' in html) == (writer is write)


@pytest.mark.usefixtures("no_figures")
def test_scores_are_not_trusted_before_they_are_measured(tmp_path):
    run = make(tmp_path)
    html = page(run)
    assert "has not been measured" in html and "dtrak-jax lds" in html
    write_lds(run)
    html = page(run)
    assert "has not been measured" not in html
    short = words(section(html, "answer"))
    expected = "D-TRAK 0.611 [0.581, 0.631]; TRAK 0.411 [0.381, 0.431]; noise ceiling"
    assert f"validation images is {expected} 0.820 [0.790, 0.840]" in short
    assert f"generated images is {expected} not known, with one seed" in short
    assert "0.661" not in short, "an oracle is no headline"


def test_lds_of_every_row_is_told_with_its_rule(whole):
    html, _ = whole
    tables = Outline(html).tables
    rows = ["|".join(row) for row in tables["LDS of every method, validation images"]]
    for row in (
        "D-TRAK|linear|label-free|0.1|0.611|[0.581, 0.631]|[0.541, 0.559]|0.547|0.008",
        "D-TRAK|linear|cross-fitted|0.1, 0.3|0.621|",
        "D-TRAK|linear|oracle|0.3|0.661|",
        "TRAK|squared|label-free|0.1|−0.123|",
        "datamodels|linear|halves|–|0.333|",
        "newest-method|linear|–|–|0.222|[0.192, 0.242]|–|",
        "constant|linear|–|–|–|–|",
    ):
        assert any(cells.startswith(row) for cells in rows), row
    differences = tables["Differences in LDS, generated images"]
    assert differences[1:] == [["D-TRAK − TRAK", "+0.200", "[0.170, 0.220]"]]
    text = words(html).lower()
    assert not re.search(r"\bnan\b", text) and "none" not in words(
        section(html, "trust")
    )
    assert "D-TRAK 0.400 at λ = 0.01" in section(html, "damping")


def test_an_oracle_is_never_taken_for_a_result(whole):
    html, _ = whole
    trust = section(html, "trust")
    for label in ("oracle: λ chosen on the same", "cross-fitted: λ chosen on other"):
        assert trust.count(label) == 2
    assert trust.count("noise ceiling</text>") == 1
    assert "label-free λ" in section(html, "damping")
    assert "oracle: λ" not in section(html, "ablations")
    rules = ("label-free", "cross-fitted", "halves", "oracle")
    styles = [STYLES[rule] for rule in rules]
    for field in ("label", "marker"):
        assert len({getattr(style, field) for style in styles}) == len(styles)


@pytest.mark.usefixtures("no_figures")
def test_no_line_for_a_damping_in_other_units(tmp_path, monkeypatch):
    run = make(tmp_path)
    write_lds(run)
    drawn = []
    monkeypatch.setattr(
        "dtrak_jax.report.trust.line_plot",
        lambda *_, vertical: drawn.append(vertical) or "chart",
    )
    page(run)
    run.change("attribution", absolute=True)
    page(run)
    assert drawn == [{0.1: "label-free λ"}] * 2 + [{}] * 2


@pytest.mark.usefixtures("no_figures")
def test_images_after_removal_with_their_distance(tmp_path):
    run = make(tmp_path, shown=1)
    write_counterfactual(run)
    html = page(run)
    short = "median distance of pixels (L2) random 2.468; D-TRAK 2.468; all data"
    assert short in words(section(html, "answer"))
    found = section(html, "counterfactual")
    alts = re.findall(r'alt="([^"]*)"', found)
    expected = ["D-TRAK", "D-TRAK squared", "random"]
    expected += ["all data, same seed", "all data, other seed"]
    assert [alt.removeprefix("generated-0") for alt in alts] == [", original"] + [
        f", {name}" for name in expected
    ]
    assert found.count("<b>1.234</b>") == 5 and "Showing 1 of 2" in words(found)
    assert found.count("<svg") == 2
    tables = Outline(found).tables
    effects = tables["Effect of removal over all queries"]
    assert ["D-TRAK squared", "cosine of pixels", "2.468", "[1.000, 3.000]"] in [
        row[:4] for row in effects
    ]
    assert words(found).count("without ") == 1
    assert "without train-003, train-001, train-002 and 2 more" in words(found)
    differences = tables[
        "The same, less the effect of random removal on the same query"
    ]
    assert differences[1][2] == "1.357"
    # Older files have the transform at the end of the method's name.
    write_counterfactual(run, squared=("method", "dtrak-squared"))
    assert page(run) == html
    (tmp_path / "counterfactual" / "images.npz").unlink()
    found = section(page(run), "counterfactual")
    assert "<img" not in found and "2.468" in found


@pytest.mark.usefixtures("no_figures")
def test_models_that_are_not_remade_are_no_headline(tmp_path):
    """Neither their LDS nor their pictures are evidence of the model that was asked."""
    run = make(tmp_path)
    write_lds(run)
    write_counterfactual(run)
    html = page(run)
    health = words(section(html, "health"))
    assert (
        "make the model again? ✓Yes: trained on everything with the same seed" in health
    )
    assert "Not of this model" not in html and 'class="alarm"' not in html
    assert "Checked by retraining" in words(section(html, "answer"))
    write_counterfactual(run, same=1.3)
    html = page(run)
    health, answer = (words(section(html, name)) for name in ("health", "answer"))
    assert (
        "✗No: trained on everything with the same seed, models move pictures by 1.3 "
        "(median pixel_l2), and without random examples by 2.47" in health
    )
    assert "better than chance" not in health and "?Not known: the LDS is of" in health
    assert "Not checked by retraining" in answer and "2.468" not in answer
    assert "0.611" not in answer
    assert "does not make this model again" in html and 'class="alarm"' in html
    for name in ("trust", "counterfactual"):
        assert "Not of this model" in words(section(html, name))


@pytest.mark.usefixtures("no_figures")
def test_every_study_has_its_rows(tmp_path):
    run = make(tmp_path)
    write_ablations(run)
    found = section(page(run), "ablations")
    assert re.findall("<h3>(.*?)</h3>", found) == ["draws", "noise"]
    assert "All 18 rows" in found and "All 7 rows" in found
    assert "All rows: queries validation; measurement loss; noise common" in found
    rows = Outline(found).tables["LDS, study noise"]
    assert ["common", "cosine", "–", "–", "0.271", "[0.241, 0.291]"] in rows
    assert found.count("<svg") == 2 and "nan" not in found.lower()


def test_the_figure_of_coverage_is_of_each_subset_itself():
    """Sums of its scores are in the table only."""
    base = {"name": "coverage", "queries": "validation", "measurement": "loss"}
    base |= {"seed": 0, "draws": 1, "damping": 0.1}
    made = [
        base | {"kernel": kernel, "transform": kind, "damping_rule": rule, "lds": lds}
        for kernel, kind, rule, lds in (
            ("apart", "linear", "label-free", 0.1),
            ("apart", "exact", "label-free", 0.2),
            ("apart", "exact", "cross-fitted", 0.3),
            ("pooled", "exact", "cross-fitted", 0.4),
        )
    ]
    rows = [row | {"low": row["lds"] - 0.05, "high": row["lds"] + 0.05} for row in made]
    (study,) = ablations({"rows": rows})
    ((_, chart),) = study["figures"]
    assert "pooled" in chart and "label-free" not in chart
    assert "cross-fitted: λ chosen on other subsets" in chart
    # Of too few subsets for that, those with coverage's own default.
    few = [row for row in rows if row["damping_rule"] == "label-free"]
    own = few[1] | {"damping_rule": "effective"}
    few += [own | {"kernel": kernel} for kernel in ("averaged", "pooled")]
    ((_, chart),) = ablations({"rows": few})[0]["figures"]
    assert "averaged" in chart and "apart" not in chart


def test_charts_take_any_name(tmp_path):
    run = make(tmp_path, shown=0)
    write_lds(run, unknown="a$b$ <i>")
    chart = section(page(run), "trust")
    assert "a$b$ &lt;i&gt;</text>" in chart


@pytest.mark.usefixtures("no_figures")
def test_methods_without_a_kernel(tmp_path):
    run = make(tmp_path)
    for name in run.queries:
        kernel = {"damping": None, "lambdas": None, "eigenvalues": None}
        for method in ("gradient-dot", "pixel-cosine"):
            run.made[name, method] = dataclasses.replace(
                run.scores("trak", name), method=method, **kernel
            )
    methods = ("dtrak", "gradient-dot", "pixel-cosine")

    def with_methods(methods):
        run.change("attribution", methods=methods)
        run.change("report", methods=methods)
        return page(run)

    html = with_methods(methods)
    assert "as estimated by D-TRAK, gradient dot and pixel cosine" in words(html)
    assert "<h4>TRAK</h4>" not in html and "scores/trak-" not in html
    assert html.count("Eigenvalues of the kernels") == 1
    text = words(section(html, "features"))
    assert "squared output (D-TRAK) and the loss (gradient dot), at" in text
    assert "Eigenvalues" not in with_methods(("gradient-dot",))
    assert 'id="features"' not in with_methods(("pixel-cosine",))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "path",
    # Those of a stage: others have no part in a report.
    sorted(
        path
        for name in ("lds", "ablations", "counterfactual")
        for path in RESULTS.glob(f"*_{name}.json")
    ),
    ids=lambda p: p.stem,
)
def test_committed_results_render(tmp_path, path):
    """Their tables hold every value of the file."""
    run = make(tmp_path, shown=0)
    data, kind = json.loads(path.read_text()), path.stem.split("_")[-1]
    run.results[kind] = data
    tables = Outline(page(run)).tables
    values = {
        "lds": lambda row: [row["lds"]],
        "counterfactual": lambda row: [row["median"], row["mean"]],
        "ablations": lambda row: [row["lds"]],
    }[kind]
    if kind == "lds":
        expected = {
            f"LDS of every method, {name} images": result["rows"]
            for name, result in data["queries"].items()
        }
    elif kind == "counterfactual":
        expected = {
            "Effect of removal over all queries": data["summary"],
            "The same, less the effect of random removal on the same query": data[
                "differences"
            ],
        }
    else:
        expected = {}
        for row in data["rows"]:
            expected.setdefault(f"LDS, study {row['name']}", []).append(row)
    for caption, rows in expected.items():
        cells = [set(row) for row in tables[caption][1:]]
        assert len(cells) == len(rows)
        for row in rows:
            shown = {f"{value:z.3f}".replace("-", "−") for value in values(row)}
            assert any(shown <= found for found in cells)


def verdicts(html, name):
    """What is said of every query and method of a set, but for the errors."""
    found = re.findall('<p class="verdict">(.*?)<span', section(html, name), re.DOTALL)
    return [words(text).strip() for text in found]


@pytest.mark.usefixtures("no_figures")
def test_what_stands_out_is_told_and_all_else_is_pale(tmp_path):
    run = make(tmp_path, shown=5)
    planted = plant(run)
    html = page(run)
    for name in ("generated", "validation"):
        told = verdicts(html, name)
        assert told[2:4] == [f"{planted} stands out."] * 2
        assert told[:2] + told[4:] == ["No training image stands out."] * 8
        items = re.findall("<li title.*?</li>", section(html, name), re.DOTALL)
        bright = [item for item in items if 'class="below"' not in item]
        assert len(bright) == 2 and all(f'image {planted}"' in item for item in bright)
        assert ["<i>stands out</i>" in item for item in items] == [
            item in bright for item in items
        ]
    assert "for 1 of 5 generated images" in words(section(html, "health"))
    assert html.count(', for which an image stands out"') == 2
    rows = Outline(html).tables["Queries for which something stands out"]
    assert ["generated", "TRAK", "1 of 5"] in rows and len(rows) == 1 + 4
    assert words(section(html, "generated")).count("Most alike in pixels: train-") == 5


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("told_by", ["training", "features"])
def test_a_model_of_static_gets_no_confident_page(tmp_path, told_by, monkeypatch):
    """It has learnt nothing, whatever its scores look like."""
    monkeypatch.setattr("dtrak_jax.report.learning.LEAST_TIMESTEPS", len(TIMESTEPS))
    run = describe(make(tmp_path, shown=5))
    planted = plant(run)
    fill(run)
    timesteps = None if told_by == "training" else TIMESTEPS
    value = baseline(run.schedule, run.splits.train.images, timesteps)
    lines = run.metrics

    def lose(loss):
        lines[-1]["loss"], run.losses = loss, np.full((2, 20), loss)
        run.metrics = lines if told_by == "training" else []

    lose(0.5 * value)
    assert f"{planted} stands out" in words(page(run))
    lose(0.95 * value)
    html = page(run)
    head = words(re.search('<header class="head">.*?</header>', html, re.DOTALL)[0])
    assert "has learnt next to nothing" in head and "untrained" in html
    for name in ("generated", "validation"):
        assert set(verdicts(html, name)) == {
            "Not judged: the model has learnt next to nothing."
        }
        items = re.findall("<li title.*?</li>", section(html, name), re.DOTALL)
        assert items and all('class="below"' in item for item in items)
    assert "stands out for" not in words(section(html, "groups"))
    assert "which an image stands out" not in html
    _, *rows = Outline(html).tables["Queries for which something stands out"]
    assert all(row[2:] == ["not judged"] * 2 for row in rows)
    if told_by == "features":
        # A few timesteps may be those at which nobody can learn anything.
        monkeypatch.setattr("dtrak_jax.report.learning.LEAST_TIMESTEPS", 3)
        assert "learnt next to nothing" not in page(run)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_baseline_is_the_loss_of_knowing_mean_and_spread_only(prediction):
    """Of white noise, no model is better; of one image, nobody is worse than perfect."""
    rng = np.random.default_rng(0)
    schedule, t = linear_schedule(prediction=prediction), np.full(20_000, 300)
    x, eps = 0.3 + 0.5 * rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 1))
    x_t = schedule.add_noise(x, eps, t)
    design = np.concatenate([np.asarray(x_t), np.ones_like(x_t)], axis=1)
    target = np.asarray(schedule.target(x, eps, t))
    residual = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
    value = baseline(schedule, x[:1000], [300])
    assert value == pytest.approx(np.mean(residual**2), rel=0.1)
    assert baseline(schedule, np.ones((9, 4))) == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("no_figures")
def test_health_is_told_in_words(tmp_path):
    run = make(tmp_path)
    for scores in run.made.values():
        scores.scores[:, 7] = 9
    run.queries["generated"].images[1] = run.splits.train.images[5]
    write_lds(run)
    html = page(run)
    health = words(section(html, "health"))
    for text in (
        "Nothing here tells: its loss is not known at enough timesteps.",
        "D-TRAK: train-007 is first for 10 of 10 queries. Either the queries are much",
        "1 of 5 generated images are, pixel for pixel, such as generated-1",
        "D-TRAK, validation images: the LDS is 0.611 [0.581, 0.631], better than chance",
    ):
        assert text in health
    same = "The same picture, pixel for pixel, as training image train-005"
    assert words(html).count(same) == 1
    assert same in words(
        html[html.index('id="query-generated-1"') :].split("</a", 1)[1]
    )
    assert 'class="alarm"' not in html
    for result in run.results["lds"]["queries"].values():
        for row in result["rows"]:
            row |= {"lds": 0.01, "low": -0.05, "high": 0.07}
    html = page(run)
    assert "no different from chance" in words(section(html, "health"))
    assert "do not predict what retraining does" in html and 'class="alarm"' in html


@pytest.mark.usefixtures("no_figures")
def test_too_few_queries_are_said_in_words(tmp_path):
    html = page(make(tmp_path, sets=("validation",)))
    told = "Not judged: that takes 8 queries and 12 training images."
    assert set(verdicts(html, "validation")) == {told}


@pytest.mark.usefixtures("no_figures")
def test_provenance_and_whole_file_names(tmp_path):
    run = make(tmp_path)
    run.losses = np.full((2, 20), 0.1)
    begun = {"begun": "2026-01-02 03:04 UTC", "command": "dtrak-jax run x.py"}
    run.results["config"] = {"begun": begun}
    found = section(page(run), "provenance")
    for text in (*begun.values(), "par4ms", "n3t", "d4ta"):
        assert f"<code>{text}</code>" in found
    for paper in ("2311.00500", "2303.14186"):
        assert f'href="https://arxiv.org/abs/{paper}"' in found
    html = page(run)
    assert "…" not in re.sub("<style>.*?</style>", "", html, flags=re.DOTALL)
    images = re.findall("<img [^>]*>", section(html, "generated"))
    assert sum("tabindex" in image for image in images) == len(images) - 2


def check_other_removals(write, removed, ids, pictures):
    """What was removed from other queries or images than those of a page is refused."""
    record, made_again = removed.record(), removed.images
    shown, query = {"counterfactual": record, "removed": made_again}, ids[0]
    for change, message in (
        ({"counterfactual": None}, "removed needs counterfactual="),
        (
            {"counterfactual": record | {"settings": {"queries": ["x"]}}},
            "queries, such as 'x'",
        ),
        (
            {"counterfactual": record | {"removed": {"a": {query: ["?"]}}}},
            "images, such as '?'",
        ),
        (
            {"removed": {n: a for n, a in made_again.items() if n != "query_ids"}},
            "in 'query_ids'",
        ),
        ({"removed": made_again | {"x": pictures}}, "removed differs .* in 'x'"),
        (
            {"removed": made_again | {"query_ids": ids[:2][::-1]}},
            "its query_ids must be",
        ),
        ({"removed": made_again | {"dtrak": pictures}}, r"removed\['dtrak'\] has 12"),
        (
            {"removed": made_again | {"original": pictures[:2] / 2}},
            "are other pictures",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            write(**shown | change)
    with pytest.raises(TypeError, match="removed is an array"):
        write(removed=pictures)


@pytest.mark.usefixtures("no_figures")
def test_a_report_of_arrays_is_the_page_that_a_run_gets(tmp_path):
    run = make(tmp_path / "run", shown=5, sets=("generated",))
    rng = np.random.default_rng(1)
    more = rng.normal(size=(12, 20)).astype(np.float32)
    more[1, 4] = 50
    ids = np.array([f"generated-{i}" for i in range(12)])
    scores = [
        dataclasses.replace(
            run.scores(m, "generated"),
            scores=more,
            query_ids=ids,
            errors=abs(more) / 9,
            freedom=4,
            columns={"licence": HANDS, "label": HANDS},
        )
        for m in ("dtrak", "trak")
    ]
    train, pictures = run.splits.train, rng.uniform(-1, 1, (12, 8, 8, 1))
    path = dtrak.write_report(
        tmp_path / "page.html", scores, train.images, pictures, shown=5,
        groups={"artist": HANDS}, metrics=[{"step": 9, "loss": 0.1, "learning_rate": 0}],
    )  # fmt: skip
    html = path.read_text()
    assert verdicts(html, "query")[2:4] == [f"{train.ids[4]} stands out."] * 2
    assert "by artist" in html and "dtrak-jax" not in html and "npz" not in html
    assert "by licence" in html and "by label" not in html
    assert "± standard error (4 degrees of freedom)." in html
    assert not Outline(html).open
    made = {"timesteps": TIMESTEPS, "draws": 1, "per_timestep": True, "dim": 64}
    made |= {"noise": "common", "projection": "sketch"}
    made |= {"network": "n3t", "params": "par4ms"}
    masks = np.random.default_rng(2).permuted(np.tile([True, False], (9, 10)), axis=1)
    losses = -(masks.astype(np.float64) @ more.T)
    truth = dtrak.RetrainedLosses(losses, masks, ids, train.ids)
    dtrak.write_report(path, scores, train.images, pictures, truth=truth)
    html = path.read_text()
    assert "9 random subsets, each with\n50% of" in html and "noise draws" not in html
    assert "D-TRAK, query images: the LDS is 1" in html
    removed = dtrak.counterfactual(
        *(scores[0], lambda rows, seed: seed / 10),
        *(lambda model, rows: pictures[rows] * (0.5 + model), pictures),
        count=3, queries=2, embeddings={"hue": lambda x: x.reshape(len(x), -1)},
    )  # fmt: skip
    shown = {"counterfactual": removed.record(), "removed": removed.images}
    dtrak.write_report(path, scores, train.images, pictures, **shown)
    assert "cosine of hue" in path.read_text().lower()
    (query, _), gone = removed.settings["queries"], removed.removed["dtrak"]
    assert f"without {', '.join(gone[query])}" in words(path.read_text())
    write = partial(dtrak.write_report, path, scores, train.images, pictures)
    check_other_removals(write, removed, ids, pictures)
    for wrong, message in (
        (tmp_path, f"path is '{tmp_path}', a folder"),
        (path / "page.html", f"the folder of path is '{path}', which is a file"),
    ):
        with pytest.raises(OSError, match=message):
            dtrak.write_report(wrong, scores, train.images, pictures)
    with pytest.raises(ValueError, match="truth is of the sets .*'x'"):
        dtrak.write_report(path, scores, train.images, pictures, truth={"x": truth})
    ids, losses = run.splits.train.ids, np.ones((2, 20))
    made = made | {"timesteps": list(range(100, 900, 100))}
    features = dtrak.Features("square", tuple(ids), None, None, losses, made)
    given = {"features": features, "schedule": linear_schedule()}
    path = dtrak.write_report(path, scores, train.images, pictures, **given)
    html = path.read_text()
    assert "has learnt next to nothing" in html
    assert set(verdicts(html, "query")) == {
        "Not judged: the model has learnt next to nothing."
    }
    assert "par4ms" in html and "They are projected (sketch) to 64" in words(html)
    bad = {
        "pictures and the scores": {"images": train.images[:3]},
        "of the sets": {"scores": {"a": scores}},
        "are empty": {"scores": {"query": []}},
        "a name for each of 20": {"groups": {"artist": HANDS[:3]}},
        "or in another order": {
            "images": Dataset.of(train.images, train.ids[::-1]),
        },
        "shown is -1": {"shown": -1},
        "with another one": given
        | {
            "features": dataclasses.replace(
                features, fingerprint=made | {"schedule": "x"}
            )
        },
    }
    good = {"scores": scores, "images": train.images, "queries": pictures}
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            dtrak.write_report(tmp_path / "no.html", **(good | change))
    assert not (tmp_path / "no.html").exists()


MEASURE = """<!doctype html><title></title>
<iframe src="report.html" style="width:400px;height:800px;border:0"></iframe>
<script>addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const images = [...page.images];
  const first = page.querySelector(".picture img");
  const before = first.getBoundingClientRect().width;
  first.focus();
  document.title = JSON.stringify({
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    broken: images.filter(image => !image.naturalWidth).length,
    images: images.length,
    cut: [...page.querySelectorAll("#answer .scroll")].filter(
      table => table.scrollWidth > table.clientWidth).length,
    larger: first.getBoundingClientRect().width / before,
  });
})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("name", ["whole", "described"])
def test_browser_lays_it_out_on_a_narrow_screen(name, request, tmp_path):
    html, _ = request.getfixturevalue(name)
    assert f'image {LONG}"' in html, "an id that does not fit must be among the shown"
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE, encoding="utf-8")

    def browse(*flags, name):
        command = (
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-quic", "--disable-background-networking",
            "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files",
            *flags, (tmp_path / name).as_uri(),
        )  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        return done.stdout.decode()

    dom = browse("--dump-dom", name="measure.html")
    layout = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert layout["width"] <= 400 and not layout["cut"]
    assert layout["height"] > 2000
    assert layout["images"] == html.count("<img ") and not layout["broken"]
    assert layout["larger"] > 2, "a picture with the focus is enlarged"

    shot = tmp_path / "shot.png"
    browse("--window-size=1280,900", f"--screenshot={shot}", name="report.html")
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (900, 1280)
    assert len(np.unique(pixels)) > 50
