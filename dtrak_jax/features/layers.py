"""The groups of layers whose parts of a gradient are projected by themselves.

With 1_m the entries of the parameters of group m, phi_m(x) = P (1_m * g(x)) is the
feature of the gradient with all other entries 0. Every parameter that is differentiated
is in one group, so that the features of all groups add up to those of the whole gradient.
"""

import re
from collections.abc import Mapping
from typing import Literal

from dtrak_jax.checks import pattern, shown
from dtrak_jax.digests import named_leaves
from dtrak_jax.features.gradients import LayerGroups, chosen_leaves
from dtrak_jax.features.task import Task
from dtrak_jax.network import Params

Layers = Mapping[str, str] | Literal["blocks"]
"""{group: a regular expression that finds its parameters}; or "blocks", see `groups_of`."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""The names that groups may have, which are folders of a store."""


def groups_of(task: Task, params: Params, layers: Layers | None) -> LayerGroups:
    """Returns ((name, positions among the chosen leaves), ...) of each group.

    "blocks" makes a group of all parameters whose paths begin alike: such as mid_block of
    mid_block/conv1/kernel; or if all paths do, of those that go on alike. None makes none.

    Raises:
      ValueError: a parameter that no pattern finds, or that two of them find; a group
        without parameters; or a name that cannot be that of a folder.
    """
    if layers is None:
        return ()
    paths = list(named_leaves(params))
    chosen = [paths[i] for i in chosen_leaves(task, params)]
    if layers == "blocks":
        return _blocks(chosen)
    check_layers("layers", layers)
    members = {
        name: tuple(i for i, path in enumerate(chosen) if re.search(wanted, path))
        for name, wanted in layers.items()
    }
    for name, positions in members.items():
        if not positions:
            raise ValueError(
                f"layers[{name!r}] is {layers[name]!r}, which finds none of the "
                f"{len(chosen)} parameters, such as {', '.join(chosen[:5])}."
            )
    for i, path in enumerate(chosen):
        names = [name for name, positions in members.items() if i in positions]
        if len(names) != 1:
            raise ValueError(
                f"layers: the parameter {path} is in {len(names)} groups"
                f"{''.join(f', {name!r}' for name in names)}; each must be in one."
            )
    return tuple(members.items())


def by_group(features: dict, task: Task, groups: LayerGroups) -> dict:
    """Returns {measurement: {group: features}} of what `feature_names` names; without
    groups the features as they are."""
    if not groups:
        return features
    return {
        name: {group: features[f"{name}/{group}"] for group, _ in groups}
        for name in task.measurements
    }


def check_layers(setting: str, layers: Mapping[str, str]) -> None:
    """Raises a ValueError unless these are names and regular expressions of groups."""
    if not layers or not isinstance(layers, Mapping):
        raise ValueError(
            f"{setting} is {shown(layers)}; it must be {{name: pattern}} of one group of "
            "parameters or more, or 'blocks'."
        )
    for name, wanted in layers.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"{setting} has a group called {name!r}; its name must be of letters, "
                "digits, '_', '.' and '-'."
            )
        pattern(f"{setting}[{name!r}]", wanted)


def _blocks(paths: list[str]) -> LayerGroups:
    """Returns a group for each first component in which paths differ."""
    parts = [path.split("/") for path in paths]
    depth = 0
    while len({tuple(p[: depth + 1]) for p in parts}) == 1 and depth < len(parts[0]):
        depth += 1
    groups: dict[str, list[int]] = {}
    for i, components in enumerate(parts):
        name = re.sub("[^A-Za-z0-9_.-]", "_", "/".join(components[depth : depth + 1]))
        groups.setdefault(name.lstrip(".-") or "all", []).append(i)
    return tuple((name, tuple(positions)) for name, positions in groups.items())
