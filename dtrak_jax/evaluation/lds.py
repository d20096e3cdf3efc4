"""The linear datamodeling score of every method: do scores predict what retraining does?"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

from dtrak_jax import attribution, parallel, results
from dtrak_jax.attribution import Kernels
from dtrak_jax.attribution.inputs import Array
from dtrak_jax.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    correlation_interval,
    interval,
    resamples,
    spearman,
)
from dtrak_jax.evaluation.truth import MIN_SUBSETS, RetrainedLosses
from dtrak_jax.methods import METHODS
from dtrak_jax.progress import progress

if TYPE_CHECKING:
    from dtrak_jax.run import Run

# The file lds.json


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


def evaluate_queries(run: "Run", queries: str, truth: RetrainedLosses) -> dict:
    """Returns what lds.json says of one set of queries.

    "rows" has every method, by each rule that chooses lambda and squared, and the
    controls; "differences" the first method less each other one, from resamples that
    they share; "curves" the LDS over lambda.
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
            rule = ("label-free", scores.damping[0])
        compared[name], squared = scored_rows(name, scores.scores, truth, *rule)
        rows += [compared[name][0], squared]
        if method.kernel and settings.solver == "eigh":
            kernels = run.kernels(method.measurement)
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
            label = scored["method"] + " squared" * (scored["transform"] == "squared")
            if scored["damping_rule"]:
                damping = scored["damping"]
                values = [] if damping is None else np.atleast_1d(damping)
                words = [scored["damping_rule"], *(f"{value:.3g}" for value in values)]
                label += f" ({', '.join(words)})"
            numbers = "{lds:.3f} [{low:.3f}, {high:.3f}]".format(**scored)
            lines.append(f"  {label:<42} {numbers}")
    return "\n".join(lines)


# The score


def lds(predictions: np.ndarray, truth: RetrainedLosses) -> float:
    """Returns the mean over queries of Spearman's correlation over subsets.

    Park et al., "TRAK" (arXiv 2303.14186), section 3. The predictions [subsets,
    queries] are those of `RetrainedLosses.predict`.
    """
    return float(spearman(predictions, truth.target).mean())


def bootstrap(
    predictions: np.ndarray, truth: RetrainedLosses
) -> tuple[Estimate, np.ndarray]:
    """Returns the score with its interval, and the samples behind the interval.

    Subsets and queries are drawn anew together: the interval is that of other subsets
    and of other queries. The samples [RESAMPLES] of two scores under one truth belong
    to the same draws, so their differences are those of a paired comparison.
    """
    samples = _resampled(predictions, truth.target)
    return correlation_interval(lds(predictions, truth), samples), samples


def _resampled(a: np.ndarray, b: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the mean correlation of a and b [subsets, queries] in every resample.

    The seed decides the subsets of the resamples; their queries are always the same.
    """
    subsets, queries = a.shape
    shares = resamples(queries, RESAMPLES, 1) / queries
    correlations = spearman(a, b, resamples(subsets, RESAMPLES, seed))
    return (correlations * shares).sum(axis=1)


def ceiling(truth: RetrainedLosses) -> Estimate | None:
    """Returns the LDS that each subset's true mean loss would have; None with one seed.

    Two halves of h seeds each agree with correlation r (mean over queries and over
    all ways to halve); S seeds then have the reliability R = c r / (1 + (c - 1) r),
    c = S / h (Spearman and Brown), and their mean loss correlates with the truth by
    sqrt(R). This is correct for Pearson correlations and close for ranks.
    """
    seeds = truth.outputs.shape[1]
    if seeds == 1:
        return None
    size = seeds // 2
    choices = itertools.combinations(range(seeds), size)
    halves = [p for p in itertools.combinations(choices, 2) if not {*p[0]} & {*p[1]}]
    values, samples = [], []
    for pair in halves:
        a, b = (truth.outputs[:, list(half)].mean(axis=1) for half in pair)
        values.append(spearman(a, b).mean())
        samples.append(_resampled(a, b))
    agreement = interval(np.mean(values), np.mean(samples, axis=0))
    r, c = np.maximum(agreement, 0), seeds / size
    return Estimate(*np.sqrt(c * r / (1 + (c - 1) * r)).tolist())


def reference_interval(
    predictions: np.ndarray, truth: RetrainedLosses
) -> dict[str, float]:
    """Returns the interval of the D-TRAK paper's notebooks, to compare with its numbers.

    `scipy.stats.bootstrap` over subsets alone, 64 samples, BCa, seed 42; and the mean
    and standard deviation of the samples, which its tables print. It holds the
    queries fixed, and 64 samples are few: the interval is too narrow.
    """

    def statistic(subsets):
        return spearman(predictions[subsets], truth.target[subsets]).mean()

    subsets = (np.arange(len(truth.masks)),)
    result = scipy.stats.bootstrap(
        subsets, statistic, vectorized=False, n_resamples=64, random_state=42
    )
    ends, samples = result.confidence_interval, result.bootstrap_distribution
    values = (ends.low, ends.high, samples.mean(), samples.std())
    return dict(zip(("low", "high", "mean", "std"), map(float, values), strict=True))


# The score with a lambda, or a method, that learns from the ensemble


def damping_path(
    kernels: Kernels, query: Array, masks: np.ndarray, pooled: bool = False
) -> tuple[list[float], np.ndarray]:
    """Returns every damping of `attribution.GRID` that is above rounding errors, and the
    predictions with each of them [dampings, subsets, queries]."""
    path = attribution.damping_path(kernels, query, pooled=pooled, subsets=masks)
    sound = np.isfinite(path).all(axis=(1, 2))
    grid = [d for d, ok in zip(attribution.GRID, sound, strict=True) if ok]
    return grid, path[sound].swapaxes(1, 2)


def cross_fitted(
    path: np.ndarray, truth: RetrainedLosses
) -> tuple[Estimate, list[int]]:
    """Returns the score with its damping chosen on the subsets that it is not scored on.

    The path has the predictions at every value of a grid [grid, subsets, queries]. The
    best value on one half of the subsets (even and odd ones) is scored on the other,
    and the two scores are averaged; the two positions in the grid come with it.
    """
    chosen = []

    def fit(half: np.ndarray) -> np.ndarray:
        values = [spearman(p[half], truth.target[half]).mean() for p in path]
        chosen.append(int(np.argmax(values)))
        return path[chosen[-1]]

    return _over_halves(fit, truth), chosen


def has_halves(truth: RetrainedLosses) -> bool:
    """Returns whether one half of the subsets may choose what is scored on the other."""
    return len(truth.masks) >= 2 * MIN_SUBSETS


def from_halves(function: Callable, truth: RetrainedLosses) -> Estimate:
    """Returns the score of a method that learns from the ensemble itself.

    The method, (masks [M, n], losses [M, q]) -> scores [q, n], learns from one half of
    the subsets and is scored on the other, and the other way round; on the subsets that
    it has seen it would be scored for remembering them.
    """

    def fit(half: np.ndarray) -> np.ndarray:
        return truth.predict(function(truth.masks[half], -truth.target[half]))

    return _over_halves(fit, truth)


def _over_halves(
    fit: Callable[[np.ndarray], np.ndarray], truth: RetrainedLosses
) -> Estimate:
    """Returns the mean score of predictions fitted on one half of the subsets, on the other.

    `fit` makes predictions for all subsets from those that it may see, bool [subsets].
    """
    count = len(truth.masks)
    if not has_halves(truth):
        raise ValueError(
            f"the ensemble has {count} subsets; choosing on one half and reporting on "
            f"the other needs {2 * MIN_SUBSETS} or more: set ensemble.subsets and run "
            "`dtrak-jax retrain`."
        )
    even = np.arange(count) % 2 == 0
    values, samples = [], 0.0
    # The halves hold different subsets, which are drawn independently.
    for half, seed in ((even, 2), (~even, 3)):
        predicted, target = fit(half)[~half], truth.target[~half]
        values.append(spearman(predicted, target).mean())
        samples = samples + _resampled(predicted, target, seed) / 2
    return correlation_interval(np.mean(values), samples)
