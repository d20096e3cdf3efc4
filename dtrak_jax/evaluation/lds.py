"""The linear datamodeling score of every method: do scores predict what retraining does?"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dtrak_jax import attribution, parallel, results
from dtrak_jax.attribution import predict
from dtrak_jax.evaluation.changes import warn_if_not_remade
from dtrak_jax.evaluation.datamodeling import (
    bootstrap,
    ceiling,
    cross_fitted,
    damping_path,
    from_halves,
    has_halves,
    lds,
    reference_interval,
)
from dtrak_jax.evaluation.statistics import RESAMPLES, Estimate, interval
from dtrak_jax.evaluation.truth import MIN_SUBSETS, RetrainedLosses
from dtrak_jax.methods import METHODS
from dtrak_jax.progress import progress

if TYPE_CHECKING:
    from dtrak_jax.run import Run

OF_TRANSFORM = {"linear": [], "squared": ["squared"], "exact": ["exact"]}
"""The words that follow a method's name where it predicts by other than sums of scores."""


def evaluate(run: "Run") -> None:
    """Scores every method against the retrained models, prints and writes lds.json."""
    names = ("subsets", "seeds", "fraction", "timesteps", "draws")
    settings = {name: getattr(run.config.ensemble, name) for name in names}
    result = {
        "settings": settings | {"resamples": RESAMPLES},
        "queries": {
            name: evaluate_queries(run, name, truth)
            for name, truth in run.truth().items()
        },
    }
    methods = run.config.attribution.methods
    parts = ["retrained models", *(f"scores of {name}" for name in methods)]
    results.save(run, "lds", result, parts)
    if parallel.is_main_process():
        print(table(result))
    warn_if_not_remade(run.json("counterfactual"))


def evaluate_queries(run: "Run", queries: str, truth: RetrainedLosses) -> dict:
    """Returns what lds.json says of one set of queries.

    "rows" has every method, by each rule that chooses lambda and squared, that of coverage
    also without adding up, and the controls; "differences" the first method less each
    other one, from resamples that they share; "curves" the LDS over lambda.
    """
    settings, rows, curves, compared = run.config.attribution, [], {}, {}
    names = [name for name in settings.methods if METHODS[name].applies_to(queries)]
    for name in progress(names, f"lds {queries}", unit="method"):
        method = METHODS[name]
        if method.learn:
            if has_halves(truth):
                estimate = from_halves(method.learn, truth)
                rows.append({"method": name} | row(estimate, "halves"))
            continue
        scores, rule = run.scores(name, queries), ()
        if scores.damping:
            by = "effective" if scores.damping.share else "label-free"
            rule = by, scores.damping.value
        compared[name], squared = scored_rows(name, scores.scores, truth, *rule)
        # The scores of a method without a sign are squares already.
        rows += [compared[name][0], squared] if method.signed else [compared[name][0]]
        if method.objective == "coverage":
            exact = exact_row(run, name, queries, truth, *rule)
            compared[f"{name} exact"] = exact
            rows.append(exact[0])
        if method.kernel and settings.solver == "eigh":
            kernels = method.kernels(run)
            query = run.features(queries, method.measurement)
            grid, path = damping_path(kernels, query, truth.masks)
            *fitted, oracle, values = damping_rows(grid, path, truth)
            oracle["reference"] = reference_interval(path[np.argmax(values)], truth)
            rows += [{"method": name} | scored for scored in (oracle, *fitted)]
            curves[name] = {"damping": grid, "lds": values}
    if not has_halves(truth):
        warnings.warn(
            f"{len(truth.masks)} subsets are too few to choose on one half and score on "
            f"the other: LDS that need it are left out, below {2 * MIN_SUBSETS} subsets.",
            stacklevel=2,
        )
    return with_controls(rows, compared, truth) | {"curves": curves}


def with_controls(
    rows: list[dict],
    compared: dict[str, tuple[dict, np.ndarray]],
    truth: RetrainedLosses,
) -> dict:
    """Returns methods' rows with those of the controls, the ceiling and differences."""
    # Subsets of one size give every constant the same sum.
    constant = np.ones((len(truth.query_ids), len(truth.train_ids)))
    estimate, _ = bootstrap(truth.predict(constant), truth)
    rows = [*rows, {"method": "constant"} | row(estimate)]
    if "random" not in compared:
        scores = attribution.random_scores(truth.train_ids, truth.query_ids, 0)
        random = predicted_row("random", truth.predict(scores), truth)
        rows.append(random[0])
        compared = compared | {"random": random}
    best = ceiling(truth)
    return {
        "ceiling": best and best._asdict(),
        "rows": rows,
        "differences": differences(compared),
    }


def scored_rows(
    method: str, scores: np.ndarray, truth: RetrainedLosses, *rule
) -> tuple[tuple[dict, np.ndarray], dict]:
    """Returns the `predicted_row` of scores [queries, train], and the row of their
    squares."""
    predictions = truth.predict(scores)
    unranked, sentence = truth.unranked(predictions)
    if unranked.any():
        text = f"LDS of {method}: {sentence}, and counts as 0."
        warnings.warn(text, stacklevel=3)
    linear = predicted_row(method, predictions, truth, *rule)
    squares = np.square(scores, dtype=np.float64)
    squared, _ = predicted_row(method, truth.predict(squares), truth, *rule)
    return linear, squared | {"transform": "squared"}


def exact_row(
    run: "Run", method: str, queries: str, truth: RetrainedLosses, *rule
) -> tuple[dict, np.ndarray]:
    """Returns the `predicted_row` of the coverage of each subset, which is no sum of scores."""
    of_method = METHODS[method]
    measurement = of_method.measurement
    kernels, query = run.kernels(measurement), run.features(queries, measurement)
    damping = run.config.attribution.damping_of(of_method)
    predictions = predict(kernels, query, truth.masks, damping=damping).values
    exact, samples = predicted_row(method, predictions, truth, *rule)
    return exact | {"transform": "exact"}, samples


def row(
    estimate: Estimate, rule: str | None = None, damping: float | list | None = None
) -> dict:
    """Returns what a row of the results says of linear scores, beside whose they are."""
    value, low, high = estimate
    described = {"damping_rule": rule, "damping": damping, "transform": "linear"}
    return described | {"lds": value, "low": low, "high": high}


def predicted_row(
    method: str, predictions: np.ndarray, truth: RetrainedLosses, *rule
) -> tuple[dict, np.ndarray]:
    """Returns the row of predictions with the paper's interval, and its LDS resampled."""
    estimate, samples = bootstrap(predictions, truth)
    reference = {"reference": reference_interval(predictions, truth)}
    return {"method": method} | row(estimate, *rule) | reference, samples


def damping_rows(
    grid: Sequence[float], path: np.ndarray, truth: RetrainedLosses
) -> tuple:
    """Returns the rows "cross-fitted" and "oracle" of lambdas that the ensemble chose, and
    the LDS at every damping of a path [grid, subsets, queries].

    Of too few subsets for halves there is no row "cross-fitted".
    """
    values = [lds(predictions, truth) for predictions in path]
    best = int(np.argmax(values))
    estimate, _ = bootstrap(path[best], truth)
    oracle = row(estimate, "oracle", grid[best])
    if not has_halves(truth):
        return oracle, values
    fitted, chosen = cross_fitted(path, truth)
    return row(fitted, "cross-fitted", [grid[i] for i in chosen]), oracle, values


def differences(compared: dict[str, tuple[dict, np.ndarray]]) -> list[dict]:
    """Returns the first method less each other one, from resamples that they share."""
    (first, (first_row, first_samples)), *rest = compared.items()
    rows = []
    for name, (other_row, samples) in rest:
        value = first_row["lds"] - other_row["lds"]
        estimate = interval(value, first_samples - samples)
        rows.append({"a": first, "b": name, **estimate._asdict()})
    return rows


def table(result: dict) -> str:
    """Returns lds.json as text."""
    lines = []
    for name, queries in result["queries"].items():
        lines += ["", f"{name} queries: LDS [95% interval]"]
        if queries["ceiling"]:
            ceiling = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**queries["ceiling"])
            lines.append(f"  {'noise ceiling':<42} {ceiling}")
        for scored in queries["rows"]:
            label = " ".join([scored["method"], *OF_TRANSFORM[scored["transform"]]])
            if scored["damping_rule"]:
                damping = scored["damping"]
                values = [] if damping is None else np.atleast_1d(damping)
                words = [scored["damping_rule"], *(f"{value:.3g}" for value in values)]
                label += f" ({', '.join(words)})"
            numbers = "{lds:.3f} [{low:.3f}, {high:.3f}]".format(**scored)
            lines.append(f"  {label:<42} {numbers}")
    return "\n".join(lines)
