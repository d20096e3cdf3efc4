"""Ablations: what each choice of a feature and of a kernel is worth, as an LDS."""

import numpy as np

from dtrak_jax import feature_sets, files, parallel, results
from dtrak_jax.attribution import (
    DEFAULT_DAMPING,
    GRID,
    Damping,
    Kernels,
    coverage,
    damping_path,
    effective,
    gradient_cosine,
)
from dtrak_jax.attribution.coverage import COVERAGE_SHARE, coverage_path
from dtrak_jax.digests import digest
from dtrak_jax.evaluation import datamodeling, lds
from dtrak_jax.evaluation.arms import Arm, FeatureSpec, arms
from dtrak_jax.evaluation.changes import warn_if_not_remade
from dtrak_jax.evaluation.truth import RetrainedLosses
from dtrak_jax.feature_sets import FeatureSet, featurize, noise_of
from dtrak_jax.features import Projection
from dtrak_jax.progress import progress
from dtrak_jax.run import Run

COVERAGE_GRID = tuple(damping for damping in GRID if damping > 0.03)
"""The values of lambda that are tried for coverage, whose best is large."""


def ablate(run: Run) -> None:
    """Scores with other noises, kernels, timesteps, ...: ablations.json."""
    truth = run.truth()
    # Arms of one spec follow each other: an interruption leaves one store unfinished.
    ordered = sorted(arms(run.config), key=lambda arm: arm.spec.name)
    rows = []
    for arm in progress(ordered, "ablate", unit="arm"):
        rows += _rows_of(run, arm, {n: truth[n] for n in arm.queries if n in truth})
    rows.sort(key=lambda row: run.config.ablation.studies.index(row["name"]))
    ceilings = {name: datamodeling.ceiling(losses) for name, losses in truth.items()}
    described = {name: best and best._asdict() for name, best in ceilings.items()}
    result = {"rows": rows, "ceiling": described}
    results.save(run, "ablations", result, ["retrained models", "model"])
    warn_if_not_remade(run.json("counterfactual"))


def _rows_of(run: Run, arm: Arm, truth: dict[str, RetrainedLosses]) -> list[dict]:
    """Returns the rows of one arm, from a file or computed."""
    path = run.workdir / "ablations" / "rows" / f"{arm.key}.json"
    arrays = (a for losses in truth.values() for a in (losses.outputs, losses.masks))
    stores = (store(run, arm.spec, name) for name in ("train", *truth))
    made_from = (feature_sets.path(run, features).name for features in stores)
    against = digest(*truth, *(array.tobytes() for array in arrays), *made_from)
    rules = {name: Damping.of(damping).words for name, damping in rules_of(arm).items()}
    described = {"truth": against, "rules": rules}
    saved = files.read_json(path) if path.exists() else {}
    # Files of earlier versions have the first rule alone, and do not say so.
    saved = {"rules": {"label-free": rules["label-free"]}} | saved
    if parallel.agreed({name: saved.get(name) for name in described} == described):
        return files.read_json(path)["rows"]
    train, *queries = (
        featurize(run, store(run, arm.spec, name))[arm.measurement][arm.pairs]
        for name in ("train", *truth)
    )
    rows = arm_rows(arm, train, np.concatenate(queries, axis=1), truth)
    if parallel.is_main_process():
        files.write_json(path, described | {"rows": rows})
    return rows


def store(run: Run, spec: FeatureSpec, name: str) -> FeatureSet:
    """Returns the features of one set of images, in a store of the spec's."""
    task = run.task(
        measurement=spec.measurements,
        timesteps=spec.timesteps,
        draws=spec.draws,
        noise=noise_of(spec.noise, name),
        per_timestep=True,
        seed=spec.seed,
    )
    folder = f"ablations/features/{spec.name}/{name}"
    projection = Projection(spec.projection, spec.dim, run.config.features.seed)
    last = spec.checkpoint == run.config.train.steps
    model = "" if last else f"checkpoints/{spec.checkpoint}"
    return FeatureSet(folder, name, task, projection, model)


def rules_of(arm: Arm) -> dict[str, float | Damping]:
    """Returns the rules by which an arm chooses lambda without labels, by name."""
    rules = {"label-free": DEFAULT_DAMPING}
    if arm.study == "coverage":
        rules["effective"] = effective(COVERAGE_SHARE)
    return rules


def arm_rows(
    arm: Arm, train: np.ndarray, query: np.ndarray, truth: dict[str, RetrainedLosses]
) -> list[dict]:
    """Returns the rows of one arm: an LDS for each rule that chooses lambda, and squared;
    in the study "coverage" that of each subset's coverage, at fewer dampings.

    Its features are those of the training set [pairs, n, k] and of all queries
    [pairs, q, k], in the order of the sets of queries in `truth`.
    """
    if arm.study == "coverage":
        return _coverage_rows(arm, Kernels(train), query, truth)
    grid, path, rule = [], None, ()
    if arm.kernel == "averaged":
        train, query = train.mean(axis=0), query.mean(axis=0)
    if arm.kernel == "cosine":
        scores = gradient_cosine(train, query)
    else:
        kernels, pooled = Kernels(train), arm.kernel == "pooled"
        masks = next(iter(truth.values())).masks
        grid, path = datamodeling.damping_path(kernels, query, masks, pooled)
        rule = ("label-free", DEFAULT_DAMPING)
        (scores,) = damping_path(kernels, query, [DEFAULT_DAMPING], pooled=pooled)
    transforms = {"linear": scores}
    if arm.study == "noise":
        transforms["squared"] = scores**2
    if grid and DEFAULT_DAMPING not in grid:
        transforms = {}  # Those scores are rounding errors.
    rows, end = [], 0
    for name, losses in truth.items():
        start, end = end, end + len(losses.query_ids)
        scored = []
        for transform, values in transforms.items():
            estimate, _ = datamodeling.bootstrap(
                losses.predict(values[start:end]), losses
            )
            scored.append(lds.row(estimate, *rule) | {"transform": transform})
        if grid:
            scored += lds.damping_rows(grid, path[:, :, start:end], losses)[:-1]
        rows += [arm.describe() | {"queries": name} | row for row in scored]
    return rows


def _coverage_rows(
    arm: Arm, kernels: Kernels, query: np.ndarray, truth: dict[str, RetrainedLosses]
) -> list[dict]:
    """Returns the rows of an arm that predicts by the coverage of each subset, and of
    kernels apart also by its first-order scores."""
    masks, pooled = next(iter(truth.values())).masks, arm.kernel == "pooled"
    rules = rules_of(arm)
    dampings = *COVERAGE_GRID, rules["effective"]
    path = coverage_path(kernels, query, dampings, masks, pooled, strict=False)
    exact = [path[COVERAGE_GRID.index(DEFAULT_DAMPING)], path[-1]]
    if not np.isfinite(path[-1]).all():
        del rules["effective"]  # Rounding errors would decide it.
    values = [Damping.of(damping).value for damping in rules.values()]
    named = list(zip(rules, values, strict=True))
    scores = [] if pooled else [coverage(kernels, query, d) for d in rules.values()]
    rows, end = [], 0
    for name, losses in truth.items():
        start, end = end, end + len(losses.query_ids)
        described = arm.describe() | {"queries": name}
        made = [("exact", r, p[:, start:end]) for r, p in zip(named, exact)]
        made += [
            ("linear", rule, losses.predict(of_rule[start:end]))
            for rule, of_rule in zip(named, scores)
        ]
        for transform, rule, predictions in made:
            estimate, _ = datamodeling.bootstrap(predictions, losses)
            row = lds.row(estimate, *rule) | {"transform": transform}
            rows.append(described | row)
        chosen = lds.damping_rows(COVERAGE_GRID, path[:-1, :, start:end], losses)[:-1]
        rows += [described | row | {"transform": "exact"} for row in chosen]
    return rows
