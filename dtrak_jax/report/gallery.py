"""The strongest training images of some queries, as a notebook shows them."""

from typing import NamedTuple

import numpy as np

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.checks import at_least, check_images
from dtrak_jax.data import from_pixels
from dtrak_jax.report.figures import data_uri
from dtrak_jax.report.page import TEMPLATES

LARGEST = 96
"""The largest height and width of a thumbnail, in pixels."""

PIXELATED = 64
"""Smaller pictures are enlarged without smoothing."""


class Gallery(NamedTuple):
    """A table of pictures, which a notebook shows where it is a cell's last value."""

    title: str
    html: str

    def __repr__(self) -> str:
        return f"{self.title}; a notebook shows the pictures"

    def _repr_html_(self) -> str:
        return self.html


def gallery(scores: Scores, images, queries, top: int, count: int) -> Gallery:
    """Returns the `top` training images of the first `count` queries, with scores.

    Images and queries are those that were scored, in their order: arrays in [-1, 1] or
    of uint8, or data sets. Else it is a ValueError.
    """
    train = _pictures("images", images, scores.train_ids)
    query_images = _pictures("queries", queries, scores.query_ids)
    # Copies of a picture are shown once.
    pictures = scores.merged()
    train = train[scores.picture_rows]
    strongest = pictures.top(min(at_least("top", top, 1), len(train)))
    rows = []
    for i in range(min(at_least("count", count, 1), len(query_images))):
        row = [_figure(query_images[i], scores.query_ids[i], "")]
        columns = (column[i] for column in strongest)
        for name, score, index, error in zip(*columns, strict=True):
            text = f"{score:.3g}"
            if np.isfinite(error):
                text += f" ± {error:.2g}"
            row.append(_figure(train[index], name, text))
        rows.append(row)
    title = f"Gallery({len(rows)} queries × {strongest.ids.shape[1]} images)"
    template = TEMPLATES.get_template("gallery.html")
    return Gallery(title, template.render(method=scores.method, rows=rows))


def _pictures(name: str, images, ids: np.ndarray) -> np.ndarray:
    """Returns images in [-1, 1], one for each id."""
    images = np.asarray(getattr(images, "images", images))
    if images.dtype == np.uint8:
        images = from_pixels(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) != len(ids):
        raise ValueError(
            f"{name} have shape {images.shape}; they must be pictures of the "
            f"{len(ids)} that were scored, [{len(ids)}, height, width, 1 or 3]."
        )
    return check_images(images)


def _figure(image: np.ndarray, name: str, text: str) -> tuple[str, str, str, bool]:
    """Returns the source of a picture, its id, a text, and whether to enlarge it."""
    return data_uri(image, LARGEST), name, text, max(image.shape) < PIXELATED
