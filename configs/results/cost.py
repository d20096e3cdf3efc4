"""Measures what more gradients are worth, by every way to spend them.

    python configs/results/cost.py RUN

RUN is a run of `configs/digits_benchmark.py` with its checkpoints, the further model of
`trak-ensemble` and the first retrained models. It keeps the features, so that the same
command continues; cost.json has what came out, and cost.svg, which

    python configs/results/cost_figure.py

draws, shows it beside gauss_newton.json.
"""

import itertools
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
from studies import featurize, saved, truths

from dtrak_jax import files, training
from dtrak_jax.attribution import GRID, Kernels, damping_path
from dtrak_jax.evaluation.lds import damping_rows
from dtrak_jax.evaluation.retrain import member_steps
from dtrak_jax.run import Run

HERE = Path(__file__).parent
FILE = HERE / "cost.json"
TIMESTEPS = (100, 200, 300, 400, 500)
CHECKPOINTS = ("", "checkpoints/1500", "checkpoints/1000", "checkpoints/500")
SEEDS = ("", "models/full-0")
HALVES = tuple(f"{subset:04}-0" for subset in range(8))
WAYS = {
    "one model": [(("",), t, d) for t, d in ((1, 1), (3, 1), (5, 1), (5, 2), (5, 4))],
    "checkpoints": [(CHECKPOINTS[:m], 5, d) for m, d in ((2, 1), (4, 1), (4, 2))],
    "seeds": [(SEEDS, 5, d) for d in (1, 2)],
    "models of halves": [(HALVES[:m], 5, 1) for m in (1, 2, 4, 8)],
}
"""For each way the models, and the numbers of timesteps and of draws."""


def main(folder: str) -> None:
    """Computes the rows of every way, and writes them."""
    config = runpy.run_path(str(HERE.parent / "digits_benchmark.py"))["get_config"]()
    run = Run.at(config, folder)
    truth, paths, rows = truths(), {}, []
    for way, choices in WAYS.items():
        for models, timesteps, draws in choices:
            for model, pooled in itertools.product(models, (False, True)):
                key = model, timesteps, draws, pooled
                if key not in paths:
                    paths[key] = path_of(run, *key, truth)
            for pooled, name in itertools.product((False, True), truth):
                keys = [(model, timesteps, draws, pooled) for model in models]
                total = sum(paths[key][name] for key in keys).swapaxes(1, 2)
                usable = [i for i, path in enumerate(total) if np.isfinite(path).all()]
                grid = [GRID[i] for i in usable]
                for found in damping_rows(grid, total[usable], truth[name])[:-1]:
                    made = {"way": way, "models": len(models), "queries": name}
                    made |= {"gradients": len(models) * timesteps * draws}
                    made |= {"kernel": "pooled" if pooled else "apart"}
                    rows.append(made | found)
        files.write_json(FILE, saved(FILE) | {"rows": rows})


def path_of(
    run: Run, model: str, timesteps: int, draws: int, pooled: bool, truth: dict
) -> dict[str, np.ndarray]:
    """Returns the sums of a model's scores over subsets at every damping, by queries."""
    # Single timesteps are the middle ones.
    chosen = {1: TIMESTEPS[2:3], 3: TIMESTEPS[:3], 5: TIMESTEPS}[timesteps]
    task = run.task(measurement="loss", timesteps=chosen, draws=draws)
    if model in HALVES:
        where = member_steps(run.config), run.workdir / "ensemble"
        stack = training.load_members(run.network.init, [model], *where)
        params = jax.tree.map(lambda leaf: leaf[0], stack)
    else:
        params = run.params(model)
    name = f"{model.replace('/', '-') or 'main'}-{timesteps}-{draws}"
    folder = run.workdir / "cost-study" / name
    features = featurize(run, task, params, run.projection, folder)
    kernels = Kernels(features.pop("train"))
    return {
        name: damping_path(
            kernels, query, GRID, pooled=pooled, subsets=truth[name].masks
        )
        for name, query in features.items()
    }


if __name__ == "__main__":
    main(sys.argv[1])
