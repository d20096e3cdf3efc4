"""Holds Gauss-Newton matrices of the output against kernels of the loss's own gradients.

    python configs/results/gauss_newton.py digits RUN
    python configs/results/gauss_newton.py mnist RUN

RUN is a run of `configs/digits_benchmark.py` or `configs/mnist.py` that has a trained
model and queries. It keeps features and matrices, so that the same command continues;
gauss_newton.json has the LDS of both kinds of scores from the same features.
"""

import dataclasses
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from studies import estimate, featurize, saved, truths

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.attribution import GRID, Kernels, Predictions, damping_path
from dtrak_jax.attribution.damping import GAUSS_NEWTON_DAMPING
from dtrak_jax.evaluation import datamodeling
from dtrak_jax.evaluation.trust import LDS
from dtrak_jax.features import GaussNewton
from dtrak_jax.run import Run

HERE = Path(__file__).parent
FILE = HERE / "gauss_newton.json"
STUDIES = {
    "digits": {(2048, 1): (1, 4, 16, 0), (4096, 2): (16,), (4096, 16): ()},
    "mnist": {(2048, 1): (1, 8), (4096, 1): (16,)},
}
"""For columns and draws of noise, the cotangents of each noised image; 0 are all."""

DAMPINGS = (GAUSS_NEWTON_DAMPING, 1e-2, 1e-1)


def main(data: str, folder: str) -> None:
    """Computes what is missing, and writes the rows of a data set."""
    run, truth = opened(data, folder)
    result = saved(FILE)
    result.setdefault("rows", [])
    for (dim, draws), counts in STUDIES[data].items():
        settings = {"data": data, "dim": dim, "draws": draws}
        done = [row for row in result["rows"] if settings.items() <= row.items()]
        if done and {row["cotangents"] for row in done} >= {*counts}:
            continue
        rows = list(compared(run, dim, draws, counts, truth))
        others = [row for row in result["rows"] if row not in done]
        result["rows"] = others + [settings | row for row in rows]
        files.write_json(FILE, result)


def opened(data: str, folder: str) -> tuple[Run, dict[str, dtrak.RetrainedLosses]]:
    """Returns the run, and the losses of retrained models by set of queries."""
    name = {"digits": "digits_benchmark"}.get(data, data)
    config = runpy.run_path(str(HERE.parent / f"{name}.py"))["get_config"]()
    # MNIST's subsets have a model each.
    ensemble = dataclasses.replace(config.ensemble, seeds=1)
    run = Run.at(dataclasses.replace(config, ensemble=ensemble), folder)
    return run, truths() if data == "digits" else run.truth()


def compared(
    run: Run, dim: int, draws: int, counts: tuple, truth: dict
) -> Iterator[dict]:
    """Yields the LDS of TRAK, and of each number of cotangents."""
    task, *how = study(run, dim, draws)
    features = featurize(run, task, run.params(), *how)
    train, pairs = features.pop("train"), len(task.pairs)
    own, baseline = Kernels(train), {}
    for name, query in features.items():
        for kernel in ("apart", "pooled"):
            how = own, query, GRID, kernel == "pooled", truth[name]
            found = predicted(*how)
            damping = max(found, key=lambda value: found[value][0])
            baseline[kernel, name] = lds = of(
                found[damping][1], train, query, truth[name]
            )
            made = {"cotangents": None, "kernel": kernel, "damping": damping}
            named = {"method": "trak", "queries": name}
            yield named | estimate(lds) | made | {"gradients": pairs}
    for count in counts:
        kernels = Kernels(train, curvature=matrices(run, count, task, *how))
        for name, query in features.items():
            found = predicted(kernels, query, DAMPINGS, False, truth[name])
            values = found[GAUSS_NEWTON_DAMPING][1]
            lds = of(values, train, query, truth[name])
            cotangents = count or math.prod(run.network.shape)
            described = {"cotangents": count, "kernel": "apart"}
            described["damping"] = GAUSS_NEWTON_DAMPING
            described["by_damping"] = {
                f"{k:g}": value for k, (value, _) in found.items()
            }
            for kernel in ("apart", "pooled"):
                less = lds.less(baseline[kernel, name])
                described[f"less_{kernel}"] = less._asdict()
            gradients = {"gradients": pairs * (1 + cotangents)}
            named = {"method": "gauss-newton", "queries": name}
            yield named | estimate(lds) | described | gradients


def study(run: Run, dim: int, draws: int) -> tuple[dtrak.Task, dtrak.Projection, Path]:
    """Returns the task, the projection, and the folder of their features and matrices."""
    projection = dtrak.Projection("sketch", dim, run.config.features.seed)
    folder = run.workdir / "gauss-newton-study" / f"{dim}-{draws}"
    return run.task(measurement="loss", draws=draws), projection, folder


def matrices(
    run: Run,
    cotangents: int,
    task: dtrak.Task,
    projection: dtrak.Projection,
    folder: Path,
) -> GaussNewton:
    """Returns the training images' Gauss-Newton matrices, kept in the folder."""
    train = run.splits.train
    return dtrak.gauss_newton(
        *(task, run.params(), train.images, projection),
        ids=train.ids,
        cotangents=cotangents,
        store=folder / f"cotangents-{cotangents}",
        batch_size=64,
    )


def predicted(
    kernels: Kernels, query, dampings: Sequence[float], pooled: bool, truth
) -> dict[float, tuple[float, np.ndarray]]:
    """Returns the LDS, and predictions [subsets, queries], at each damping at which rounding
    errors do not decide."""
    path = damping_path(kernels, query, dampings, pooled=pooled, subsets=truth.masks)
    return {
        damping: (datamodeling.lds(values.T, truth), values.T)
        for damping, values in zip(dampings, path, strict=True)
        if np.isfinite(values).all()
    }


def of(values: np.ndarray, train, query, truth) -> LDS:
    """Returns the LDS of predictions [subsets, queries], with its interval."""
    ids = np.array(train.ids), np.array(query.ids)
    return dtrak.lds(Predictions(values, truth.masks, *ids), truth)


if __name__ == "__main__":
    main(*sys.argv[1:])
