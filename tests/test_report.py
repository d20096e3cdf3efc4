"""The report: one page that holds everything it shows and asks for nothing else."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
from html import escape

import numpy as np
import pytest
from PIL import Image

from dtrak_jax import files
from dtrak_jax.attribution import Scores
from dtrak_jax.config import (
    AttributionConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    ReportConfig,
    SampleConfig,
)
from dtrak_jax.data import Dataset
from dtrak_jax.report import figures, page
from dtrak_jax.report.queries import signed, spearman
from dtrak_jax.report.trust import LOOKS

TIMESTEPS = (100, 300)
HOSTILE = "<script>alert('&')</script>"
LONG = "x" * 60
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)


def make(
    workdir, *, n=20, channels=1, size=8, methods=("dtrak", "trak"), top=3, shown=2,
    sets=("validation", "generated"), hostile=False,
):  # fmt: skip
    """Arguments of `page` for a run with 5 queries in each set."""
    rng = np.random.default_rng(0)

    def images(count):
        return rng.uniform(-1, 1, (count, size, size, channels)).astype(np.float32)

    ids = [*(f"train-{i:03d}" for i in range(n - 1)), LONG]
    if hostile:
        ids[0] = HOSTILE
    train = Dataset(
        images=images(n),
        ids=np.array(ids),
        labels=np.arange(n) % 2,
        label_names=("cat", HOSTILE if hostile else "dog"),
        captions=None,
    )
    queries = {s: (images(5), np.array([f"{s}-{i}" for i in range(5)])) for s in sets}
    kernels = len(TIMESTEPS)
    scores = {
        (name, method): Scores(
            scores=rng.normal(size=(5, n)).astype(np.float32),
            train_ids=train.ids,
            query_ids=queries[name][1],
            method=method,
            damping=(0.1, False),
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
    return (config, workdir, train), {"queries": queries, "scores": scores}


def fill(workdir):
    """The files of a run that the page reads."""
    line = {"learning_rate": 1e-3, "steps_per_second": 9.0}
    lines = [json.dumps({"step": 50 * i, "loss": 1 / i} | line) for i in (1, 2, 3)]
    files.write_bytes(workdir / "metrics.jsonl", "\n".join(lines).encode())
    errors = {"rms": 0.0123, "largest": 0.0456, "norm_rms": 0.01, "examples": 8}
    files.write_json(workdir / "features" / "distortion.json", {"square": errors})
    files.write_json(
        workdir / "config.json", {"config": {}, "versions": {"jax": "0.0.1"}}
    )
    files.write_npz(
        workdir / "splits.npz",
        validation_ids=np.array([f"validation-{i}" for i in range(5)]),
        validation_labels=np.array([1, 0, 0, 0, 0]),
        label_names=np.array(["cat", "dog"]),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(page, scores) of a run with all its files and with real figures."""
    workdir = tmp_path_factory.mktemp("run")
    fill(workdir)
    arguments, options = make(workdir)
    return page(*arguments, **options), options["scores"]


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing is what takes time."""
    monkeypatch.setattr(
        figures, "inline", lambda draw, alt, height=0: f"<svg>{escape(alt)}</svg>"
    )


def lists(html):
    """The alt texts of every list of training images, by its class, in order."""
    found = re.findall(r'<ol class="thumbs (\w+)">(.*?)</ol>', html, re.DOTALL)
    return [(kind, re.findall(r'alt="([^"]*)"', items)) for kind, items in found]


def test_every_shown_image_and_score_is_there_in_order(whole):
    html, scores = whole
    expected = []
    for name in ("generated", "validation"):
        for query in range(2):
            for method in ("dtrak", "trak"):
                one = scores[name, method]
                for kind in ("supporting", "opposing"):
                    top = one.top(3, opposing=kind == "opposing")
                    expected.append((kind, list(top.ids[query])))
                    for value in top.scores[query]:
                        assert f"score {value:.6g}" in html
                        assert f"<b>{signed(value)}</b>" in html
    assert [found for found in lists(html) if found[0] != "plain"] == expected
    for shown in ("generated-0", "validation-1", "<p>label dog</p>", "Showing 2 of 5"):
        assert shown in html
    assert "<h3>validation-2</h3>" not in html
    assert "scores/dtrak-validation.npz" in html and "--report.queries" in html


def test_what_the_run_left_is_told(whole):
    html, _ = whole
    for told in ("Training loss, from 1 at", "by 0.012 (at most 0.046)", "0.0.1"):
        assert told in html
    assert html.count("<svg") == 4 + 2 + 1
    for name in ("t = 100", "t = 300", "train.learning_rate", "metrics.jsonl"):
        assert name in html


@pytest.mark.usefixtures("no_figures")
def test_what_is_missing_is_left_out(tmp_path):
    arguments, options = make(tmp_path, sets=("generated",))
    html = page(*arguments, **options)
    assert "Training loss" not in html and "root mean square" not in html
    assert "Validation images" not in html and "metrics.jsonl" not in html
    assert html.count("<svg") == 2 + 2


@pytest.mark.usefixtures("no_figures")
def test_frequent_supporters_are_counted_over_all_queries(tmp_path):
    arguments, options = make(tmp_path, methods=("dtrak",))
    for one in options["scores"].values():
        one.scores[:, 7] = 9
        one.scores[:2, 4] = 8
        one.scores[:, 5] = -9
    html = page(*arguments, **options)
    frequent = next(ids for kind, ids in lists(html) if kind == "plain")
    assert frequent[0] == "train-007" and "train-005" not in frequent
    assert "10 of 10 queries" in html


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_embedded(tmp_path, channels):
    arguments, options = make(tmp_path, channels=channels)
    html = page(*arguments, **options)
    sources = re.findall(r'<img src="data:image/png;base64,([^"]*)"', html)
    assert len(sources) == html.count("<img ") > 0
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(sources[0]))))
    expected = options["queries"]["generated"][0][0].squeeze() * 127.5 + 127.5
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= 0.501


@pytest.mark.usefixtures("no_figures")
def test_large_images_are_scaled_down_and_not_pixelated(tmp_path):
    arguments, options = make(tmp_path, n=2, size=200, shown=1, sets=("generated",))
    html = page(*arguments, **options)
    source = re.search(r"base64,([^\"]*)", html)[1]
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (128, 128)
    assert '<body class="pixelated">' not in html


@pytest.mark.usefixtures("no_figures")
def test_text_is_escaped(tmp_path):
    arguments, options = make(tmp_path, hostile=True)
    html = page(*arguments, **options)
    assert "<script" not in html.lower()
    assert escape(HOSTILE) in html


def test_nothing_is_asked_of_the_network(whole):
    html, _ = whole
    targets = re.findall(r'(?:src|href|action|data)="([^"]*)"', html)
    assert targets and all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"https?://|@import|<link [^>]*stylesheet", html)
    urls = re.findall(r"url\(([^)]*)\)", html)
    assert all(url.startswith("#") for url in urls)


def test_ids_of_elements_are_unique_and_links_lead_somewhere(whole):
    html, _ = whole
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]*)"', html) + re.findall(r"url\(#([^)]*)\)", html)
    assert set(used) <= set(ids)


def test_same_bytes_twice(tmp_path):
    fill(tmp_path)
    arguments, options = make(tmp_path)
    first = page(*arguments, **options)
    files.write_bytes(tmp_path / "report.html", first.encode())
    assert page(*arguments, **options) == first


@pytest.mark.usefixtures("no_figures")
def test_top_may_exceed_the_training_images(tmp_path):
    arguments, options = make(tmp_path, n=3, top=50, shown=50)
    html = page(*arguments, **options)
    one = options["scores"]["generated", "dtrak"]
    order = np.argsort(-one.scores[0])
    positive = [one.train_ids[i] for i in order if one.scores[0, i] > 0]
    assert lists(html)[0] == ("supporting", positive)
    assert "Showing all 5" in html


@pytest.mark.usefixtures("no_figures")
def test_no_query_shown(tmp_path):
    arguments, options = make(tmp_path, shown=0)
    html = page(*arguments, **options)
    assert "Showing 0 of 5" in html and '<article class="query">' not in html


@pytest.mark.usefixtures("no_figures")
def test_agreement_needs_two_methods(tmp_path):
    arguments, options = make(tmp_path)
    a, b = (options["scores"]["generated", m] for m in ("dtrak", "trak"))
    b.scores[:] = a.scores
    assert "Spearman +1.00 over all" in page(*arguments, **options)
    arguments, options = make(tmp_path, methods=("trak",))
    html = page(*arguments, **options)
    assert "Spearman" not in html and "D-TRAK" not in html


@pytest.mark.usefixtures("no_figures")
def test_averaged_features_have_one_kernel(tmp_path):
    (config, *rest), options = make(tmp_path)
    features = FeaturesConfig.reference(dim=64)
    config = Config(
        data=config.data, sample=config.sample, features=features, report=config.report
    )
    for one in options["scores"].values():
        object.__setattr__(one, "eigenvalues", one.eigenvalues[:1])
        object.__setattr__(one, "lambdas", one.lambdas[:1])
    html = page(config, *rest, **options)
    assert "at 100 timesteps from 0 to 990, averaged" in html


@pytest.mark.usefixtures("no_figures")
def test_scores_of_other_images_are_refused(tmp_path):
    (config, workdir, _), options = make(tmp_path)
    other = make(tmp_path, hostile=True)[0][2]
    with pytest.raises(ValueError, match="attribute` again"):
        page(config, workdir, other, **options)


def test_spearman():
    a = np.array([1.0, 2.0, 2.0, 5.0])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(np.array([1, 2, 3]), np.array([1, 3, 2])) == pytest.approx(0.5)
    assert np.isnan(spearman(a, np.zeros(4)))


def estimate(value, key="lds"):
    return {key: value, "low": value - 0.03, "high": value + 0.02}


def write_lds(workdir, *, unknown="newest-method"):
    """An lds.json: two kernels by each rule, controls, and a method without a name."""
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
    one = {
        "rows": rows,
        "differences": [difference],
        "curves": {"dtrak": curve, "trak": curve},
    }
    files.write_json(
        workdir / "lds.json",
        {
            "settings": {"subsets": 64, "seeds": 2, "timesteps": 25, "draws": 2}
            | {"resamples": 1000, "fraction": 0.5},
            "queries": {
                "validation": one | {"ceiling": estimate(0.82, "value")},
                "generated": one | {"ceiling": None},
            },
        },
    )


def write_counterfactual(workdir, *, ids=("generated-0", "generated-1")):
    methods = ("random", "dtrak", "everything", "other-seed")
    metrics = ("pixel_l2", "pixels_cosine")
    ends = {"median_low": 1, "median_high": 3, "mean_low": 2, "mean_high": 4}
    files.write_json(
        workdir / "counterfactual.json",
        {
            "settings": {"count": 7, "queries": ids, "seed": 0, "steps": 10},
            "rows": [
                {"method": m, "query": q, "pixel_l2": 1.234, "pixels_cosine": 0.9}
                for m in methods
                for q in ids
            ],
            "summary": [
                {"method": m, "metric": k, "median": 2.468, "mean": 3.5} | ends
                for m in methods
                for k in metrics
            ],
            "differences": [
                {"method": "dtrak", "metric": "pixel_l2", "median": 1.357, "mean": 2}
                | ends
            ],
        },
    )
    images = np.zeros((len(ids), 8, 8, 1), np.float32)
    files.write_npz(
        workdir / "counterfactual" / "images.npz",
        query_ids=np.array(ids),
        **dict.fromkeys(("original", *methods), images),
    )


def write_ablations(workdir, *, study="draws"):
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
    files.write_json(workdir / "ablations.json", {"rows": rows, "ceiling": ceiling})


WRITERS = {
    "trust": write_lds,
    "damping": write_lds,
    "counterfactual": write_counterfactual,
    "ablations": write_ablations,
}


def section(html, name):
    return re.search(f'<section id="{name}">.*?</section>', html, re.DOTALL)[0]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("write", dict.fromkeys(WRITERS.values()))
def test_sections_of_an_evaluation_need_their_file(tmp_path, write):
    arguments, options = make(tmp_path)
    write(tmp_path)
    html = page(*arguments, **options)
    for name, writer in WRITERS.items():
        assert (f'<section id="{name}">' in html) == (writer is write)
        assert (f'<a href="#{name}">' in html) == (writer is write)


@pytest.mark.usefixtures("no_figures")
def test_scores_are_not_trusted_before_they_are_measured(tmp_path):
    arguments, options = make(tmp_path)
    html = page(*arguments, **options)
    assert "has not been measured" in html and "dtrak-jax lds" in html
    write_lds(tmp_path)
    html = page(*arguments, **options)
    assert "has not been measured" not in html
    reading = section(html, "reading")
    expected = "D-TRAK 0.611 [0.581, 0.631]; TRAK 0.411 [0.381, 0.431]; noise ceiling"
    assert f"validation images: {expected} 0.820 [0.790, 0.840]" in reading
    assert f"generated images: {expected} not known, with one seed" in reading
    assert "0.661" not in reading, "an oracle is no headline"


@pytest.mark.usefixtures("no_figures")
def test_lds_of_every_row_is_told_with_its_rule(tmp_path):
    arguments, options = make(tmp_path)
    write_lds(tmp_path)
    html = page(*arguments, **options)
    text = re.sub(r"<t[dh][^>]*>|</t[dh]>", "|", section(html, "trust"))
    for row in (
        "|D-TRAK||linear||label-free||0.1||0.611||[0.581, 0.631]||[0.541, 0.559]|",
        "|D-TRAK||linear||cross-fitted||0.1, 0.3||0.621|",
        "|D-TRAK||linear||oracle||0.3||0.661|",
        "|TRAK||squared||label-free||0.1||−0.123|",
        "|datamodels||linear||halves||–||0.333|",
        "|newest-method||linear||–||–||0.222||[0.192, 0.242]||–|",
        "|constant||linear||–||–||–||–|",
        "|D-TRAK − TRAK||+0.200||[0.170, 0.220]|",
    ):
        assert row in text
    assert "nan" not in html.lower() and "None" not in section(html, "trust")
    assert "D-TRAK 0.400 at λ = 0.01" in section(html, "damping")


def test_an_oracle_is_never_taken_for_a_result(tmp_path):
    arguments, options = make(tmp_path, shown=0)
    write_lds(tmp_path)
    write_ablations(tmp_path)
    html = page(*arguments, **options)
    trust = section(html, "trust")
    for label in ("oracle: λ chosen on the same", "cross-fitted: λ chosen on other"):
        assert trust.count(label) == 2
    assert trust.count("noise ceiling</text>") == 1
    assert "label-free λ" in section(html, "damping")
    assert "oracle: λ" not in section(html, "ablations")
    looks = [LOOKS[rule] for rule in ("label-free", "cross-fitted", "halves", "oracle")]
    for field in ("label", "marker"):
        assert len({getattr(one, field) for one in looks}) == len(looks)
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]*)"', html) + re.findall(r"url\(#([^)]*)\)", html)
    assert set(used) <= set(ids)


@pytest.mark.usefixtures("no_figures")
def test_no_line_for_a_damping_in_other_units(tmp_path, monkeypatch):
    (config, *rest), options = make(tmp_path)
    write_lds(tmp_path)
    drawn = []
    monkeypatch.setattr(
        "dtrak_jax.report.trust.lines",
        lambda *_, vertical: drawn.append(vertical) or "",
    )
    page(config, *rest, **options)
    absolute = dataclasses.replace(config.attribution, absolute=True)
    page(dataclasses.replace(config, attribution=absolute), *rest, **options)
    assert drawn == [{0.1: "label-free λ"}] * 2 + [{}] * 2


@pytest.mark.usefixtures("no_figures")
def test_images_after_removal_with_their_distance(tmp_path):
    arguments, options = make(tmp_path, shown=1)
    write_counterfactual(tmp_path)
    found = section(page(*arguments, **options), "counterfactual")
    alts = re.findall(r'alt="([^"]*)"', found)
    expected = ["D-TRAK", "random", "all data, same seed", "all data, other seed"]
    assert [alt.removeprefix("generated-0") for alt in alts] == [", original"] + [
        f", {name}" for name in expected
    ]
    assert found.count("<b>1.234</b>") == 4 and "Showing 1 of 2" in found
    assert found.count("<svg>") == 2 and "<td>2.468</td><td>[1.000, 3.000]" in found
    assert "less the effect of random removal" in found and "<td>1.357</td>" in found
    (tmp_path / "counterfactual" / "images.npz").unlink()
    found = section(page(*arguments, **options), "counterfactual")
    assert "<img" not in found and "2.468" in found


@pytest.mark.usefixtures("no_figures")
def test_every_study_has_its_rows(tmp_path):
    arguments, options = make(tmp_path)
    write_ablations(tmp_path)
    found = section(page(*arguments, **options), "ablations")
    assert re.findall("<h3>(.*?)</h3>", found) == ["draws", "noise"]
    assert "All 18 rows" in found and "All 7 rows" in found
    assert "All rows: queries validation; measurement loss; noise common" in found
    assert ">cosine</td><td>–</td><td>–</td><td>0.271<" in found
    assert found.count("<svg>") == 2 and "nan" not in found.lower()


@pytest.mark.usefixtures("no_figures")
def test_text_of_an_evaluation_is_escaped(tmp_path):
    arguments, options = make(tmp_path)
    write_lds(tmp_path, unknown=HOSTILE)
    write_counterfactual(tmp_path, ids=(HOSTILE,))
    write_ablations(tmp_path, study=HOSTILE)
    html = page(*arguments, **options)
    assert "<script" not in html.lower() and html.count(escape(HOSTILE)) >= 5


def test_charts_take_any_name(tmp_path):
    arguments, options = make(tmp_path, shown=0)
    write_lds(tmp_path, unknown="a$b$ <i>")
    chart = section(page(*arguments, **options), "trust")
    assert "a$b$ &lt;i&gt;</text>" in chart


@pytest.mark.usefixtures("no_figures")
def test_methods_without_a_kernel(tmp_path):
    (config, *rest), options = make(tmp_path)
    scores = options["scores"]
    for name in options["queries"]:
        kernel = {"damping": None, "lambdas": None, "eigenvalues": None}
        changes = kernel | {"method": "gradient-dot"}
        scores[name, "gradient-dot"] = dataclasses.replace(
            scores[name, "trak"], **changes
        )
        scores[name, "pixel-cosine"] = scores[name, "gradient-dot"]
    methods = ("dtrak", "gradient-dot", "pixel-cosine")

    def with_methods(methods):
        attribution = dataclasses.replace(config.attribution, methods=methods)
        shown = dataclasses.replace(config.report, methods=methods)
        changed = dataclasses.replace(config, attribution=attribution, report=shown)
        return page(changed, *rest, **options)

    html = with_methods(methods)
    assert "according to D-TRAK, gradient dot and pixel cosine" in html
    assert "<h4>TRAK</h4>" not in html and "scores/trak-" not in html
    assert html.count("Eigenvalues of the kernels") == 1
    features = section(html, "features")
    assert "squared output (D-TRAK) and the loss (gradient dot)" in features
    assert "Eigenvalues" not in with_methods(("gradient-dot",))
    assert 'id="features"' not in with_methods(("pixel-cosine",))


MEASURE = """<!doctype html><title></title>
<iframe src="report.html" style="width:420px;height:800px;border:0"></iframe>
<script>addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const images = [...page.images];
  document.title = JSON.stringify({
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    broken: images.filter(image => !image.naturalWidth).length,
    images: images.length,
  });
})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_browser_lays_it_out_on_a_narrow_screen(tmp_path):
    for write in dict.fromkeys([fill, *WRITERS.values()]):
        write(tmp_path)
    arguments, options = make(tmp_path)
    html = page(*arguments, **options)
    assert f'alt="{LONG}"' in html, "an id that does not fit must be among the shown"
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE, encoding="utf-8")

    def browse(*flags, name):
        command = (
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--allow-file-access-from-files", *flags, (tmp_path / name).as_uri(),
        )  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        return done.stdout.decode()

    dom = browse("--dump-dom", name="measure.html")
    layout = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert layout["width"] <= 420
    assert layout["height"] > 2000
    assert layout["images"] == html.count("<img ") and not layout["broken"]

    shot = tmp_path / "shot.png"
    browse("--window-size=1280,900", f"--screenshot={shot}", name="report.html")
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (900, 1280)
    assert len(np.unique(pixels)) > 50
