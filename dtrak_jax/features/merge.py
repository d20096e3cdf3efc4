"""Feature stores of different examples, joined into one."""

from collections.abc import Sequence

from etils import epath

from dtrak_jax import files, parallel
from dtrak_jax.checks import check_ids, items
from dtrak_jax.features.fingerprint import EXAMPLES, examples_fingerprint
from dtrak_jax.features.store import Features, Store, concatenated
from dtrak_jax.progress import progress


def merge(
    stores: Sequence[epath.PathLike], into: epath.PathLike
) -> dict[str, Features]:
    """Joins finished stores of different examples, in the order that they are given.

    The result is the store that `featurize` would have made of all the examples
    together, to rounding, and can itself be merged. If interrupted, the same call
    continues. The memory needed is that of one chunk of rows, and of what is kept beside
    features.

    Returns:
      {measurement: features} of all the examples.

    Raises:
      FileNotFoundError: there is no store in one of the folders.
      ValueError: the stores differ in more than their examples (names the field); an
        example is in two of them; their noise is "reference", which follows an
        example's place among all of them; one is unfinished or damaged; or `into`
        holds something else.
    """
    stores = items("stores", stores)
    if not stores:
        raise ValueError("stores is empty; name the folders of one or more stores.")
    sources = [Store.load(folder) for folder in stores]
    metadata = _joined_metadata(stores, [source.metadata for source in sources])
    names = metadata["fingerprint"]["measurements"]
    parts = [source.features(names) for source in sources]
    joined = {name: concatenated([part[name] for part in parts]) for name in names}
    target = Store.open_or_create(into, metadata)
    for chunk in progress(target.missing_chunks(), "merge", unit="chunk"):
        phi = {name: f[..., chunk, :] for name, f in joined.items()}
        norms = {name: f.squared_norms[..., chunk] for name, f in joined.items()}
        losses = next(iter(joined.values())).losses[:, chunk]
        target.write(chunk, phi, norms, losses)
    parallel.barrier(f"finish {into}")
    return target.features(names)


def _joined_metadata(stores: Sequence[epath.PathLike], parts: list[dict]) -> dict:
    """Returns the metadata of all stores together."""
    first, free = parts[0], dict.fromkeys(EXAMPLES)
    fingerprint = first["fingerprint"] | free
    for folder, part in zip(stores, parts, strict=True):
        differs = files.differences(fingerprint, part["fingerprint"] | free)
        if differs:
            raise ValueError(
                f"the stores {stores[0]} (there) and {folder} (here) cannot be merged: "
                f"{differs[0]}."
            )
    if fingerprint["noise"] == "reference":
        raise ValueError(
            'features with noise "reference" cannot be merged: their noise follows an '
            "example's place among all of them. Featurize all examples in one store."
        )
    hashes = {
        field: first[field] and [value for part in parts for value in part[field]]
        for field in EXAMPLES
    }
    n = len(hashes["ids"])
    check_ids(hashes["ids"], n)
    *pairs, _, k = first["shape"]
    return {
        "fingerprint": fingerprint | examples_fingerprint(hashes),
        "shape": [*pairs, n, k],
        "pairs": first["pairs"],
        "rows_per_chunk": first["rows_per_chunk"],
        "role": first.get("role"),
    } | hashes
