"""The functions of a user that train a model without some examples and ask it."""

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from dtrak_jax.checks import function, instance
from dtrak_jax.evaluation.removals import Removal
from dtrak_jax.evaluation.trust import checked

SAME = 0.01
"""The difference that rounding may make between two calls of `generate`, in units of the
originals' standard deviation."""


class Functions(NamedTuple):
    """The functions of a user that make pictures without some examples."""

    train: Callable[[np.ndarray, int], Any]
    generate: Callable[[Any, np.ndarray], np.ndarray]
    losses: Callable[[Any], np.ndarray] | None
    version: str

    def check(self, embeddings: Mapping[str, Callable] | None) -> None:
        """Raises a TypeError unless these and the embeddings are functions, and a
        ValueError of an embedding's name that is taken."""
        instance("version", self.version, str)
        instance("embeddings", embeddings, Mapping, NoneType)
        if "pixels" in (embeddings or {}):
            raise ValueError(
                "embeddings has the name 'pixels', which is that of the pictures "
                "themselves; take another one."
            )
        functions = {f"embeddings[{n!r}]": f for n, f in (embeddings or {}).items()}
        functions |= {"train": self.train, "generate": self.generate}
        functions |= {"losses": self.losses} if self.losses is not None else {}
        for name, value in functions.items():
            function(name, value)

    @property
    def made_from(self) -> dict[str, np.ndarray]:
        """The part of them that a store compares: the version, and what the losses are
        of, as far as it is known, or "" without losses."""
        measured = getattr(self.losses, "made_from", "losses") if self.losses else ""
        return {"measured": np.array(measured), "version": np.array(self.version)}

    def make(
        self, model: Removal, originals: np.ndarray, rows: np.ndarray, again: bool
    ) -> dict[str, np.ndarray]:
        """Trains a model; returns the pictures, and the losses, of some of all queries.

        `again` generates the pictures twice, and refuses a function that is random.
        """
        trained = self.train(model.rows.copy(), model.seed)
        images = self.pictures(trained, originals, rows)
        if again:
            _check_same(images, self.pictures(trained, originals, rows), originals)
        made = {"images": images}
        if self.losses is not None:
            values = checked(model.choice.name, self.losses(trained), originals)
            made["losses"] = values[rows]
        return made

    def pictures(
        self, trained: Any, originals: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Returns what a model generates, once its shape and values are checked."""
        images = np.asarray(self.generate(trained, rows.copy()))
        shape = (len(rows), *originals.shape[1:])
        check_pictures("what generate returns", images, shape)
        return images


def check_pictures(name: str, images: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless pictures have a shape and finite values."""
    if images.shape != shape or images.ndim < 2:
        raise ValueError(
            f"{name} have shape {images.shape}; it must be {list(shape)}, a picture for "
            "each query."
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{name} have values that are not finite.")


def _check_same(first: np.ndarray, second: np.ndarray, originals: np.ndarray) -> None:
    """Raises a ValueError if two calls of `generate` with one model differ."""
    difference = np.sqrt(np.mean(np.square(np.subtract(second, first, dtype=float))))
    spread = np.std(originals, dtype=float)
    if difference > SAME * spread:
        raise ValueError(
            "generate is random: two calls with the same model and positions made "
            f"pictures that differ by {difference:.3g} in root mean square (the "
            f"originals' standard deviation is {spread:.3g}). Changes by removal would "
            "drown in that: make each picture from the seed of its original."
        )
