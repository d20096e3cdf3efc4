"""Feature stores of different examples, joined into one."""

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

from dtrak_jax import files, parallel
from dtrak_jax.features.fingerprint import EXAMPLES, FORMAT, examples_fingerprint
from dtrak_jax.features.store import Features, Store


def merge(
    stores: Sequence[epath.PathLike], into: epath.PathLike
) -> dict[str, Features]:
    """Joins finished stores of different examples, in the order that they are given.

    What comes out is the store that `featurize` would have made of all the examples
    together, to rounding, and it goes on to be one: more can be merged with it. The
    stores stay as they are. Interrupted, the same call continues; the memory needed is
    that of one chunk of rows, and of what is kept beside features.

    Args:
      stores: their folders, on a local disk or on gs://.
      into: folder of the new store.

    Returns:
      {measurement: features} of all the examples.

    Raises:
      FileNotFoundError: there is no store in one of the folders.
      ValueError: the stores differ in more than their examples (names the field); an
        example is in two of them; their noise is "reference", which follows an
        example's place among all of them; one is unfinished or damaged; or `into`
        holds something else.
    """
    if not stores:
        raise ValueError("stores is empty; name the folders of one or more stores.")
    sources = [Store.load(folder) for folder in stores]
    metadata = _joined(stores, [source.metadata for source in sources])
    names = metadata["fingerprint"]["measurements"]
    parts = [{name: source.features(name) for name in names} for source in sources]
    target = Store.open_or_create(into, metadata)
    mine = target.my_missing_chunks(into)
    for chunk in tqdm(mine, "merge", unit="chunk", disable=None):
        target.write(chunk, *_rows(parts, chunk))
    parallel.wait_for_all(f"finish {into}")
    return {name: target.features(name) for name in names}


def _joined(stores: Sequence[epath.PathLike], parts: list[dict]) -> dict:
    """The metadata of all stores together."""
    settings = [
        {k: v for k, v in part["fingerprint"].items() if k not in EXAMPLES}
        for part in parts
    ]
    for folder, here in zip(stores, settings, strict=True):
        differs = files.differences(settings[0], here)
        if differs:
            raise ValueError(
                f"the stores {stores[0]} (there) and {folder} (here) cannot be merged: "
                f"{differs[0]}."
            )
    if settings[0]["format"] != FORMAT:
        raise ValueError(
            f"the stores are of format {settings[0]['format']}, which cannot be merged; "
            f"run featurize again, which makes format {FORMAT}."
        )
    if settings[0]["noise"] == "reference":
        raise ValueError(
            'features with noise "reference" cannot be merged: their noise follows an '
            "example's place among all of them. Featurize all examples in one store."
        )
    where: dict[str, epath.PathLike] = {}
    for folder, part in zip(stores, parts, strict=True):
        for name in part["ids"]:
            if name in where:
                raise ValueError(
                    f"the example {name!r} is in {where[name]} and in {folder}; merge "
                    "stores of different examples."
                )
            where[name] = folder
    hashes = {
        field: parts[0][field] and [value for part in parts for value in part[field]]
        for field in EXAMPLES
    }
    *pairs, _, k = parts[0]["shape"]
    return (
        parts[0]
        | hashes
        | {
            "fingerprint": settings[0] | examples_fingerprint(hashes),
            "shape": [*pairs, len(where), k],
        }
    )


def _rows(parts: list[dict[str, Features]], chunk: slice) -> tuple:
    """The rows of a chunk, as `Store.write` takes them."""
    found, before = [], 0
    for part in parts:
        count = len(next(iter(part.values())))
        rows = slice(max(chunk.start - before, 0), min(chunk.stop - before, count))
        if rows.start < rows.stop:
            found.append((part, rows))
        before += count

    def joined(axis: int, read: Callable[[Features, slice], np.ndarray], name: str):
        return np.concatenate([read(part[name], rows) for part, rows in found], axis)

    return (
        {m: joined(-2, Features.rows, m) for m in parts[0]},
        {m: joined(-1, lambda f, r: f.squared_norms[..., r], m) for m in parts[0]},
        joined(-1, lambda f, r: f.losses[:, r], next(iter(parts[0]))),
    )
