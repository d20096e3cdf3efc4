"""What the documents show runs, their links lead somewhere, their tables are the results."""

import ast
import dataclasses
import json
import re
import runpy
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import jax
import lds_tables
import numpy as np
import pytest
import tables
from conftest import TINY, png

import dtrak_jax as dtrak
from dtrak_jax import cli, models
from dtrak_jax.config import Config
from dtrak_jax.methods import METHODS

ROOT = Path(__file__).parent.parent
FOLDERS = ("dtrak_jax", "launch", "configs", "tests")
DOCUMENTS = [
    ROOT / "README.md",
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))),
]
RESULTS = ROOT / "configs" / "results"
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(document):
    return str(document.relative_to(ROOT))


def blocks(document, language):
    """The blocks of code of one language in a document."""
    return [
        code for lang, code in CODE.findall(document.read_text()) if lang == language
    ]


def prose(document):
    """A document without its blocks of code."""
    return CODE.sub("", document.read_text())


def run(code, folder, **names):
    """The names that a script defines, where some are given."""
    path = folder / "script.py"
    path.write_text(code)
    return runpy.run_path(str(path), init_globals=names)


def test_scripts_of_the_readme(capsys, tmp_path, monkeypatch):
    """Every query finds itself first: of a diffusers model, and of one of one's own."""
    monkeypatch.chdir(tmp_path)
    example, own_model = blocks(ROOT / "README.md", "python")
    run(own_model, tmp_path)
    printed = re.findall(r"'(\d+)'", capsys.readouterr().out)
    assert printed[::3] == ["0", "1", "2"]
    config = dataclasses.replace(TINY, in_channels=3, out_channels=3)
    model = models.build(config)
    models.to_diffusers(model, models.init(model, jax.random.key(0)), "pipeline/unet")
    (tmp_path / "pipeline" / "scheduler_config.json").write_text("{}")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    for folder, count in (("pictures", 10), ("generated", 2)):
        (tmp_path / folder).mkdir()
        for i, picture in enumerate(pixels[:count]):
            (tmp_path / folder / f"{i}.png").write_bytes(png(picture))
    scores = run(example, tmp_path)["scores"]
    assert list(scores.top(1).ids[:, 0]) == ["0.png", "1.png"]
    assert (tmp_path / "features" / "metadata.json").exists()
    assert "1.png" in (tmp_path / "report.html").read_text()


def test_scripts_of_the_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = blocks(ROOT / "configs" / "README.md", "python")
    assert isinstance(run(config, tmp_path)["get_config"](), Config)
    package = blocks(ROOT / "dtrak_jax" / "README.md", "python")
    (unet,) = (code for code in package if "to_diffusers" in code)
    model = models.build(TINY)
    params = models.init(model, jax.random.key(0))
    pipeline = tmp_path / "path" / "to" / "pipeline"
    models.to_diffusers(model, params, pipeline / "unet")
    (pipeline / "scheduler_config.json").write_text("{}")
    run(unet, tmp_path, dtrak=dtrak)
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_the_script_that_checks_scores(tmp_path, monkeypatch, capsys, images):
    """A model that knows the mean of its images, and nothing else."""
    monkeypatch.chdir(tmp_path)
    package = blocks(ROOT / "dtrak_jax" / "README.md", "python")
    (script,) = (code for code in package if "dtrak.retrain" in code)
    images, given = np.concatenate([images, -images]), {"dtrak": dtrak}
    given |= {"images": images, "generated": images[:2], "seeds": np.arange(2)}
    given["scores"] = np.einsum("qhwc,nhwc->qn", images[:2], images)
    given["schedule"] = dtrak.linear_schedule()
    given["apply"] = lambda params, x, t, cond: x - params[None]
    given["train_my_model"] = lambda rows, seed: rows.mean(axis=0) + 0.01 * seed
    given["sample_my_model"] = lambda mean, seeds: mean + seeds.reshape(-1, 1, 1, 1)
    run(script, tmp_path, **given)
    lds, removed = capsys.readouterr().out.splitlines()
    assert lds.startswith("LDS(") and "16 subsets × 2 seeds" in lds
    assert removed.startswith("Counterfactual(2 queries, 20 of 24 removed")
    assert len(list((tmp_path / "models").glob("*.npz"))) == 32


def commands():
    """Every `dtrak-jax` command in a block of the documents, and in a config's docstring."""
    texts = [code for document in DOCUMENTS for code in blocks(document, "bash")]
    for config in sorted((ROOT / "configs").glob("*.py")):
        texts.append(ast.get_docstring(ast.parse(config.read_text())))
    found = []
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            found += re.findall(r"dtrak-jax [^;&#]*configs/[^;&#]*", line)
    return dict.fromkeys(" ".join(line.split()) for line in found)


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command, monkeypatch):
    """Config, flags and values are right; nothing is run."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if "--help" in words[-1]:
        with pytest.raises(SystemExit) as stopped:
            cli.parse(words)
        assert stopped.value.code == 0
    else:
        assert cli.parse(words)[0] == words[0]


def anchors(document):
    """The names by which GitHub links to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links(document):
    """Files and headings are there; addresses elsewhere are well formed."""
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(document)):
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, target
            continue
        path = (document.parent / parts.path).resolve() if parts.path else document
        assert path.exists(), target
        if parts.fragment:
            assert parts.fragment in anchors(path), target


def test_all_tables_are_in_documents():
    shown = [
        found.group(2)
        for document in tables.DOCUMENTS
        for found in tables.TABLE.finditer(document.read_text())
    ]
    assert set(shown) == set(tables.TABLES)


def test_every_measured_method_is_in_the_readme():
    shown = {method for names in lds_tables.METHODS for method in names}
    measured = json.loads((RESULTS / "digits_lds.json").read_text())["queries"]
    rows = {row["method"] for one in measured.values() for row in one["rows"]}
    elsewhere = {"coverage", "ekfac", "gauss-newton"}
    assert rows - {"constant"} | elsewhere == shown <= set(METHODS)


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=name)
def test_tables_are_the_committed_results(document):
    """Otherwise run `python configs/results/tables.py`."""
    text = document.read_text()
    assert tables.filled(text) == text


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", RESULTS / "README.md"], ids=name
)
def test_no_result_is_typed_by_hand(document):
    """Decimals stand in tables, which are made from the results."""
    text = tables.TABLE.sub("", prose(document))
    assert not re.findall(r"(?<![\w.])[−-]?\.\d\d+", text)


def planned(name):
    """The hours of each stage of a plan, and the GiB of the largest."""
    plan = json.loads((RESULTS / "plans" / f"{name}.json").read_text())
    hours: dict[str, float] = {}
    for row in plan["stages"]:
        stage = row["stage"].partition(" ")[0]
        hours[stage] = hours.get(stage, 0) + row["seconds"] / 3600
    return hours, max(row["memory"] for row in plan["stages"]) / 2**30


@pytest.mark.parametrize(
    "config", ["cifar2", "cifar10", "celeba", "artbench2", "artbench5"]
)
def test_configs_say_what_is_planned(config):
    hours, memory = planned(f"{config}_reference_v5e-4x4")
    said = " ".join(
        ast.get_docstring(
            ast.parse((ROOT / "configs" / f"{config}.py").read_text())
        ).split()
    )
    for stage, text in {
        "train": "{:.2f} hours of training",
        "featurize": "{:.2f} of gradients",
        "retrain": "{:.1f} of retraining 192 models",
        "measure": "{:.1f} of measuring",
    }.items():
        assert text.format(hours[stage]) in said
    assert f"{memory:.0f} of a chip's 16 GiB" in said
    if config.startswith("artbench"):
        hours, memory = planned(f"{config}_reference_v5p-2x2x2")
        assert (
            f"on 8 chips of a v5p {hours['train']:.2f}, {hours['featurize']:.2f}, "
            f"{hours['retrain']:.1f} and {hours['measure']:.1f} hours, and "
            f"{memory:.0f} of 95 GiB"
        ) in said


def test_results_name_their_revision():
    for path in sorted(RESULTS.glob("*.json")):
        revision = json.loads(path.read_text())["revision"]
        assert re.fullmatch(r"[0-9a-f]{40}", revision), path.name
        assert revision[:7] in (RESULTS / "README.md").read_text(), path.name
