"""What decides the values of features, as a small dict that can be compared."""

import hashlib
from importlib import metadata

import jax
import numpy as np

from dtrak_jax.features.gradients import Folds, network_inputs
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.task import Task
from dtrak_jax.trees import named_leaves

FORMAT = {"sketch": 2, "rademacher": 3, "gaussian": 3, "factorized": 2, "none": 2}
"""Of each projection; raised when the meaning of a stored number changes."""


def fingerprint(
    task: Task,
    params,
    projection: Projection,
    folds: Folds,
    images: np.ndarray,
    ids: tuple[str, ...],
    cond: np.ndarray | None,
) -> dict[str, object]:
    """Everything that features depend on, apart from rounding.

    Functions of the user's are known by the program that JAX makes of them, so an
    edited network or measurement does not go unnoticed.
    """
    x, t, condition = network_inputs(images, cond, 1)
    scalar = jax.ShapeDtypeStruct((), np.int32)
    raw = projection.kind == "none"
    fields = {
        "format": FORMAT[projection.kind],
        "dtrak_jax": metadata.version("dtrak-jax"),
        "jax": jax.__version__,
        "network": _program(task.apply, params, x, t, condition),
        "params": _digest_tree(params),
        "images": _digest_rows(images),
        "ids": _digest(*(i.encode() for i in ids)),
        "cond": None if cond is None else _digest_rows(cond),
        "schedule": _digest(repr(task.schedule).encode()),
        "measurements": {
            name: _program(lambda p, y, s, f=f: f(p, y, s, task.schedule), x, x, scalar)
            for name, f in task.measurements.items()
        },
        "timesteps": list(task.grid),
        "draws": task.draws,
        "per_timestep": task.per_timestep,
        "noise": task.noise,
        "noise_batch": task.noise_batch if task.noise == "reference" else None,
        "noise_seed": task.seed,
        "parameters": task.parameters,
        "projection": projection.kind,
        "dim": None if raw else projection.dim,
        "projection_seed": None if raw else projection.seed,
    }
    if folds:
        # What was found to be a layer is not in the network's program.
        fields["layers"] = _digest_tree(folds)
    return fields


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _digest_rows(array: np.ndarray) -> str:
    """Of an array's shape, type and content, 64 rows in memory at a time."""
    digest = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    for start in range(0, len(array), 64):
        digest.update(np.ascontiguousarray(array[start : start + 64]).tobytes())
    return digest.hexdigest()


def _digest_tree(params) -> str:
    parts = []
    for path, leaf in named_leaves(params).items():
        array = np.asarray(leaf)
        head = f"{path} {array.dtype} {array.shape} ".encode()
        parts.append(_digest(head, array.tobytes()).encode())
    return _digest(*parts)


def _program(function, *arguments) -> str:
    """Of the function's StableHLO at these shapes."""
    return _digest(jax.jit(function).lower(*arguments).as_text().encode())
