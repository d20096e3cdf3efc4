"""Holds DAS with random probes of the output against signed scores by the same matrices.

    python configs/results/das.py digits RUN
    python configs/results/das.py mnist RUN

RUN is one where gauss_newton.py was run before, whose features and matrices are read. It
keeps the queries' features of probes, so that the same command continues; das.json has the
LDS of signed scores, of their squares, and of DAS by the number of probes; and of DAS with
the loss's own kernel in place of the Gauss-Newton matrix.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from gauss_newton import matrices, of, opened, study
from studies import estimate, featurize, saved

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.attribution import Kernels, das
from dtrak_jax.attribution.damping import DEFAULT_DAMPING, GAUSS_NEWTON_DAMPING
from dtrak_jax.attribution.influence import pair_scores
from dtrak_jax.attribution.inputs import by_pair
from dtrak_jax.run import Run

FILE = Path(__file__).parent / "das.json"
STUDIES = {"digits": ((2048, 1), (4096, 2)), "mnist": ((4096, 1),)}
"""The columns and draws of noise of each data set."""

COTANGENTS = 16
"""The cotangents of each training image and pair."""

PROBES = (1, 2, 4, 8, 16)
"""The numbers of probes, of which the largest has all others."""


def main(data: str, folder: str) -> None:
    """Computes what is missing, and writes the rows of a data set."""
    run, truth = opened(data, folder)
    result = {"rows": []} | saved(FILE)
    for dim, draws in STUDIES[data]:
        settings = {"data": data, "dim": dim, "draws": draws}
        if any(settings.items() <= row.items() for row in result["rows"]):
            continue
        result["rows"] += [settings | row for row in compared(run, dim, draws, truth)]
        files.write_json(FILE, result)


def compared(run: Run, dim: int, draws: int, truth: dict) -> Iterator[dict]:
    """Yields the LDS of each kind of scores, and how far it is above that of signed ones."""
    task, projection, folder = study(run, dim, draws)
    features = featurize(run, task, run.params(), projection, folder)
    probed = dataclasses.replace(task, measurement=dtrak.probes(max(PROBES)))
    how = probed, run.params(), projection, folder / "probes", run.queries
    by_probe = featurize(run, *how)
    train = features.pop("train")
    made = matrices(run, COTANGENTS, task, projection, folder)
    kernels = Kernels(train, curvature=made, store=folder / "kernels")
    # The loss's own kernel, in the place of the Gauss-Newton matrix.
    own = [phi.T @ phi for phi in by_pair(train)]
    own = Kernels(train, curvature=dataclasses.replace(made, matrix=own.__getitem__))
    for name, query in features.items():
        probes = list(by_probe[name].values())
        signed = list(pair_scores(kernels, query, GAUSS_NEWTON_DAMPING))
        scores = {("gauss-newton", 0): sum(signed)}
        scores["gauss-newton squared", 0] = sum(tau**2 for tau in signed)
        for count in PROBES:
            scores["das", count] = das(kernels, probes[:count])
        if draws == 1:
            owned = das(own, probes, DEFAULT_DAMPING)
            scores["das by own kernels", max(PROBES)] = owned
        baseline = None
        for (method, count), tau in scores.items():
            lds = of(truth[name].masks @ tau.T, train, query, truth[name])
            baseline = baseline or lds
            made_with = {"method": method, "probes": count, "queries": name}
            less = {"less_signed": lds.less(baseline)._asdict()}
            yield made_with | estimate(lds) | less


if __name__ == "__main__":
    main(*sys.argv[1:])
