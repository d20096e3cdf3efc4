"""Fingerprints: all that decides the values of features, as a dict to be compared."""

from collections.abc import Sequence
from importlib import metadata
from typing import Literal

import jax
import numpy as np

from dtrak_jax import digests
from dtrak_jax.features.gradients import (
    LayerGroups,
    Sketches,
    chosen_leaves,
    network_params,
)
from dtrak_jax.features.measurements import Probe
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.task import REFERENCE_SHARD, Task
from dtrak_jax.network import Params
from dtrak_jax.rng import id_words

FORMAT = 3
"""The number of the format, raised when the meaning of a stored number changes."""

Role = Literal["train", "query"]
"""The two sets of examples, which share no noise that is "independent"."""

EXAMPLES = ("ids", "images", "cond")
"""The fields of a fingerprint that tell of the examples."""

Hashes = dict[str, list[str] | None]
"""A value for each example, for each of these fields that there is."""


def example_hashes(ids: Sequence[str], images: np.ndarray, cond: object) -> Hashes:
    """Returns every example's id, and hashes of its image and its rows of `cond`."""
    leaves = digests.named_leaves(cond)
    columns = {path: digests.digest_rows(leaf) for path, leaf in leaves.items()}
    rows = [
        # A plain array is a pytree whose only path is empty.
        row[0] if list(columns) == [""] else digests.digest(*columns, *row)
        for row in zip(*columns.values(), strict=True)
    ]
    return {
        "ids": list(ids),
        "images": digests.digest_rows(images),
        "cond": rows if columns else None,
    }


def examples_fingerprint(hashes: Hashes) -> dict[str, str | None]:
    """Returns the fields `EXAMPLES`, made of hashes that stores keep and `merge` joins."""
    return {
        field: None if column is None else digests.digest(*column)
        for field, column in hashes.items()
    }


def fingerprint(
    task: Task,
    network: tuple[Params, Params | None, Sketches],
    projection: Projection,
    inputs: tuple,
    hashes: Hashes,
    role: Role | None = None,
    groups: LayerGroups = (),
) -> dict[str, object]:
    """Returns what features depend on, apart from rounding.

    Functions are known by the program that JAX makes of them, so that an edited network
    or measurement is noticed. The inputs are the shapes of (x, t, cond) for one image.
    """
    (params, frozen, sketches), (x, t, cond) = network, inputs
    scalar = jax.ShapeDtypeStruct((), np.int32)
    raw, reference = projection.kind == "none", task.noise == "reference"
    random = any(isinstance(f, Probe) for f in task.measurements.values())
    fields = {
        "format": FORMAT,
        "dtrak_jax": metadata.version("dtrak-jax"),
        "jax": jax.__version__,
        **_switches(),
        "network": digests.digest_program(
            task.network, network_params(params, frozen), x, t, cond
        ),
        "params": digests.digest_tree(params),
        "schedule": digests.digest(digests.settings_text(task.schedule)),
        "measurements": {
            # The function's name, that of a lambda, is part of the program's text.
            name: name
            if isinstance(f, Probe)
            else digests.digest_program(
                lambda p, y, s, f=f: f(p, y, s, task.schedule), x, x, scalar
            )
            for name, f in task.measurements.items()
        },
        "timesteps": list(task.grid),
        "draws": task.draws,
        "per_timestep": task.per_timestep,
        "noise": task.noise,
        "noise_batch": task.noise_batch if reference else None,
        "noise_seed": task.seed,
        "parameters": task.parameters,
        "projection": projection.kind,
        "dim": None if raw else projection.dim,
        "projection_seed": None if raw else projection.seed,
    }
    if frozen is not None:
        fields["frozen"] = digests.digest_tree(frozen)
    if task.noise == "independent" or random:
        fields["noise_of"] = role or "picture"
    if reference:
        fields["noise_shard"] = REFERENCE_SHARD
    if sketches:
        # The program of the network does not tell which of its operations are layers.
        fields["layers"] = digests.digest_tree(sketches)
    if groups:
        programs, paths = fields["measurements"], list(digests.named_leaves(params))
        leaves = [paths[i] for i in chosen_leaves(task, params)]
        fields["measurements"] = {
            f"{name}/{group}": [program, digests.digest(*(leaves[i] for i in members))]
            for name, program in programs.items()
            for group, members in groups
        }
    return fields | examples_fingerprint(hashes)


def noise_words(hashes: Hashes, role: Role | None) -> np.ndarray:
    """Returns what "independent" noise knows each example by, uint32 [n, 2].

    It is the id and the role, or the picture itself where no role is given: ids of
    training images and queries may coincide, and their noise must not.
    """
    names = hashes["images"] if role is None else [f"{role} {i}" for i in hashes["ids"]]
    return id_words(names)


def _switches() -> dict[str, object]:
    """Returns the switches of JAX that programs follow; None where they are not set."""
    names = "jax_default_matmul_precision", "jax_use_simplified_jaxpr_constants"
    return {name: getattr(jax.config, name, None) or None for name in names}
