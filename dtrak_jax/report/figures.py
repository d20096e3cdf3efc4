"""Pictures that live inside the page: PNG data URIs and inline SVG."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dtrak_jax.data import to_picture, to_pixels

SUPPORT, OPPOSE, INK, FAINT = "#0000a1", "#0000a2", "#0000a3", "#0000a4"
"""Stand-ins, which `inline` turns into colours of page.css, light or dark."""

CSS_COLOURS = {
    SUPPORT: "var(--support)",
    OPPOSE: "var(--oppose)",
    INK: "currentColor",
    FAINT: "var(--faint)",
}

STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

LEGEND_ENTRIES = 8


def data_uri(image: np.ndarray, largest: int = 128) -> str:
    """An image [H, W, 1 or 3] in [-1, 1] as the URI of a PNG.

    Args:
      image: the pixels.
      largest: height and width are scaled down to at most this.
    """
    picture = to_picture(to_pixels(image))
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def training_curve(metrics: Sequence[dict]) -> str:
    """Loss over steps, with the learning rate faintly behind it.

    Args:
      metrics: one or more lines of metrics.jsonl.
    """
    steps = [line["step"] for line in metrics]

    def draw(axes: Axes) -> None:
        rate = axes.twinx()
        rates = [line["learning_rate"] for line in metrics]
        rate.plot(steps, rates, color=FAINT, linewidth=1, linestyle="--")
        rate.set_ylim(0)
        rate.set_ylabel("learning rate (dashed)")
        rate.ticklabel_format(style="sci", scilimits=(-2, 3), axis="y")
        rate.spines["right"].set_visible(True)
        losses = [line["loss"] for line in metrics]
        axes.plot(steps, losses, "." if len(steps) == 1 else "-", color=SUPPORT)
        axes.set(xlabel="step", ylabel="mean loss since the last point", yscale="log")
        axes.set_zorder(rate.get_zorder() + 1)
        axes.set_facecolor("none")

    first, last = metrics[0], metrics[-1]
    return inline(
        draw,
        f"Training loss, from {first['loss']:.3g} at step {first['step']} to "
        f"{last['loss']:.3g} at step {last['step']}",
    )


def score_histogram(scores: np.ndarray, name: str) -> str:
    """How often each value occurs, on a logarithmic scale; bins meet at 0.

    Args:
      scores: of any shape.
      name: whose scores these are.
    """
    largest = float(np.abs(scores).max()) or 1.0
    counts, edges = np.histogram(scores, np.linspace(-largest, largest, 81))

    def draw(axes: Axes) -> None:
        half = len(counts) // 2
        # From 1/2, so that a bin with one score is seen on the logarithmic scale.
        options = {"fill": True, "baseline": 0.5}
        axes.stairs(counts[:half], edges[: half + 1], color=OPPOSE, **options)
        axes.stairs(counts[half:], edges[half:], color=SUPPORT, **options)
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.set(xlabel="score", ylabel="pairs", yscale="log", ylim=(0.5, None))

    return inline(
        draw,
        f"Histogram of the scores of {name}, from {scores.min():.3g} to "
        f"{scores.max():.3g}, {np.mean(scores > 0):.0%} of them positive",
    )


def spectrum(
    eigenvalues: np.ndarray, lambdas: np.ndarray, kernels: Sequence[str], name: str
) -> str:
    """Eigenvalues by rank, a line for each kernel, with a dot where lambda is.

    Args:
      eigenvalues: ascending [kernels, m].
      lambdas: [kernels].
      kernels: their names.
      name: whose kernels these are.
    """
    # Spread over the kernels, first and last among them.
    named = np.linspace(0, len(kernels) - 1, min(LEGEND_ENTRIES, len(kernels)))
    named = set(np.round(named).astype(int))
    colours = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.8, len(kernels)))
    ranks = np.arange(1, eigenvalues.shape[1] + 1)

    def draw(axes: Axes) -> None:
        for i, (values, value) in enumerate(zip(eigenvalues, lambdas, strict=True)):
            shown = np.where(values > 0, values, np.nan)[::-1]
            label = kernels[i] if i in named else None
            axes.plot(ranks, shown, color=colours[i], label=label)
            crossing = max(1, int(np.sum(values > value)))
            axes.plot(crossing, value, "o", color=colours[i], markersize=5)
        axes.plot([], [], "o", color=INK, markersize=5, label="λ")
        axes.set(xlabel="rank", ylabel="eigenvalue", xscale="log", yscale="log")
        # What is below is rounding errors of float32 features.
        floor = np.finfo(np.float32).eps * eigenvalues[:, -1].min()
        axes.set_ylim(min(floor, lambdas.min() / 2), 2 * eigenvalues.max())
        axes.legend(loc="lower left")

    return inline(draw, f"Eigenvalues of the kernels of {name}, by rank")


def captioned(content: str, caption: str) -> str:
    """A <figure>; both arguments are HTML."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def inline(draw: Callable[[Axes], None], alt: str, height: float = 3.2) -> str:
    """What `draw` draws, as an <svg> element that follows the page's colours.

    Args:
      draw: draws on the axes that it gets.
      alt: what the figure shows; no two in a page may have the same.
      height: in inches; the width is 5.4.
    """
    buffer = io.StringIO()
    # Ids are hashes: salted by what is in the figure, no two figures share one.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": alt}):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Groups' ids would repeat in the page, and a style would reach all of it.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->|\n\s*", " ", svg, flags=re.DOTALL)
    for colour, css in CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
