"""Ablations: what each choice of a feature and of a kernel is worth, as an LDS."""

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from dtrak_jax import files, parallel
from dtrak_jax.attribution import (
    DEFAULT_DAMPING,
    Kernels,
    damping_path,
    gradient_cosine,
)
from dtrak_jax.digests import digest
from dtrak_jax.evaluation import lds
from dtrak_jax.evaluation.arms import Arm, FeatureSpec, arms
from dtrak_jax.evaluation.lds import RetrainedLosses
from dtrak_jax.feature_sets import FeatureSet, featurize, noise_of
from dtrak_jax.features import Features, Projection
from dtrak_jax.run import Run


def ablate(run: Run) -> None:
    """Makes the rows of every study, but for those that are there: ablations.json."""
    truth = run.truth()
    # Arms of one spec follow each other: an interruption leaves one store unfinished.
    ordered = sorted(arms(run.config), key=lambda arm: arm.spec.name)
    rows = []
    for arm in tqdm(ordered, "ablate", unit="arm", disable=None):
        rows += _rows_of(run, arm, {n: truth[n] for n in arm.queries if n in truth})
    rows.sort(key=lambda row: run.config.ablation.studies.index(row["name"]))
    ceilings = {name: lds.ceiling(losses) for name, losses in truth.items()}
    if parallel.is_main_process():
        result = {
            "rows": rows,
            "ceiling": {k: v and v._asdict() for k, v in ceilings.items()},
        }
        files.write_json(run.workdir / "ablations.json", result)


def _rows_of(run: Run, arm: Arm, truth: dict[str, RetrainedLosses]) -> list[dict]:
    """Returns the rows of one arm, from a file or computed."""
    path = run.workdir / "ablations" / "rows" / f"{arm.key}.json"
    arrays = (a for losses in truth.values() for a in (losses.outputs, losses.masks))
    against = digest(*truth, *(array.tobytes() for array in arrays))
    if parallel.agreed(path.exists() and files.read_json(path)["truth"] == against):
        return files.read_json(path)["rows"]
    train, *queries = (
        _features(run, arm.spec, name)[arm.measurement][arm.pairs]
        for name in ("train", *truth)
    )
    rows = list(arm_rows(arm, train, np.concatenate(queries, axis=1), truth))
    if parallel.is_main_process():
        files.write_json(path, {"truth": against, "rows": rows})
    return rows


def _features(run: Run, spec: FeatureSpec, name: str) -> dict[str, Features]:
    """Returns the features of one set of images, in a store of the spec's."""
    task = run.task(
        measurement=spec.measurements,
        timesteps=spec.timesteps,
        draws=spec.draws,
        noise=noise_of(spec.noise, name),
        per_timestep=True,
        seed=spec.seed,
    )
    last = spec.checkpoint == run.config.train.steps
    return featurize(
        run,
        FeatureSet(
            f"ablations/features/{spec.name}/{name}",
            name,
            task,
            Projection(spec.projection, spec.dim, run.config.features.seed),
            model="" if last else f"checkpoints/{spec.checkpoint}",
        ),
    )


def arm_rows(
    arm: Arm, train: np.ndarray, query: np.ndarray, truth: dict[str, RetrainedLosses]
) -> Iterator[dict]:
    """Yields the rows of one arm: an LDS for each rule that chooses lambda, and squared.

    Args:
      arm: the way to make scores.
      train: its features of the training set [pairs, n, k].
      query: its features of all queries, one set after the other [pairs, q, k].
      truth: the ensemble, for each set of queries.
    """
    grid, path = [], None
    if arm.kernel == "averaged":
        train, query = train.mean(axis=0), query.mean(axis=0)
    if arm.kernel == "cosine":
        scores = gradient_cosine(train, query)
    else:
        kernels, pooled = Kernels(train), arm.kernel == "pooled"
        masks = next(iter(truth.values())).masks
        grid, path = lds.damping_path(kernels, query, masks, pooled=pooled)
        (scores,) = damping_path(kernels, query, [DEFAULT_DAMPING], pooled=pooled)
    end = 0
    for name, losses in truth.items():
        start, end = end, end + len(losses.query_ids)
        transforms = {"linear": scores[start:end]}
        if arm.study == "noise":
            transforms["squared"] = scores[start:end] ** 2
        rows = _score_rows(transforms, losses, grid)
        if grid:
            rows += _damping_rows(grid, path[:, :, start:end], losses)
        for row in rows:
            yield arm.describe() | {"queries": name} | row


def _score_rows(
    transforms: dict[str, np.ndarray], losses: RetrainedLosses, grid: Sequence[float]
) -> list[dict]:
    """Returns the rows of scores [q, n], which with a grid are those of the default."""
    if grid and DEFAULT_DAMPING not in grid:
        return []
    rule, damping = ("label-free", DEFAULT_DAMPING) if grid else (None, None)
    rows = []
    for transform, scores in transforms.items():
        estimate, _ = lds.bootstrap(losses.predict(scores), losses)
        rows.append(lds.row(estimate, rule, damping, transform))
    return rows


def _damping_rows(
    grid: Sequence[float], predictions: np.ndarray, losses: RetrainedLosses
) -> list[dict]:
    """Returns the rows of the rules that choose lambda by the ensemble."""
    estimate, chosen = lds.cross_fitted(predictions, losses)
    best = int(np.argmax([lds.lds(p, losses) for p in predictions]))
    oracle, _ = lds.bootstrap(predictions[best], losses)
    return [
        lds.row(estimate, "cross-fitted", [grid[i] for i in chosen]),
        lds.row(oracle, "oracle", grid[best]),
    ]
