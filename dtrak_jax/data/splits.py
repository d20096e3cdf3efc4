"""Choices of examples, which depend on a seed and on ids, and on nothing else.

A choice uses no random number generator, so that it stays the same under every version
of NumPy and JAX, and no positions, so that the order of a data set does not matter.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dtrak_jax.checks import alike, check_ids
from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.sources import open_source, open_validation
from dtrak_jax.digests import digest


class Splits(NamedTuple):
    """The training images and the validation images.

    They are disjoint by id, but for validation images from a folder of their own.
    """

    train: Dataset
    validation: Dataset

    def columns(self) -> dict[str, np.ndarray]:
        """Returns ids, labels, captions, groups, digests and stamps of all: splits.npz."""
        # Those of validation images may have further ones behind.
        names = max(self.train.label_names, self.validation.label_names, key=len)
        columns = {"label_names": np.array(names, str)}
        for role, images in self._asdict().items():
            described = images.columns()
            described |= {"stamps": images.stamps, "digests": images.digests}
            described["pool"] = np.array(images.pool)
            columns |= {f"{role}_{name}": column for name, column in described.items()}
        return columns

    def recorded_in(
        self, saved: dict[str, np.ndarray], deciding: Sequence[str] = ()
    ) -> "Splits":
        """Returns the images, which must be those of `columns`; see `Dataset`."""
        roles = self._asdict().items()
        return Splits(*(images.recorded_in(saved, r, deciding) for r, images in roles))


def load(
    config: DataConfig,
    size: int,
    channels: int,
    saved: Mapping[str, np.ndarray] | None = None,
) -> Splits:
    """Chooses the images that a configuration asks for; none is decoded yet.

    Both choices are functions of `config.seed`, ids and labels, and give every label
    its share (`choose`). Validation images come from `config.validation_folder` if it
    is set, from `config.validation_split` where the source has splits, and from the
    same examples as training images otherwise; an example whose id a training image
    has is never one, but in a folder of their own. If `config.train` is 0, validation
    images are chosen first, and all that they leave are training images. Images are
    ordered as in their source and never mirrored: mirroring belongs to training. Those of
    `saved`, the `Splits.columns` of an earlier choice by the same settings, are chosen
    again if the source has the same ids, also where labels were corrected since.

    Raises:
      ValueError: a source, split, label, group or file is missing or wrong, or there
        are too few examples.
    """
    pool = _labelled(config, open_source(config, config.train_split, size, channels))
    take = functools.partial(_choose, config, saved or {})
    if config.validation_folder:
        validation = open_validation(config, size, channels).named_as(pool.label_names)
        train = take("train", pool)
        return Splits(train, take("validation", validation))
    apart, split = pool, config.validation_split
    if config.has_splits and config.validation and split != config.train_split:
        apart = _labelled(config, open_source(config, split, size, channels))
    if config.train:
        train = take("train", pool)
        return Splits(train, take("validation", apart, besides=train))
    validation = take("validation", apart)
    return Splits(take("train", pool, besides=validation), validation)


def _labelled(config: DataConfig, source: Dataset) -> Dataset:
    """Returns the examples that have one of `config.labels`; without any, all.

    A number may be the index of a label where the source is tfds, unless labels are
    named by numbers themselves; a note says which label it is.
    """
    names = tuple(map(str, config.labels))
    if not names:
        return source
    if source.labels is None:
        raise ValueError(f"data.labels is {names}, but these images have no labels.")
    numbers = {name: number for number, name in enumerate(source.label_names)}
    allowed, notes = ", ".join(numbers), source.notes
    if config.source == "tfds" and not any(map(str.isdecimal, numbers)):
        allowed += f"; or a number from 0 to {len(numbers) - 1}"
        notes += tuple(
            f"data.labels has {name!r}, the number of {source.label_names[int(name)]!r}."
            for name in names
            if name.isdecimal() and int(name) < len(numbers)
        )
        numbers |= {str(number): number for number in range(len(numbers))}
    for name in names:
        if name not in numbers:
            near = alike(name, numbers)
            hint = f" (did you mean {near}?)" if near else ""
            raise ValueError(
                f"data.labels has {name!r}{hint}; it must be one of: {allowed}."
            )
    chosen = [numbers[name] for name in names]
    kept = source.take(np.flatnonzero(np.isin(source.labels, chosen)))
    return replace(kept, notes=notes)


def _choose(
    config: DataConfig,
    saved: Mapping[str, np.ndarray],
    role: str,
    pool: Dataset,
    besides: Dataset | None = None,
) -> Dataset:
    """Returns the examples out of `pool` that are to have a role, but for `besides`."""
    if besides is not None:
        pool = pool.take(np.flatnonzero(~np.isin(pool.ids, besides.ids)))
    count = getattr(config, role)
    if not count and (role == "train" or config.validation_folder):
        count = len(pool)
        if not count:
            raise ValueError(
                f"data.{role} is 0, which takes all examples, but data.validation="
                f"{config.validation} leaves none."
            )
    if count > len(pool):
        labels = f" with data.labels={config.labels}" if config.labels else ""
        apart = " that are not training images" if besides is not None else ""
        if role == "validation" and config.validation_folder:
            labels, apart = "", f" in {config.validation_folder}; 0 takes all"
        raise ValueError(
            f"data.{role} is {count}, but there are only {len(pool)} examples"
            f"{labels}{apart}."
        )
    source = digest(*pool.ids.tolist())
    if str(saved.get(f"{role}_pool")) == source:
        rows = np.flatnonzero(np.isin(pool.ids, saved[f"{role}_ids"]))
    else:
        rows = choose(pool.ids, pool.labels, count, config.seed, role)
    return replace(pool.take(rows), pool=source)


def choose(
    ids: Sequence[str] | np.ndarray,
    labels: Sequence | np.ndarray | None,
    count: int,
    seed: int,
    stream: str,
) -> np.ndarray:
    """Returns the indices of `count` examples, ascending, with its share of every label.

    If m of n examples have a label, floor(count * m / n) with that label are chosen,
    or one more: the labels with the largest remainders get one more until
    the total is `count` (Hamilton's method, as in scikit-learn's stratified splits).
    Within a label the examples with the smallest hashes are chosen, and equal
    remainders are ordered by a hash of the label. The hash is blake2b of 8 bytes of
    "{seed}/{stream}/{id}".

    Args:
      ids: n different strings.
      labels: [n] integers or strings; None chooses by hash alone.
      count: the number of examples to choose, from 0 to n.
      seed: any integer.
      stream: the name of the choice; choices of different names are independent.
    """
    n = len(ids)
    check_ids(ids, n)
    labels = np.zeros(n, int) if labels is None else np.asarray(labels)
    kinds, kind, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares, remainders = np.divmod(count * sizes, max(n, 1))
    ties = _hash(f"{seed}/{stream}/label", kinds)
    shares[np.lexsort((ties, -remainders))[: count - shares.sum()]] += 1

    order = np.lexsort((_hash(f"{seed}/{stream}", ids), kind))
    rank = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[rank < np.repeat(shares, sizes)])


def subset_mask(
    ids: Sequence[str] | np.ndarray,
    labels: Sequence | np.ndarray | None,
    seed: int,
    member: int,
    fraction: float = 0.5,
) -> np.ndarray:
    """Returns a mask, bool [n], of the examples that a member of an ensemble trains on.

    Subsets are independent stratified choices (`choose`) of round(fraction * n)
    examples, of the ensemble's seed and the member's number alone.
    """
    mask = np.zeros(len(ids), bool)
    count = round(fraction * len(ids))
    mask[choose(ids, labels, count, seed, f"subset/{member}")] = True
    return mask


def _hash(prefix: str, names: Iterable) -> np.ndarray:
    """Returns the hash of each "prefix/name", uint64 [n]."""
    texts = (f"{prefix}/{name}".encode() for name in names)
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
