"""A command line, taken apart: its config, or a model and pictures, and its settings."""

import argparse
import dataclasses
import importlib.metadata
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrak_jax import files, flags, help
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

GENERATED = 16
"""Pictures that a given model generates where no config says how many."""

METHODS = ("dtrak", "trak", "pixel-cosine")
"""Methods of a given model where no config names any."""

STABLE_DIFFUSION = "StableDiffusionPipeline"
"""The class of diffusers that text-to-image takes, versions 1 and 2."""


def parse(
    arguments: Sequence[str], commands: Mapping[str, str]
) -> tuple[str, Config | None, argparse.Namespace]:
    """Returns (command, config, further options such as workdir) of a command line.

    Args:
      arguments: the words after the program's name.
      commands: what there is, {name: summary}.

    Raises:
      SystemExit: help was asked for, and printed.
      ValueError: something is missing, unknown or wrong; says what is right.
    """
    if list(arguments) in ([], ["--help"], ["-h"]):
        print(help.overview(commands))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(importlib.metadata.version("dtrak-jax"))
        sys.exit(0)
    # All settings are the same for all commands.
    command, *words = ["run"] * arguments[0].startswith("--help") + list(arguments)
    flags.known(command, commands, "command")
    path, words = split_config(words)
    if command == "export":
        words = list(map(flags.of_export, words))
    asked = [word for word in words if word.startswith("--help") or word == "-h"]
    if asked:
        config = load_config(path) if path else without_file("")
        print(help_page(command, commands, asked[0], words, config))
        sys.exit(0)
    flags.check_flags(words)
    flags.check_switches(words)
    options = flags.parser().parse_args([flags.dashed(word) for word in words])
    if command == "methods":
        if words or path:
            raise ValueError("methods takes no config and no settings.")
        return command, None, options
    config = chosen(load_config(path) if path else None, options)
    changes = flags.settings_in(options)
    unknown = config.train == TrainConfig()
    config = flags.changed(config, changes)
    if unknown and config.is_given:
        config = dataclasses.replace(config, train=recipe_in(options.workdir, config))
        config = flags.changed(config, {"train": changes.get("train", {})})
    planned = options.topology or options.stages or options.output
    if command != "plan" and planned:
        raise ValueError("--topology, --stages and --output are for `dtrak-jax plan`.")
    if command != "plan" and not options.workdir:
        raise ValueError("--workdir is missing: name a folder for the results.")
    return command, config, options


def split_config(words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the path of the config, or "", and the words besides it.

    It comes first; a word that ends in .py is taken for it everywhere.
    """
    for position, word in enumerate(words):
        if word.endswith(".py") or (position == 0 and not word.startswith("-")):
            return word, [*words[:position], *words[position + 1 :]]
    return "", list(words)


def help_page(
    command: str,
    commands: Mapping[str, str],
    flag: str,
    words: Sequence[str],
    config: Config,
) -> str:
    """Returns the page that `--help`, `--help SECTION` or `--help-all` asks for.

    A setting such as data.csv may stand for its section.
    """
    if flag == "--help-all":
        return help.sections(list(help.SECTIONS), config)
    section = flag.partition("=")[2] or next(
        (w for w in words[words.index(flag) + 1 :] if not w.startswith("-")), ""
    )
    if not section:
        return help.short(command, commands[command], config)
    settings = [name for known in help.SECTIONS for name in help.names_of(known)]
    flags.known(section, [*help.SECTIONS, *settings], "section")
    return help.sections([section.partition(".")[0]], config)


def load_config(path: str) -> Config:
    """Returns what `get_config()` of a config file returns.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: it has no get_config, or that returns something else.
    """
    if not Path(path).is_file():
        hint = ""
        if Path(path).is_dir():
            hint = (
                "; that is a folder: a model's goes behind --model, pictures' behind "
                "--images"
            )
        raise FileNotFoundError(f"there is no config file {path}{hint}.")
    module = runpy.run_path(path)
    config = module["get_config"]() if "get_config" in module else None
    if not isinstance(config, Config):
        raise TypeError(
            f"{path} must define get_config() that returns a dtrak_jax Config."
        )
    return config


def chosen(config: Config | None, options: argparse.Namespace) -> Config:
    """Returns the config with what the short flags name in place of its own.

    Without a config they name everything, and the model is one that is there already. A
    CSV among the pictures is read, if there is one with a `file` column.

    Raises:
      FileNotFoundError: a folder or file is not there; names the flag.
      ValueError: something is missing.
    """
    for flag in flags.SHORT:
        path = getattr(options, flag[2:])
        if path and not files.at(path).exists():
            raise FileNotFoundError(f"{flag} is {path!r}: there is nothing there.")
    sections = {}
    if config is None:
        check_complete(options)
        config = without_file(options.queries)
    if options.model:
        sections |= model_sections(options.model, options.lora or config.lora.file)
    elif options.lora:
        sections["lora"] = LoRAConfig(file=options.lora)
    if options.images:
        place = {"name": options.images, "csv": table_in(options.images)}
        sections["data"] = dataclasses.replace(config.data, source="folder", **place)
    if options.queries:
        csv = table_in(options.queries)
        sections["queries"] = QueriesConfig(folder=options.queries, csv=csv)
    return dataclasses.replace(config, **sections)


def without_file(queries: str) -> Config:
    """Returns the config of a given model and pictures, of which all count, but for
    where they are."""
    return Config(
        data=DataConfig(train=0, validation=0),
        sample=SampleConfig(count=0 if queries else GENERATED),
        queries=QueriesConfig(folder=queries),
        features=FeaturesConfig(timesteps=5, draws=2),
        attribution=AttributionConfig(methods=METHODS),
    )


def recipe_in(workdir: str, config: Config) -> TrainConfig:
    """Returns how a given model was trained, as an earlier command in a run directory was
    told; `steps` is 0 where none was, since defaults are those of other models."""
    path = files.at(workdir) / "config.json"
    saved = files.read_json(path)["config"] if workdir and path.exists() else {}
    given = ("model.folder", "lora.file")
    settings = flatten(config)
    if any(saved.get(name) != settings[name] for name in given):
        return TrainConfig(steps=0)
    recipe = {
        field.name: saved[f"train.{field.name}"]
        for field in dataclasses.fields(TrainConfig)
        if f"train.{field.name}" in saved
    }
    lists = {k: tuple(v) for k, v in recipe.items() if isinstance(v, list)}
    return TrainConfig(**recipe | lists)


def table_in(folder: str) -> str:
    """Returns the name of the CSV in a folder of pictures; "" if none or several have a
    `file` column."""
    tables = []
    for path in files.at(folder).glob("*.csv"):
        with path.open("rb") as table:
            if re.search(rb"\bfile\b", table.readline()):
                tables.append(path.name)
    return tables[0] if len(tables) == 1 else ""


def check_complete(options: argparse.Namespace) -> None:
    """Raises a ValueError unless a model and pictures are named."""
    if not (options.model or options.images or options.queries or options.lora):
        raise ValueError(
            "the config is missing: name a file such as configs/digits.py after the "
            "command; or your own model with --model and its pictures with --images."
        )
    if not options.model:
        raise ValueError(
            "--model is missing: name the folder of a trained diffusers model; to train "
            "one, name a config such as configs/digits.py after the command."
        )
    if not options.images:
        raise ValueError(
            "--images is missing: name the folder of the pictures that the model was "
            "trained on."
        )


def model_sections(folder: str, lora: str) -> dict[str, object]:
    """Returns the sections of a config that a given model decides, and its adapters.

    Raises:
      ValueError: a Stable Diffusion has no adapters, another model has some, or the
        folder is that of another pipeline from text.
    """
    index = files.at(folder) / "model_index.json"
    pipeline = files.read_json(index) if index.is_file() else {}
    if "text_encoder" not in pipeline:
        if lora:
            raise ValueError(
                f"--lora is {lora!r}, but {folder} is no Stable Diffusion; leave it out."
            )
        return {"model": ModelConfig(folder=folder)}
    name = pipeline.get("_class_name")
    if name != STABLE_DIFFUSION:
        raise ValueError(
            f"--model is {folder!r}, a {name}; of pipelines from text it must be a "
            f"{STABLE_DIFFUSION}."
        )
    if not lora:
        raise ValueError(
            f"{folder} is a Stable Diffusion: also name trained adapters with --lora. To "
            "train some, write a config with base.folder."
        )
    return {"base": BaseConfig(folder=folder), "lora": LoRAConfig(file=lora)}
