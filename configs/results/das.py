"""Holds DAS with random probes of the output against signed scores by the same matrices.

    python configs/results/das.py digits RUN
    python configs/results/das.py mnist RUN

RUN is one where gauss_newton.py was run before, whose features and matrices are read. It
keeps the queries' features of probes, so that the same command continues; das.json has the
LDS of signed scores, of their squares, and of DAS by the number of probes; and of DAS with
the loss's own kernel in place of the Gauss-Newton matrix.
"""

import dataclasses
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.attribution import Kernels, Predictions, das
from dtrak_jax.attribution.damping import DEFAULT_DAMPING, GAUSS_NEWTON_DAMPING
from dtrak_jax.attribution.influence import pair_scores
from dtrak_jax.attribution.inputs import by_pair
from dtrak_jax.run import Run

HERE = Path(__file__).parent
FILE = HERE / "das.json"
STUDIES = {"digits": ((2048, 1), (4096, 2)), "mnist": ((4096, 1),)}
"""The columns and draws of noise of each data set."""

COTANGENTS = 16
"""The cotangents of each training image and pair."""

PROBES = (1, 2, 4, 8, 16)
"""The numbers of probes, of which the largest has all others."""


def main(data: str, folder: str) -> None:
    """Computes what is missing, and writes the rows of a data set."""
    study = runpy.run_path(str(HERE / "gauss_newton.py"))
    run, truth = study["opened"](data, folder)
    empty = {"revision": "", "rows": []}
    result = json.loads(FILE.read_text()) if FILE.exists() else empty
    for dim, draws in STUDIES[data]:
        settings = {"data": data, "dim": dim, "draws": draws}
        if any(settings.items() <= row.items() for row in result["rows"]):
            continue
        for row in compared(study, run, dim, draws, truth):
            result["rows"].append(settings | row)
        files.write_json(FILE, result)


def compared(
    study: dict, run: Run, dim: int, draws: int, truth: dict
) -> Iterator[dict]:
    """Yields the LDS of each kind of scores, and how far it is above that of signed ones."""
    featurized, how = study["featurized"], (run, dim, draws)
    train = featurized(*how, "train")
    made = study["matrices"](*how, COTANGENTS)
    kernels = Kernels(train, curvature=made)
    # The loss's own kernel, in the place of the Gauss-Newton matrix.
    own = [phi.T @ phi for phi in by_pair(train)]
    own = dataclasses.replace(made, matrix=own.__getitem__)
    for name, losses in truth.items():
        query = featurized(*how, name)
        probes = list(featurized(*how, name, dtrak.probes(max(PROBES))).values())
        signed = list(pair_scores(kernels, query, GAUSS_NEWTON_DAMPING))
        scores = {("gauss-newton", 0): sum(signed)}
        scores["gauss-newton squared", 0] = sum(tau**2 for tau in signed)
        for count in PROBES:
            scores["das", count] = das(kernels, probes[:count])
        owned = Kernels(train, curvature=own), probes
        scores["das by own kernels", max(PROBES)] = das(*owned, DEFAULT_DAMPING)
        ids, baseline = (np.array(train.ids), np.array(query.ids)), None
        for (method, count), tau in scores.items():
            values = losses.masks @ tau.T
            lds = dtrak.lds(Predictions(values, losses.masks, *ids), losses)
            baseline = baseline or lds
            made_with = {"probes": count, "less_signed": lds.less(baseline)._asdict()}
            yield study["row"](method, name, lds) | made_with


if __name__ == "__main__":
    main(*sys.argv[1:])
