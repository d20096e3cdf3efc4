"""Pictures inside the page: PNG data URIs and inline SVG.

The only markup that does not come from a template is made here.
"""

import base64
import io
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dtrak_jax.data import to_picture, to_pixels

SUPPORT, OPPOSE, INK, FAINT = "#0000a1", "#0000a2", "#0000a3", "#0000a4"
"""Stand-ins for colours of page.css, which are light or dark."""

CSS_COLOURS = {
    SUPPORT: "var(--support)",
    OPPOSE: "var(--oppose)",
    INK: "currentColor",
    FAINT: "var(--faint)",
}

INKS = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")

STYLE = {
    **dict.fromkeys(INKS, INK),
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
}
"""Settings of matplotlib."""


LOSSLESS = 64
"""The largest height and width of an image that is a PNG where others may be JPEGs."""


def data_uri(image: np.ndarray, largest: int = 128, lossy: bool = False) -> str:
    """Returns an image [H, W, 1 or 3] in [-1, 1] as the data URI of a PNG, scaled down
    to at most `largest` pixels of height and width; `lossy` makes large ones JPEGs."""
    picture = to_picture(to_pixels(image))
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind, options = "png", {"optimize": True}
    if lossy and max(picture.size) > LOSSLESS:
        kind, options = "jpeg", {"quality": 80, "optimize": True}
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def inline(draw: Callable[[Axes], None], alt: str, height: float = 3.2) -> Markup:
    """Returns what `draw` draws as an <svg> element with the colours of the page.

    The height is in inches; the width is 5.4.
    """
    buffer = io.BytesIO()
    # Ids are hashes: salted by what is in the figure, no two figures share one.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": alt}):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = ElementTree.fromstring(buffer.getvalue())
    for element in list(svg.iter()):
        _adapt(element)
    svg.attrib.pop("version")
    svg.attrib = {"role": "img", "aria-label": alt} | svg.attrib
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _adapt(element: ElementTree.Element) -> None:
    """Makes an element of matplotlib's document fit to stand in a page of HTML."""
    # HTML knows what is SVG without namespaces, and href without xlink.
    element.tag = _local(element.tag)
    element.attrib = {_local(name): value for name, value in element.items()}
    if element.tag == "g":
        # Such as "axes_1", which would repeat; ids that are referred to are elsewhere.
        element.attrib.pop("id", None)
    if style := element.get("style"):
        for colour, css in CSS_COLOURS.items():
            style = style.replace(colour, css)
        element.set("style", style)
    # A style would reach all of the page.
    for child in list(element):
        if _local(child.tag) in ("metadata", "style"):
            element.remove(child)
    # matplotlib indents its document.
    if (element.text or "").isspace():
        element.text = None
    if (element.tail or "").isspace():
        element.tail = None


def _local(name: str) -> str:
    """Returns an XML name without its namespace, which ElementTree has in braces."""
    return name.rpartition("}")[2]
