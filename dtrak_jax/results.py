"""Results in JSON, each of which names the artefacts that it was made from."""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dtrak_jax import feature_sets, files, parallel, score_sets
from dtrak_jax.digests import digest
from dtrak_jax.methods import METHODS

if TYPE_CHECKING:
    from dtrak_jax.run import Run

MADE_FROM = "made_from"
"""The field with the hash of every artefact."""

COMMANDS = {"features/distortion": "featurize", "ablations": "ablate"}
"""The command that makes a result, where the two names differ."""


def save(run: "Run", name: str, result: dict, parts: Iterable[str]) -> None:
    """Writes NAME.json, made from some parts as `fingerprint` knows them.

    All processes must call it together.
    """
    made_from = {part: fingerprint(run, part) for part in parts}
    if parallel.is_main_process():
        files.write_json(run.workdir / f"{name}.json", {MADE_FROM: made_from} | result)


def load(run: "Run", name: str) -> dict | None:
    """Returns the contents of NAME.json, see `Run.json`."""
    path = run.workdir / f"{name}.json"
    result = files.read_json(path) if path.exists() else None
    if differing := [] if result is None else stale(run, result.pop(MADE_FROM, {})):
        warnings.warn(
            f"{path} was made from other {', '.join(differing)} than there are now, and "
            f"is left out; run `dtrak-jax {COMMANDS.get(name, name)}` to make it anew.",
            stacklevel=3,
        )
        return None
    return result


def stale(run: "Run", made_from: dict[str, str]) -> list[str]:
    """Returns the parts that are others now than in a result."""
    return [part for part, seen in made_from.items() if fingerprint(run, part) != seen]


def fingerprint(run: "Run", part: str) -> str:
    """Returns the hash of a part of a run.

    It is "model", the main one; "features", those of the training images; "retrained
    models"; or "scores of METHOD".
    """
    if part == "model":
        return run.params_digest()
    if part == "features":
        return str(feature_sets.find(run, "train").relative_to(run.workdir))
    if part == "retrained models":
        return digest(run.outputs.read_bytes()) if run.outputs.exists() else ""
    method, folders = part.removeprefix("scores of "), feature_sets.folders(run.config)
    # Of a method that is asked for no longer, nobody knows the features.
    known = method in METHODS and {*METHODS[method].folders(run.config)} <= {*folders}
    return score_sets.made_from(run, method) if known else ""
