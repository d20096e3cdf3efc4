"""Pictures by known hands: real digits, drawn again in the style of a contributor."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.preprocess import Picture

SIZE = 64
"""The height and width at which a picture is drawn."""

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

CONTRAST = 100
"""The least difference of ink and ground in grey, of 255, in a style at random."""

GREY = np.array([0.299, 0.587, 0.114])
"""The shares of red, green and blue in grey (ITU-R 601)."""

Colour = tuple[int, int, int]
Prepare = Callable[[Image.Image], Picture]


class Hand(NamedTuple):
    """The style of a contributor."""

    ink: Colour
    ground: Colour
    slant: float
    """The horizontal shift per row; 0 is upright, and positive leans to the right."""
    threshold: float
    """The grey value, from 0 to 1, at which ink begins: the smaller, the thicker."""


HANDS = {
    "ada": Hand((150, 20, 30), (245, 235, 215), 0.35, 0.30),
    "ben": Hand((20, 50, 150), (225, 235, 250), 0.0, 0.62),
    "cleo": Hand((245, 240, 230), (40, 90, 60), -0.35, 0.38),
    "dov": Hand((250, 210, 60), (60, 30, 80), 0.0, 0.28),
    "eva": Hand((30, 30, 30), (240, 170, 120), 0.2, 0.55),
}
"""The style of every contributor."""


def hands(prepare: Prepare, groups: Sequence[str] = ()) -> Dataset:
    """Returns half of scikit-learn's digits, each drawn by one of `HANDS`.

    The picture of a three by ada has the caption "the digit three by ada", and ada in
    the column "contributor", the only one that `groups` may name.
    """
    order = _shuffled()
    rows = np.sort(order[1::2])
    # The digits come in a regular order, which is not to tell the hand.
    names = [list(HANDS)[order[row] % len(HANDS)] for row in rows]
    dataset = _drawn(rows, [HANDS[name] for name in names], prepare)
    captions = [f"{c} by {n}" for c, n in zip(dataset.captions, names, strict=True)]
    return replace(
        dataset,
        ids=np.array([f"digit-{row:04d}" for row in rows]),
        captions=np.array(captions),
        groups={column: np.array(names) for column in groups},
    )


def plain_pictures(prepare: Prepare, count: int) -> Dataset:
    """Returns pictures of the other half, each in a style of its own, at random.

    Their captions are like "the digit three". After the 899th the same digits come
    again, in other styles.
    """
    rows = np.resize(np.sort(_shuffled()[::2]), count)
    return _drawn(rows, [_style(i) for i in range(count)], prepare)


def _shuffled() -> np.ndarray:
    """Returns the indices of scikit-learn's digits, the same at every call."""
    return np.random.default_rng(0).permutation(1797)


def _drawn(rows: np.ndarray, styles: list[Hand], prepare: Prepare) -> Dataset:
    """Returns pictures of the digits with these indices, each in its style."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    targets = digits.target[rows].astype(int)
    return Dataset(
        ids=np.array([f"plain-{i:05d}" for i in range(len(rows))]),
        read=lambda i: prepare(draw(digits.images[rows[i]] / 16, styles[i])),
        labels=targets,
        label_names=tuple(WORDS),
        captions=np.array([f"the digit {WORDS[target]}" for target in targets]),
    )


def draw(strokes: np.ndarray, hand: Hand) -> Image.Image:
    """Returns a picture of strokes, [8, 8] from 0 to 1, in the style of a hand."""
    grey = Image.fromarray(strokes.astype(np.float32)).resize((SIZE, SIZE))
    shear = (1, hand.slant, -hand.slant * SIZE / 2, 0, 1, 0)
    method, resample = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    grey = np.asarray(grey.transform((SIZE, SIZE), method, shear, resample))
    ink = 1 / (1 + np.exp(-14 * (grey[..., None] - hand.threshold)))
    pixels = ink * np.array(hand.ink) + (1 - ink) * np.array(hand.ground)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _style(seed: int) -> Hand:
    """Returns a style at random, in which the ink is seen on the ground."""
    rng = np.random.default_rng(seed)
    ink = ground = np.zeros(3, int)
    while abs((ink - ground) @ GREY) < CONTRAST:
        ink, ground = rng.integers(0, 256, (2, 3))
    slant, threshold = rng.uniform(-0.4, 0.4), rng.uniform(0.25, 0.65)
    return Hand(tuple(ink.tolist()), tuple(ground.tolist()), slant, threshold)
