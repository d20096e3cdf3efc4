"""The strongest training images of some queries, as a notebook shows them."""

from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.checks import at_least, check_images
from dtrak_jax.data import from_pixels
from dtrak_jax.report.figures import data_uri

LARGEST = 96
"""The largest height and width of a thumbnail, in pixels."""

SMALLEST = 64
"""The height at which smaller thumbnails are shown, in pixels."""

FIGURE = Markup(
    '<td style="text-align:center;vertical-align:top;padding:4px;max-width:112px;'
    'overflow-wrap:anywhere">'
    '<img src="{}" alt="{}" style="min-height:{}px;image-rendering:{}"><br>'
    "<small>{}</small></td>"
)

NOTE = Markup(
    "<p><small>{} scores; each query first, then its strongest training images. Scores "
    "are comparable within a row only.</small></p>"
)


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
    asked = _pictures("queries", queries, scores.query_ids)
    strongest = scores.top(min(at_least("top", top, 1), len(train)))
    rows = []
    for i in range(min(at_least("count", count, 1), len(asked))):
        cells = [_figure(asked[i], scores.query_ids[i], "")]
        for name, score, index in zip(*(column[i] for column in strongest)):
            cells.append(_figure(train[index], name, f"{score:.3g}"))
        rows.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    table = Markup("<table>{}</table>").format(Markup("").join(rows))
    title = f"Gallery({len(rows)} queries × {strongest.ids.shape[1]} images)"
    return Gallery(title, str(NOTE.format(scores.method) + table))


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


def _figure(image: np.ndarray, name: str, text: str) -> Markup:
    """Returns a cell with a picture, its id and a text."""
    scaling = "pixelated" if max(image.shape) < SMALLEST else "auto"
    label = Markup("{}<br>{}").format(name, text)
    return FIGURE.format(data_uri(image, LARGEST), name, SMALLEST, scaling, label)
