"""The help pages of the command line, made from the settings and their docstrings."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Literal

from dtrak_jax.config import Config

SECTIONS = {field.name: field.type for field in dataclasses.fields(Config)}
"""The dataclass of each section of settings."""

LONGEST = 78
"""Characters of a setting's choices, beyond which these are in its text."""

COMMON = (
    "data.csv",
    "data.train",
    "train.steps",
    "sample.count",
    "features.timesteps",
    "features.dim",
    "attribution.methods",
    "attribution.damping",
    "report.queries",
)
"""Settings that the short help of `run` shows."""

SECTION_OF = {
    "base": "base",
    "encode": "base",
    "train": "train",
    "sample": "sample",
    "retrain": "ensemble",
    "featurize": "features",
    "attribute": "attribution",
    "lds": "ensemble",
    "counterfactual": "counterfactual",
    "ablate": "ablation",
    "report": "report",
    "export": "export",
}
"""The section that the short help of a stage shows."""

WAYS = """\
usage: dtrak-jax {command} CONFIG --workdir DIR [--SECTION.SETTING VALUE ...]
       dtrak-jax {command} --model FOLDER --images FOLDER --workdir DIR [...]"""

INPUTS = {
    "CONFIG": "A Python file that describes a run, such as configs/digits.py.",
    "--model FOLDER": "A trained diffusers model, instead of a config: a UNet's folder or "
    "a pipeline's.",
    "--images FOLDER": "The pictures that it was trained on.",
    "--queries FOLDER": "The pictures to ask about. Without it the model generates some.",
    "--lora FILE": "Trained adapters, where --model is a Stable Diffusion.",
    "--workdir DIR": "The folder of all results, also gs://BUCKET/FOLDER. The same "
    "command continues there.",
    "--profile DIR": "Writes a trace of the JAX profiler there.",
}
"""The arguments of a command beside settings."""

PLANNED = {
    "--topology NAME": "The devices to plan for, such as v5e:4x4; those at hand if it is "
    "left out.",
    "--stages NAMES": "The stages to plan, such as train,featurize; all if it is left out.",
    "--output FILE": "Where to write the plan as JSON.",
}
"""The further arguments of `plan`."""


def overview(commands: Mapping[str, str]) -> str:
    """Returns the page of `dtrak-jax --help`: all commands, and how to begin."""
    return "\n".join(
        (
            WAYS.format(command="COMMAND"),
            "",
            "Says which training images a diffusion model's pictures depend on.",
            "",
            "begin with one of:",
            "  dtrak-jax run configs/digits.py --workdir runs/digits",
            "  dtrak-jax run --model unet/ --images pictures/ --workdir runs/mine",
            "",
            "commands, each of which makes what it needs first:",
            *_rows(commands),
            "",
            "`dtrak-jax COMMAND --help` says more of each, and --version which version this is.",
        )
    )


def short(command: str, summary: str, config: Config) -> str:
    """Returns the page of `dtrak-jax COMMAND --help`, which fits on a screen for `run`."""
    inputs = INPUTS | PLANNED if command == "plan" else INPUTS
    if command in SECTION_OF:
        settings = _settings(names_of(SECTION_OF[command]), config)
    else:
        settings = _rows({flag(name): _brief(name, config) for name in COMMON})
    return "\n".join(
        (
            WAYS.format(command=command),
            "",
            summary,
            "",
            "what it works on:",
            *_rows(inputs),
            "",
            "settings that are often changed, with the values of CONFIG if it is named:",
            *settings,
            "",
            "All settings: --help-all, or those of a section by --help SECTION:",
            *_wrapped(" ".join(SECTIONS), 2),
        )
    )


def sections(names: Sequence[str], config: Config) -> str:
    """Returns the page of all settings of some sections."""
    lines = []
    for section in names:
        title, _, _ = SECTIONS[section].__doc__.partition("\n\n")
        lines += ["", *_wrapped(f"{section}: {title}", 0)]
        lines += _settings(names_of(section), config)
    return "\n".join(lines[1:])


def names_of(section: str) -> list[str]:
    """Returns the names of all settings of a section, ["train.steps", ...]."""
    fields = dataclasses.fields(SECTIONS[section])
    return [f"{section}.{field.name}" for field in fields]


def flag(name: str) -> str:
    """Returns the flag of a setting, "--train.batch-size" of "train.batch_size"."""
    return "--" + name.replace("_", "-")


def sentences(kind: type) -> dict[str, str]:
    """Returns the docstring of every field of a dataclass, "" where there is none."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    texts = {field.name: "" for field in dataclasses.fields(kind)}
    for node, following in zip(tree.body, tree.body[1:]):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[node.target.id] = ast.literal_eval(following.value)
    return texts


def form(kind: object) -> str:
    """Returns what a setting of a type is written as: INT, TEXT ..., {a,b}."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(map(str, choices))}}}"
    if typing.get_origin(kind) is tuple:
        return f"{form(choices[0])} ..."
    if is_union(kind):
        return "|".join(map(form, choices))
    return {int: "INT", float: "NUMBER", str: "TEXT", NoneType: "None"}[kind]


def is_union(kind: object) -> bool:
    """Returns whether a type is one of several."""
    return typing.get_origin(kind) in (typing.Union, UnionType)


def _settings(names: Sequence[str], config: Config) -> list[str]:
    """Returns the lines that describe settings: flag and form, sentence and default."""
    lines = []
    for name in names:
        written, text = _described(name, config)
        lines += [f"  {written}", *_wrapped(text, 6)]
    return lines


def _described(name: str, config: Config) -> tuple[str, str]:
    """Returns the flag of a setting with its form, and its sentences and default."""
    section, _, setting = name.partition(".")
    kind = SECTIONS[section].__dataclass_fields__[setting].type
    text = sentences(SECTIONS[section])[setting]
    if kind is bool:
        written = f"{flag(name)}, {flag(f'{section}.no-{setting}')}"
    else:
        written = f"{flag(name)} {form(kind)}"
    if len(written) > LONGEST:
        choices = form(kind)
        written = f"{flag(name)} NAME{' ...' * choices.endswith('...')}"
        text += f" Known are: {choices.strip('{} .').replace(',', ', ')}."
    return written, text + _default(name, config)


def _brief(name: str, config: Config) -> str:
    """Returns the first sentence of a setting, and its default."""
    section, _, setting = name.partition(".")
    text = " ".join(sentences(SECTIONS[section])[setting].split())
    first, _, _ = text.partition(". ")
    return first.rstrip(".") + "." + _default(name, config)


def _default(name: str, config: Config) -> str:
    """Returns the value that a config has for a setting, to be put behind its text."""
    section, _, setting = name.partition(".")
    value = getattr(getattr(config, section), setting)
    if value in ("", None, ()):
        return ""
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f" (default: {value})"


def _rows(table: Mapping[str, str]) -> list[str]:
    """Returns a table of names and their sentences as lines."""
    margin = max(map(len, table)) + 4
    lines = []
    for name, text in table.items():
        first, *rest = _wrapped(text, margin)
        lines += [f"  {name}".ljust(margin) + first.strip(), *rest]
    return lines


def _wrapped(text: str, margin: int) -> list[str]:
    """Returns a text as lines that begin at a margin."""
    indent = " " * margin
    how = {"initial_indent": indent, "subsequent_indent": indent}
    return textwrap.wrap(
        " ".join(text.split()), _width(), break_on_hyphens=False, **how
    )


def _width() -> int:
    """Returns the number of characters in a line of help."""
    return min(100, shutil.get_terminal_size().columns)
