"""The linear datamodeling score of every method of a run: lds.json."""

import numpy as np
from tqdm import tqdm

from dtrak_jax import files, parallel
from dtrak_jax.attribution import random_scores
from dtrak_jax.evaluation import lds
from dtrak_jax.evaluation.lds import RetrainedLosses
from dtrak_jax.evaluation.statistics import interval
from dtrak_jax.methods import METHODS
from dtrak_jax.run import Run

Resampled = tuple[float, np.ndarray]
"""An LDS, and its values in the resamples behind its interval."""


def evaluate(run: Run) -> None:
    """Scores every method against the retrained models, prints and writes lds.json."""
    settings = run.config.ensemble
    result = {
        "settings": {
            "subsets": settings.subsets,
            "seeds": settings.seeds,
            "fraction": settings.fraction,
            "timesteps": settings.timesteps,
            "draws": settings.draws,
            "resamples": lds.RESAMPLES,
        },
        "queries": {
            name: evaluate_queries(run, name, truth)
            for name, truth in run.truth().items()
        },
    }
    if parallel.is_main_process():
        files.write_json(run.workdir / "lds.json", result)
        print(table(result))


def evaluate_queries(run: Run, queries: str, truth: RetrainedLosses) -> dict:
    """Returns what lds.json says of one set of queries.

    "rows" has every method, by each rule that chooses lambda and squared, and the
    controls; "differences" the first method less each other one, from resamples that
    they share; "curves" the LDS over lambda.
    """
    rows, curves, resampled = [], {}, {}
    methods = [
        name
        for name in run.config.attribution.methods
        if METHODS[name].applies_to(queries)
    ]
    for name in tqdm(methods, f"lds {queries}", unit="method", disable=None):
        learn = METHODS[name].learn
        if learn:
            estimate = lds.from_halves(learn, truth)
            rows.append({"method": name} | lds.row(estimate, "halves"))
            continue
        linear, squared, resampled[name] = score_rows(run, name, queries, truth)
        rows += [linear, squared]
        if METHODS[name].kernel and run.config.attribution.solver == "eigh":
            path_rows, curves[name] = damping_rows(run, name, queries, truth)
            rows += path_rows
    # Subsets of one size give every constant the same sum.
    constant = np.ones((len(truth.query_ids), len(truth.train_ids)))
    estimate, _ = lds.bootstrap(truth.predict(constant), truth)
    rows.append({"method": "constant"} | lds.row(estimate))
    if "random" not in methods:
        scores = random_scores(truth.train_ids, truth.query_ids, 0)
        row, resampled["random"] = predicted_row("random", truth.predict(scores), truth)
        rows.append(row)
    ceiling = lds.ceiling(truth)
    return {
        "ceiling": ceiling and ceiling._asdict(),
        "rows": rows,
        "differences": differences(resampled),
        "curves": curves,
    }


def predicted_row(
    method: str, predictions: np.ndarray, truth: RetrainedLosses, **described
) -> tuple[dict, Resampled]:
    """Returns the row of some predictions, with the paper's own interval, and the LDS
    with its resamples. What else describes the row are `lds.row`'s arguments."""
    estimate, samples = lds.bootstrap(predictions, truth)
    row = {"method": method} | lds.row(estimate, **described)
    reference = lds.reference_interval(predictions, truth)
    return row | {"reference": reference}, (estimate.value, samples)


def score_rows(
    run: Run, name: str, queries: str, truth: RetrainedLosses
) -> tuple[dict, dict, Resampled]:
    """Returns the rows of a method's scores and of their squares, and the resamples of
    the first."""
    scores = run.scores(name, queries)
    rule = {}
    if scores.damping is not None:
        rule = {"rule": "label-free", "damping": scores.damping[0]}
    linear, resampled = predicted_row(name, truth.predict(scores.scores), truth, **rule)
    squares = truth.predict(np.square(scores.scores, dtype=np.float64))
    squared, _ = predicted_row(name, squares, truth, transform="squared", **rule)
    return linear, squared, resampled


def damping_rows(
    run: Run, name: str, queries: str, truth: RetrainedLosses
) -> tuple[list[dict], dict]:
    """Returns what other values of lambda give: rows "oracle" and "cross-fitted", and
    the curve of all."""
    measurement = METHODS[name].measurement
    grid, predictions = lds.damping_path(
        run.kernels(measurement), run.features(queries, measurement), truth.masks
    )
    values = [lds.lds(p, truth) for p in predictions]
    best = int(np.argmax(values))
    oracle, _ = predicted_row(
        name, predictions[best], truth, rule="oracle", damping=grid[best]
    )
    estimate, chosen = lds.cross_fitted(predictions, truth)
    fitted = lds.row(estimate, "cross-fitted", [grid[i] for i in chosen])
    return [oracle, {"method": name} | fitted], {"damping": grid, "lds": values}


def differences(resampled: dict[str, Resampled]) -> list[dict]:
    """Returns the first method less each other one, from resamples that they share."""
    (first, (value, samples)), *rest = resampled.items()
    rows = []
    for name, (other_value, other_samples) in rest:
        estimate = interval(value - other_value, samples - other_samples)
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
        for row in queries["rows"]:
            label = row["method"] + " squared" * (row["transform"] == "squared")
            if row["damping_rule"]:
                words = [row["damping_rule"]]
                if row["damping"] is not None:
                    words += [f"{value:.3g}" for value in np.atleast_1d(row["damping"])]
                label += f" ({', '.join(words)})"
            numbers = "{lds:.3f} [{low:.3f}, {high:.3f}]".format(**row)
            lines.append(f"  {label:<42} {numbers}")
    return "\n".join(lines)
