"""Command lines: how they are read, what they say, and what of them is refused."""

import dataclasses
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DIGITS

from dtrak_jax import ahead, cli, files, help, pipeline
from dtrak_jax.config import (
    AttributionConfig,
    BaseConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    LoRAConfig,
    ModelConfig,
    QueriesConfig,
    SampleConfig,
    TrainConfig,
    flatten,
)
from dtrak_jax.planning import messages, work
from dtrak_jax.run import Run


def refusal(*words):
    """The text of the error that a command line is."""
    with pytest.raises((ValueError, OSError)) as error:
        cli.parse(words)
    return str(error.value)


@pytest.mark.parametrize("section", help.SECTIONS)
def test_every_option_has_a_sentence(section):
    for name, text in help.sentences(help.SECTIONS[section]).items():
        assert text.endswith("."), f"{section}.{name}"


def test_every_option_of_the_help_is_one():
    """All of them at once, with the values that they have anyway, change nothing."""
    config, words = cli.load_config(str(DIGITS)), []
    page = help.sections(list(help.SECTIONS), config)
    for section in help.SECTIONS:
        for name in help.names_of(section):
            value = getattr(getattr(config, section), name.partition(".")[2])
            flag = help.flag(name)
            assert f"\n  {flag}" in page
            if isinstance(value, bool):
                words.append(flag if value else flag.replace(".", ".no-", 1))
            else:
                values = value if isinstance(value, tuple) else (value,)
                words += [flag, *map(str, values)]
    assert cli.parse(["plan", str(DIGITS), *words])[1] == config


def test_every_stage_is_checked_announced_and_explained(tmp_path):
    """The tables of what stages have beside their row in `pipeline.STAGES` agree."""
    names = [stage.name for stage in pipeline.STAGES]
    assert list(help.SECTION_OF) == list(messages.AFTER) == names
    assert list(ahead.CHECKS) == names
    run = Run(Config(), tmp_path)
    assert all(work.describe(name, run) for name in names)


@pytest.mark.parametrize(
    ("there", "sampled", "said"),
    [
        ((), True, "next: `dtrak-jax lds` measures"),
        (("lds",), True, "next: `dtrak-jax counterfactual` shows"),
        (("lds",), False, ""),
        (("lds", "counterfactual"), True, ""),
    ],
)
def test_a_report_says_what_is_still_open(there, sampled, said, capsys):
    run = SimpleNamespace(
        json=lambda name: {} if name in there else None,
        is_sampled=sampled,
        config=SimpleNamespace(is_given=False),
    )
    messages.after(run, "report", None)
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("next:") == bool(said)


def test_where_nothing_can_be_written_is_refused_before_the_work(tmp_path):
    """The file of a plan, the page and the folder of an export."""
    options = SimpleNamespace(output=str(tmp_path), profile="")
    with pytest.raises(IsADirectoryError, match="--output is .*, a folder"):
        cli.execute("plan", Config(), options)
    run = SimpleNamespace(workdir=tmp_path)
    (tmp_path / "export").touch()
    (tmp_path / "report.html").mkdir()
    for stage, named in (
        ("export", "the folder of the export"),
        ("report", "the report"),
    ):
        with pytest.raises(OSError, match=f"{named} is .*, (which is a file|a folder)"):
            ahead.check(run, stage)


def test_the_short_help_fits_on_a_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help.short("run", cli.COMMANDS["run"], Config()).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    assert {"--model", "--images", "--queries"} <= set(" ".join(lines).split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "no command rnu; did you mean run?"),
        (["run", "--trian.steps", "5"], "--trian.steps; did you mean --train.steps?"),
        (["run", "--train.step=5"], "--train.step; did you mean --train.steps?"),
        (["run", "--dim", "5"], "--dim; did you mean --features.dim?"),
        (["run", "--modle", "u"], "--modle; did you mean --model?"),
        (["run", "--train.no-steps"], "unrecognized arguments: --train.no-steps"),
        (
            ["run", "--epochs", "5"],
            "no option --epochs; `dtrak-jax COMMAND --help-all`",
        ),
        (
            ["run", str(DIGITS), "--help", "trian"],
            "no section trian; did you mean train?",
        ),
        (["--help", "cvs"], "no section cvs; did you mean data.csv or queries.csv?"),
        (["--help", "epochs"], "no section epochs; there are data, model, base,"),
        (["lsd"], "no command lsd; did you mean lds?"),
        (["run", "--cvs", "a"], "no option --cvs; did you mean --data.csv or"),
        (
            ["export", str(DIGITS), "--format", "cvs"],
            "export.format is 'cvs' (did you mean csv?)",
        ),
        (
            ["run", str(DIGITS), "--features.timesteps", "100,300"],
            "'100,300'; spaces separate several values: --features.timesteps 100 300",
        ),
        (
            ["run", str(DIGITS), "--attribution.methods", "trak,", "dtrak"],
            "spaces separate several values: --attribution.methods trak dtrak",
        ),
        (
            ["run", str(DIGITS), "--counterfactual.sets", "dtrk"],
            "'dtrk' (did you mean dtrak?); it must be one of: 'dtrak', 'trak', 'kernel-m",
        ),
        (
            ["run", str(DIGITS), "--counterfactual.methods", "randon"],
            "counterfactual.methods is 'randon'; it must be one of: 'dtrak'",
        ),
        (
            ["run", str(DIGITS), "--attribution.damping", "-1"],
            "attribution.damping is -1.0; it must be a finite number above 0.",
        ),
        (["run", "--workdir"], "--workdir: expected one argument"),
        (["run", "--images", "a", "--data.name", "b"], "--images decides --data.name"),
        (["run"], "the config is missing"),
        (["run", "--images", "."], "--model is missing"),
        (["run", "--model", "."], "--images is missing"),
        (["run", "--model", "./none", "--images", "."], "--model is './none'"),
        (["run", "--model", ".", "--images", "./none"], "--images is './none'"),
        (["run", "."], "that is a folder: a model's goes behind --model"),
        (
            ["run", "--model", ".", "--images", ".", "--lora", "."],
            "no Stable Diffusion",
        ),
        (
            ["run", str(DIGITS), "--attribution.share", "0.05"],
            "'0.05'; --attribution.no-share turns it off; the number goes behind --attr",
        ),
        (
            ["run", "--data.no_flip=true", str(DIGITS)],
            "but is given 'true'; --data.no-flip turns it off.",
        ),
        (
            ["run", str(DIGITS), "--attribution.methods", "trak", "dtrk"],
            "attribution.methods is 'dtrk' (did you mean dtrak?); it must be one of: 'dtr",
        ),
        (["run", str(DIGITS), "--attribution.methods", "trak", "trak"], "'trak' twice"),
        (
            ["run", str(DIGITS), "--counterfactual.sets", "trak", "trak"],
            "counterfactual.sets has 'trak' twice",
        ),
        (
            ["run", str(DIGITS), "--features.measurements", "l1", "l1-norm"],
            "features.measurements has 'l1' twice",
        ),
        (
            ["run", str(DIGITS), "--train.steps", "many"],
            "'many'; it must be an integer",
        ),
        (["run", str(DIGITS), "--train.steps", "0"], "train.steps is 0; it must be an"),
        (["run", str(DIGITS), "--data.train", "-1"], "data.train is -1; it must be an"),
        (["run", str(DIGITS), "--features.timesteps"], "features.timesteps is empty"),
        (["run", str(DIGITS), "--data.groups", "a", "a"], "data.groups"),
        (["methods", "--train.steps", "5"], "methods takes no config"),
    ],
)
def test_what_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "dtrak-jax run --model unet/ --images pictures/"),
        (["run", "-h"], "--help SECTION"),
        (["lds", "--help"], "--ensemble.subsets INT"),
        (["run", str(DIGITS), "--help", "train"], "(default: 0.002)"),
        (
            ["run", "--help", "data"],
            "0 takes all that validation leaves. (default: 0)",
        ),
        (["--help", "clip"], "--clip.folder TEXT"),
        (["--help", "clip.folder"], "--clip.folder TEXT"),
        (
            ["--help", "counterfactual"],
            "kernel-l1, kernel-l2, kernel-linf, kernel-elbo, coverage.",
        ),
        (["--help", "counterfactual"], "0 takes a fifth of the training images"),
        (["--help-all"], "--report.top INT"),
        (["--version"], version("dtrak-jax")),
    ],
)
def test_what_is_asked_for(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(words)
    assert stopped.value.code == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_of_a_flag_that_is_there_twice_the_last_one_counts():
    line = ["plan", str(DIGITS), "--train.batch-size", "5", "--train.batch_size=6"]
    with pytest.warns(UserWarning, match="--train.batch-size is there 2 times"):
        assert cli.parse(line)[1].train.batch_size == 6
    with pytest.warns(UserWarning, match="--data.flip is there 2 times"):
        flip = cli.parse(["plan", str(DIGITS), "--data.flip", "--data.no-flip"])[1]
    assert not flip.data.flip


def test_the_config_may_stand_anywhere():
    line = ["plan", "--train.steps", "5", str(DIGITS)]
    assert cli.parse(line)[1].train.steps == 5


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A UNet, a Stable Diffusion as far as it is looked at, adapters, pictures, queries."""
    monkeypatch.chdir(tmp_path)
    for name in ("unet", "sd", "pictures", "generated"):
        Path(name).mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["", "CLIP"]}
    Path("sd/model_index.json").write_text(json.dumps(index))
    Path("lora.safetensors").touch()
    Path("pictures/captions.csv").write_text("file,caption\n1.png,a cat\n")
    Path("generated/sizes.csv").write_text("name,bytes\n1.png,7\n")


METHODS = AttributionConfig(methods=("dtrak", "trak", "pixel-cosine"))
FEATURES = FeaturesConfig(timesteps=5, draws=2)
PICTURES = DataConfig(
    source="folder", name="pictures", csv="captions.csv", train=0, validation=0
)


def test_a_model_and_pictures_are_a_run(folders):
    """All pictures count, settings are flags, and what is not given is generated."""
    line = ["run", "--model", "unet", "--images", "pictures", "--workdir", "w"]
    expected = Config(
        model=ModelConfig(folder="unet"),
        data=PICTURES,
        sample=SampleConfig(count=16),
        attribution=METHODS,
        features=FEATURES,
        train=TrainConfig(steps=0),
    )
    assert cli.parse(line)[1] == expected
    dim = dataclasses.replace(FEATURES, dim=8)
    line += ["--queries", "generated", "--features.dim", "8", "--data.csv", ""]
    expected = dataclasses.replace(
        expected,
        data=dataclasses.replace(PICTURES, csv=""),
        sample=SampleConfig(count=0),
        queries=QueriesConfig(folder="generated"),
        features=dim,
    )
    assert cli.parse(line)[1] == expected


def test_how_a_given_model_was_trained_is_said_once(folders):
    """By a flag or a config that has another recipe than the default; then it is known."""
    line = ["lds", "--model", "unet", "--images", "pictures", "--workdir", "w"]

    def recipe(*more):
        return cli.parse([*line, *more])[1].train

    assert recipe("--train.batch-size", "5") == TrainConfig(steps=0, batch_size=5)
    named = cli.parse([*line, "--train.steps", "8000", "--train.seed", "3"])[1]
    assert named.train == TrainConfig(seed=3)
    files.write_json("w/config.json", {"config": flatten(named)})
    assert recipe("--train.batch-size", "5") == TrainConfig(seed=3, batch_size=5)
    line[2] = "pictures"
    assert recipe() == TrainConfig(steps=0)
    Path("given.py").write_text(
        "from dtrak_jax.config import *\n"
        "def get_config():\n    return Config(model=ModelConfig(folder='unet'))"
    )
    line[1:5] = ["given.py"]
    assert recipe("--train.seed", "7") == TrainConfig(seed=7)
    line[1] = str(DIGITS)
    expected = cli.load_config(str(DIGITS)).train
    assert recipe("--model", "unet") == expected


def test_a_stable_diffusion_comes_with_its_adapters(folders):
    line = ["run", "--model", "sd", "--images", "pictures", "--workdir", "w"]
    assert "sd is a Stable Diffusion: also name trained adapters" in refusal(*line)
    expected = Config(
        base=BaseConfig(folder="sd"),
        lora=LoRAConfig(file="lora.safetensors"),
        data=PICTURES,
        sample=SampleConfig(count=16),
        attribution=METHODS,
        features=FEATURES,
        train=TrainConfig(steps=0),
    )
    assert cli.parse([*line, "--lora", "lora.safetensors"])[1] == expected
    index = {"_class_name": "FluxPipeline", "text_encoder": ["", "CLIP"]}
    Path("sd/model_index.json").write_text(json.dumps(index))
    assert "--model is 'sd', a FluxPipeline" in refusal(*line)


def test_folders_take_the_place_of_what_a_config_names(folders):
    """Its other settings stay, so that it trains a model on one's own pictures."""
    line = ["run", str(DIGITS), "--images", "pictures", "--workdir", "w"]
    config = cli.load_config(str(DIGITS))
    data = dataclasses.replace(
        config.data, source="folder", name="pictures", csv="captions.csv"
    )
    assert cli.parse(line)[1] == dataclasses.replace(config, data=data)
    given = cli.parse([*line, "--model", "unet"])[1]
    assert given.model == ModelConfig(folder="unet")
    assert given.features == config.features


def test_warnings_are_notes_each_once(monkeypatch, capsys):
    """Warnings of other packages, and those that are for programmers, are not told."""

    def stage(run):
        for _ in range(2):
            warnings.warn("14 pictures\n  are enlarged.", UserWarning, stacklevel=1)
        warnings.warn("an old name", DeprecationWarning, stacklevel=1)
        np.log(np.zeros(1))
        text = "donated"
        warnings.warn_explicit(text, UserWarning, "mlir.py", 1, module="jax._src.mlir")

    monkeypatch.setattr(cli, "execute", lambda *parsed: stage(parsed))
    with warnings.catch_warnings():
        warnings.showwarning = print_warning
        cli.main(["methods"])
    assert capsys.readouterr().err == "note: 14 pictures are enlarged.\n"


def print_warning(message, category, filename, lineno, file=None, line=None):
    """Python's own way, which pytest has replaced."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    sys.stderr.write(text)
