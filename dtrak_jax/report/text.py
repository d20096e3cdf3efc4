"""Names, numbers and tables as people read them."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from dtrak_jax.config import SQUARED

NAMES = {
    "dtrak": "D-TRAK",
    "trak": "TRAK",
    "kernel-mean": "mean",
    "kernel-l1": "L1",
    "kernel-l2": "L2",
    "kernel-linf": "L∞",
    "kernel-elbo": "ELBO",
    "gradient-dot": "gradient dot",
    "gradient-cosine": "gradient cosine",
    "tracin": "TracInCP",
    "gas": "GAS",
    "relative-influence": "relative influence",
    "renormalised-influence": "renormalised influence",
    "journey-trak": "Journey TRAK",
    "pixel-dot": "pixel dot",
    "pixel-cosine": "pixel cosine",
    "random": "random",
    "trak-ensemble": "TRAK ensemble",
    "dtrak-ensemble": "D-TRAK ensemble",
    "empirical-influence": "empirical influence",
    "datamodels": "datamodels",
    "constant": "constant",
    "everything": "all data, same seed",
    "other-seed": "all data, other seed",
}
"""Methods and controls by the names that their papers give them."""


def method_name(method: str) -> str:
    """How a method is called; one that has no name here is called what it is."""
    name = method.removesuffix(SQUARED)
    return NAMES.get(name, name) + (" squared" if name != method else "")


def capitalized(text: str) -> str:
    """With a capital letter first; the others stay as they are."""
    return text[:1].upper() + text[1:]


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def number(value: float | None, sign: str = "") -> str:
    """Three decimals, or a dash for what is not known; "+" as sign shows it always."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{sign}z.3f}".replace("-", "−")


def between(low: float | None, high: float | None) -> str:
    """An interval in brackets; a dash if it is not known."""
    ends = number(low), number(high)
    return "–" if "–" in ends else "[{}, {}]".format(*ends)


def damping(value: float | Sequence[float] | None) -> str:
    """One λ, or those of the halves; a dash for methods without."""
    if value is None:
        return "–"
    values = value if isinstance(value, Sequence) else [value]
    return ", ".join(f"{one:.3g}" for one in values)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A <table> that scrolls when it is wider than the page.

    Args:
      caption: what it shows, plain text.
      head: of the columns, plain text.
      rows: cells, plain text; the first one names its row.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    # In the tab order, as keyboards could not scroll it otherwise.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
