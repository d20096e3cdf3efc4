"""The flags of a command line, and the settings that they change."""

import argparse
import dataclasses
import re
import typing
import warnings
from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import Literal, NoReturn

from dtrak_jax import help
from dtrak_jax.checks import alike
from dtrak_jax.config import Config

SHORT = {
    "--model": ("--model.folder", "--base.folder"),
    "--images": ("--data.name", "--data.source"),
    "--queries": ("--queries.folder",),
    "--lora": ("--lora.file",),
}
"""Short flags, and those of the settings that they stand for."""

OF_EXPORT = {"--format": "--export.format", "--top": "--export.top"}
"""Short flags of `dtrak-jax export`, and the settings that they stand for."""

NUMBERS = dict.fromkeys(
    ("--attribution.share", "--attribution.absolute"), "--attribution.damping"
)
"""Switches that say what a number means, and the flag of that number."""

OPTIONS = ("--workdir", "--profile", "--topology", "--stages", "--output")
"""Flags of no setting."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised."""

    def error(self, message: str) -> NoReturn:
        """Raises the message as a ValueError."""
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags; of settings it has those that are there, as words."""
    options = Parser(allow_abbrev=False, add_help=False)
    for flag in (*SHORT, *OPTIONS):
        options.add_argument(flag, default="")
    absent = {"default": argparse.SUPPRESS}
    for section, kind in help.SECTIONS.items():
        for field in dataclasses.fields(kind):
            name = f"{section}.{field.name}"
            how = absent | {"dest": name}
            if field.type is bool:
                negated = help.flag(f"{section}.no-{field.name}")
                options.add_argument(help.flag(name), action="store_true", **how)
                options.add_argument(negated, action="store_false", **how)
            else:
                many = "*" if help.form(field.type).endswith("...") else None
                options.add_argument(help.flag(name), nargs=many, **how)
    return options


def of_export(word: str) -> str:
    """Returns a short flag of `dtrak-jax export` in full; other words unchanged."""
    flag, equals, value = word.partition("=")
    return OF_EXPORT.get(flag, flag) + equals + value


def dashed(word: str) -> str:
    """Returns a flag with dashes for the underscores of its name; other words unchanged."""
    flag, equals, value = word.partition("=")
    is_flag = flag.startswith("--")
    return flag.replace("_", "-") + equals + value if is_flag else word


def settings_in(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Returns the settings of a command line, {section: {name: value}}."""
    sections: dict[str, dict[str, object]] = {}
    for name, words in vars(options).items():
        section, dot, setting = name.partition(".")
        if dot:
            kind = help.SECTIONS[section].__dataclass_fields__[setting].type
            sections.setdefault(section, {})[setting] = value_of(name, kind, words)
    return sections


def value_of(name: str, kind: object, words: str | list[str] | bool) -> object:
    """Returns the value of a setting of some type that is written as words.

    Raises:
      ValueError: a number cannot be read, or there is none.
    """
    kinds = typing.get_args(kind) if help.is_union(kind) else (kind,)
    many = [typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is tuple]
    if isinstance(words, list) and len(kinds) > 1 and len(words) == 1:
        # Of a number or several, a single word is the number.
        words = words[0]
    if many and isinstance(words, str | list) and many[0] is not str:
        joined = words if isinstance(words, str) else " ".join(words)
        if "," in joined:
            spaced = " ".join(joined.replace(",", " ").split())
            raise ValueError(
                f"{name} is {joined!r}; spaces separate several values: "
                f"{help.flag(name)} {spaced}"
            )
    if isinstance(words, list):
        if not words and len(kinds) > 1:
            raise ValueError(f"{name} is empty; name one number or more.")
        return tuple(value_of(name, many[0], word) for word in words)
    if kinds[-1] is NoneType and words == "None":
        return None
    if typing.get_origin(kinds[0]) is Literal:
        # What is no choice is refused by the settings themselves.
        choices = {str(choice): choice for choice in typing.get_args(kinds[0])}
        return choices.get(words, words)
    if kinds[0] not in (int, float):
        return words
    try:
        return kinds[0](words)
    except ValueError as error:
        what = "an integer" if kinds[0] is int else "a number"
        raise ValueError(f"{name} is {words!r}; it must be {what}.") from error


def changed(config: Config, changes: Mapping[str, Mapping[str, object]]) -> Config:
    """Returns a config with some settings of some sections changed."""
    return dataclasses.replace(
        config,
        **{
            section: dataclasses.replace(getattr(config, section), **settings)
            for section, settings in changes.items()
        },
    )


def check_flags(words: Sequence[str]) -> None:
    """Raises a ValueError if a flag is unknown, or says what another one does too.

    Of a flag that is there twice the last one counts, as scripts need it, and a warning
    says so.
    """
    settings = [help.flag(name) for s in help.SECTIONS for name in help.names_of(s)]
    given = [
        re.sub(r"\.no-", ".", dashed(word).partition("=")[0])
        for word in words
        if word.startswith("--")
    ]
    for flag in given:
        known(flag, (*SHORT, *OPTIONS, "--help", *settings), "option")
        if given.count(flag) > 1:
            text = f"{flag} is there {given.count(flag)} times; the last one counts."
            warnings.warn(text, stacklevel=2)
        for long in SHORT.get(flag, ()):
            if long in given:
                raise ValueError(f"{flag} decides {long}; leave one of them out.")


def check_switches(words: Sequence[str]) -> None:
    """Raises a ValueError if a switch is given a value."""
    for word, following in zip(words, [*words[1:], "--"]):
        flag, equals, value = dashed(word).partition("=")
        section, _, name = flag.strip("-").replace("-", "_").partition(".")
        name = name.removeprefix("no_")
        fields = getattr(help.SECTIONS.get(section), "__dataclass_fields__", {})
        if name not in fields or fields[name].type is not bool:
            continue
        if equals or not following.startswith("-"):
            number = (
                f"; the number goes behind {NUMBERS[flag]}" if flag in NUMBERS else ""
            )
            raise ValueError(
                f"{flag} is a switch and takes no value, but is given "
                f"{(value if equals else following)!r}; --{section}."
                f"no-{name.replace('_', '-')} turns it off{number}."
            )


def known(name: str, names: Collection[str], what: str) -> None:
    """Raises a ValueError that suggests the nearest of `names`, unless it has `name`."""
    if name in names:
        return
    last = name.strip("-").rpartition(".")[2]
    # A setting may be called without its section, or with another one's.
    lasts = {other: other.rpartition(".")[2].strip("-") for other in names}
    same = [other for other in names if lasts[other] == last]
    near = alike(name, names, same)
    if not near and (meant := alike(last, lasts.values())):
        near = " or ".join(other for other in names if lasts[other] == meant)
    hint = f"did you mean {near}?"
    if not near:
        hint = (
            "`dtrak-jax COMMAND --help-all` lists all."
            if what == "option"
            else f"there are {', '.join(n for n in names if '.' not in n)}."
        )
    raise ValueError(f"there is no {what} {name}; {hint}")
