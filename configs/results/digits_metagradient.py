"""Holds metagradients and kernel scores of digits against training without some images.

    python configs/results/digits_metagradient.py WORKDIR

trains `configs/digits_metagradient.py` with weights of 0 for random images: with the seed,
order and noise of the model that is attributed, and with those of another seed. WORKDIR
keeps what is done, so that the same command continues; digits_metagradient.json has what
came out. With `--until-now` it is made of the subsets that are there.
"""

import itertools
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from studies import estimate, saved

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.evaluation.outputs import measure
from dtrak_jax.evaluation.statistics import spearman
from dtrak_jax.evaluation.truth import MIN_SUBSETS
from dtrak_jax.network import Params
from dtrak_jax.run import Run
from dtrak_jax.training.weighted import Course, train_weighted

HERE = Path(__file__).parent
DROPPED = (10, 50, 100, 500)
"""The numbers of images that are left out, of 1,000."""

SUBSETS = 24
SEEDS = {"same": 42, "other": 43}
"""The first is that of the model that is attributed."""


def main(workdir: Path, until_now: bool) -> None:
    """Computes scores, trains subset by subset, and writes the results."""
    config = runpy.run_path(str(HERE.parent / "digits_metagradient.py"))["get_config"]()
    run = Run(config, None)
    scores = kept(workdir / "scores.npz", lambda: all_scores(run, workdir))
    # As many subsets as an LDS needs come first, with both seeds, and then the next ones.
    parts = (range(i, i + MIN_SUBSETS) for i in range(0, SUBSETS, MIN_SUBSETS))
    choices = (itertools.product(SEEDS.items(), part, DROPPED) for part in parts)
    for (name, seed), subset, dropped in () if until_now else itertools.chain(*choices):
        weights = subset_weights(len(run.chosen.train), dropped, subset)

        def trained_losses(weights=weights, seed=seed):
            return {"losses": losses(run, train_weighted(course(run, seed), weights))}

        kept(workdir / f"{name}-{dropped}-{subset:02d}.npz", trained_losses)
    settings = {"dropped": DROPPED, "seeds": SEEDS, "steps": config.train.steps}
    seconds = {k: float(scores.pop(k)) for k in list(scores) if k.endswith("_seconds")}
    whole = scores.pop("losses")
    rows = [
        row for dropped in DROPPED for row in compared(workdir, dropped, scores, whole)
    ]
    result = {"settings": settings, "processor_seconds": seconds, "rows": rows}
    path = HERE / "digits_metagradient.json"
    files.write_json(path, saved(path) | result)


def kept(path: Path, make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """Returns the arrays in a file, which are made if it is not there."""
    if not path.exists():
        files.write_npz(path, **make())
    return files.read_npz(path)


def course(run: Run, seed: int) -> Course:
    """Returns the training of the config, with any seed."""
    recipe = run.recipe(run.config.train.steps)
    return Course(recipe, (run.chosen.train.images, None), seed=seed)


def subset_weights(n: int, dropped: int, subset: int) -> np.ndarray:
    """Returns weights of 0 for so many random images, and of 1 for the others, [n]."""
    weights = np.ones(n, np.float32)
    random = np.random.default_rng((dropped, subset))
    weights[random.choice(n, dropped, replace=False)] = 0
    return weights


def losses(run: Run, params: Params) -> np.ndarray:
    """Returns the losses of the queries under a model [queries]."""
    queries, stack = (
        run.chosen.validation,
        jax.tree.map(lambda leaf: leaf[None], params),
    )
    how = stack, queries.images, queries.ids, run.config.ensemble
    return measure(run.network.apply, run.schedule, *how)[0]


def all_scores(run: Run, workdir: Path) -> dict[str, np.ndarray]:
    """Returns the scores of each method, the losses of the model that is attributed, and
    the processor's seconds that they took, with compiling."""
    train, queries, settings = (
        run.chosen.train,
        run.chosen.validation,
        run.config.ensemble,
    )
    network, arrays = (run.network.apply, run.schedule), {}
    start = time.process_time()

    def lap(name: str) -> None:
        nonlocal start
        arrays[f"{name}_seconds"] = np.array(time.process_time() - start)
        start = time.process_time()

    once = course(run, run.config.train.seed)
    weights = np.ones(len(train), np.float32)
    train_weighted(once, weights)
    lap("compile_and_train")
    params = train_weighted(once, weights)
    lap("train")
    measured = dtrak.QueryLosses(
        *network,
        queries.images,
        ids=queries.ids,
        timesteps=settings.timesteps,
        draws=settings.draws,
        seed=settings.seed,
    )
    arrays["metagradient"] = dtrak.metagradients(
        *(once.recipe, train.images, measured),
        ids=train.ids,
        per_device=4,
        store=workdir,
    ).scores
    lap("metagradient")
    features = [
        dtrak.featurize(run.task(), params, images, run.projection, batch_size=32)
        for images in (train, queries)
    ]
    for method, measurement in {"trak": "loss", "dtrak": "square"}.items():
        pair = (images[measurement] for images in features)
        arrays[method] = dtrak.attribute(*pair, method=method).scores
    lap("kernels")
    return arrays | {"losses": losses(run, params)}


def compared(workdir: Path, dropped: int, scores: dict, whole: np.ndarray) -> Iterator:
    """Yields what each method predicts of leaving out so many images, for each seed."""
    found = {}
    for name in SEEDS:
        paths = {i: workdir / f"{name}-{dropped}-{i:02d}.npz" for i in range(SUBSETS)}
        there = {i: path for i, path in paths.items() if path.exists()}
        found[name] = {i: files.read_npz(path)["losses"] for i, path in there.items()}
        if len(there) < MIN_SUBSETS:
            return
        n = scores["trak"].shape[1]
        masks = np.array([subset_weights(n, dropped, i) > 0 for i in there])
        outputs = np.array([*found[name].values()])
        truth = dtrak.RetrainedLosses(outputs, masks)
        by_method = {method: dtrak.lds(own, truth) for method, own in scores.items()}
        for method, own in by_method.items():
            row = {"dropped": dropped, "seed": name, "subsets": len(masks)}
            row |= {"method": method} | estimate(own)
            if name == "same" and method == "metagradient":
                predicted = (~masks).astype(float) @ scores[method].T
                row["change"] = against(predicted, outputs - whole)
            if method != "metagradient":
                row["less"] = by_method["metagradient"].less(own)._asdict()
            yield row
    both = sorted(found["same"].keys() & found["other"].keys())
    pair = (np.array([losses[i] for i in both]) for losses in found.values())
    row = {
        "dropped": dropped,
        "seed": "other",
        "subsets": len(both),
        "method": "losses",
    }
    yield row | {"lds": float(spearman(*pair).mean())}


def against(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Returns the slope of actual changes over predicted ones, and their correlation."""
    slope = np.vdot(predicted, actual) / np.vdot(predicted, predicted)
    correlation = np.corrcoef(predicted.ravel(), actual.ravel())[0, 1]
    return {"slope": float(slope), "correlation": float(correlation)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--until-now" in sys.argv)
