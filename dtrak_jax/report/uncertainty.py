"""Uncertainty: the error that is shown beside a score, and what it is."""

import numpy as np

from dtrak_jax.attribution.duplicates import COUNTED_ONCE
from dtrak_jax.attribution.scores import Groups, Scores
from dtrak_jax.report.features import measurement
from dtrak_jax.report.record import Recipe


def uncertainty(scores: Scores, recipe: Recipe | None) -> tuple[np.ndarray, str]:
    """Returns the errors of scores, NaN where there are none [q, n], and a sentence on
    what they are, without a full stop.

    They are the standard errors over noise draws; without these, the standard deviation
    of several models' scores, if there are several.
    """
    errors, spread = scores.errors, scores.spread
    has_errors = bool(np.isfinite(errors).any())
    if has_errors:
        text = f"± standard error ({scores.freedom:.2g} degrees of freedom)"
        if spread is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.nanmedian(spread / errors)
            text += f"; models differ by {ratio:.2g} times that"
        return errors, text
    if spread is not None:
        return spread, "± the standard deviation of several models' scores"
    return errors, f"No errors: {_reason(scores.method, recipe)}"


def group_uncertainty(scores: Scores, groups: Groups, recipe: Recipe | None) -> str:
    """Returns a sentence on what the errors of groups are, or why some have none."""
    known = np.isfinite(groups.errors).all(axis=0)
    if not np.isfinite(scores.errors).any():
        return f"No errors: {_reason(scores.method, recipe)}"
    why = "they were not among the groups that were scored"
    if scores.method in COUNTED_ONCE and scores.copies is not None:
        why = "copies of a picture count once in a group"
    if not known.any():
        return f"No errors: {why}"
    freedom = f" ({groups.freedom:.2g} degrees of freedom)" if groups.freedom else ""
    text = f"± standard error of the sum{freedom}"
    return text if known.all() else f"{text}; some groups have none: {why}"


def _reason(method: str, recipe: Recipe | None) -> str:
    """Returns why scores have no errors."""
    if measurement(method) is None:
        return "this method draws no noise"
    if recipe is None:
        return "nothing tells them"
    if not recipe.per_timestep:
        return "features are averaged over draws"
    return "one draw" if recipe.draws == 1 else "nothing tells them"
