"""Names and numbers as people read them, and rows by what they have in common."""

import math
from collections.abc import Callable, Iterable, Sequence

from dtrak_jax.methods import METHODS

CONTROLS = {
    "constant": "constant",
    "random": "random",
    "everything": "all data, same seed",
    "other-seed": "all data, other seed",
}
"""Labels of what methods are compared with, in the order in which they are shown."""


def method_name(method: str) -> str:
    """Returns the label of a method, control or removal by one, such as "TRAK set"; an
    unknown name is its own label."""
    name, _, rule = method.rpartition("-")
    if rule in ("squared", "set"):
        return f"{method_name(name)} {rule}"
    return CONTROLS.get(method) or (
        METHODS[method].label if method in METHODS else method
    )


def capitalized(text: str) -> str:
    """Returns the text with a capital first letter; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def listed(parts: Sequence[str]) -> str:
    """Returns "a", "a and b", or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def grouped(items: Iterable, key: Callable) -> dict:
    """Returns {key of an item: all items with that key}, in their order."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def number(value: float | None, sign: str = "") -> str:
    """Returns three decimals, or a dash for None and NaN; sign "+" is always shown."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{sign}z.3f}".replace("-", "−")


def between(low: float | None, high: float | None) -> str:
    """Returns an interval in brackets, or a dash if an end is None or NaN."""
    ends = number(low), number(high)
    return "–" if "–" in ends else "[{}, {}]".format(*ends)


def signed(score: float) -> str:
    """Returns a score with its sign and three significant digits."""
    return f"{score:+#.3g}".removesuffix(".").replace("-", "−")


def plus_minus(error: float) -> str:
    """Returns an error with two significant digits behind ±; "" for NaN."""
    return "" if math.isnan(error) else f"± {error:#.2g}".removesuffix(".")


def correlation(value: float) -> str:
    """Returns a correlation with two decimals; NaN is "undefined"."""
    return "undefined" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")


def damping(value: float | Sequence[float] | None) -> str:
    """Returns one λ, or those of the halves; a dash for methods without a kernel."""
    values = value if isinstance(value, Sequence) else [value]
    return "–" if value is None else ", ".join(map("{:.3g}".format, values))
