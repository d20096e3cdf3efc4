"""Feature stores of different examples, joined into one."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorstore as ts
from etils import epath
from tqdm import tqdm

from dtrak_jax import files, parallel
from dtrak_jax.features.fingerprint import EXAMPLES, FORMAT, examples_fingerprint
from dtrak_jax.features.store import Features, Store


def merge(
    stores: Sequence[epath.PathLike], into: epath.PathLike
) -> dict[str, Features]:
    """Joins finished stores of different examples, in the order that they are given.

    The result is the store that `featurize` would have made of all the examples
    together, to rounding, and can itself be merged. The stores stay as they are. If
    interrupted, the same call continues; the memory needed is that of one chunk of rows,
    and of what is kept beside features.

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
    metadata = _joined_metadata(stores, [source.metadata for source in sources])
    names = metadata["fingerprint"]["measurements"]
    parts = [source.features(names) for source in sources]
    joined = {name: _concatenated([part[name] for part in parts]) for name in names}
    target = Store.open_or_create(into, metadata)
    for chunk in tqdm(target.missing_chunks(), "merge", unit="chunk", disable=None):
        phi = {name: features.rows(chunk) for name, features in joined.items()}
        norms = {name: f.squared_norms[..., chunk] for name, f in joined.items()}
        losses = next(iter(joined.values())).losses[:, chunk]
        target.write(chunk, phi, norms, losses)
    parallel.barrier(f"finish {into}")
    return target.features(names)


def _concatenated(parts: list[Features]) -> Features:
    """Returns the features of all examples, to be read where they are."""
    return dataclasses.replace(
        parts[0],
        ids=tuple(name for part in parts for name in part.ids),
        phi=ts.concat([part.phi for part in parts], axis=-2),
        squared_norms=np.concatenate([part.squared_norms for part in parts], axis=-1),
        losses=np.concatenate([part.losses for part in parts], axis=1),
    )


def _joined_metadata(stores: Sequence[epath.PathLike], parts: list[dict]) -> dict:
    """Returns the metadata of all stores together."""
    first, *_ = settings = [
        {k: v for k, v in part["fingerprint"].items() if k not in EXAMPLES}
        for part in parts
    ]
    for folder, setting in zip(stores, settings, strict=True):
        differs = files.differences(first, setting)
        if differs:
            raise ValueError(
                f"the stores {stores[0]} (there) and {folder} (here) cannot be merged: "
                f"{differs[0]}."
            )
    if first["format"] != FORMAT:
        raise ValueError(
            f"the stores are of format {first['format']}, which cannot be merged; "
            f"run featurize again, which makes format {FORMAT}."
        )
    if first["noise"] == "reference":
        raise ValueError(
            'features with noise "reference" cannot be merged: their noise follows an '
            "example's place among all of them. Featurize all examples in one store."
        )
    folder_of: dict[str, epath.PathLike] = {}
    for folder, part in zip(stores, parts, strict=True):
        for name in part["ids"]:
            if name in folder_of:
                raise ValueError(
                    f"the example {name!r} is in {folder_of[name]} and in {folder}; "
                    "merge stores of different examples."
                )
            folder_of[name] = folder
    hashes = {
        field: parts[0][field] and [value for part in parts for value in part[field]]
        for field in EXAMPLES
    }
    *pairs, _, k = parts[0]["shape"]
    return {
        "fingerprint": first | examples_fingerprint(hashes),
        "shape": [*pairs, len(folder_of), k],
        "pairs": parts[0]["pairs"],
        "rows_per_chunk": parts[0]["rows_per_chunk"],
    } | hashes
