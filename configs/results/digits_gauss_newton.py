"""Holds influence with the Gauss-Newton matrix itself against EK-FAC and TRAK, on digits.

    python configs/results/digits_gauss_newton.py RUN WORKDIR

scores the first queries of a finished run of `configs/digits_benchmark.py`, RUN, whose losses
under retrained models are in digits_outputs.npz. WORKDIR keeps what is done, so that the same
command continues; digits_gauss_newton.json has what came out. With `--until-now` it is made
of the scores that are there.
"""

import functools
import json
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.evaluation.trust import LDS
from dtrak_jax.run import Run

HERE = Path(__file__).parent
QUERIES = 24
"""The queries of each set, its first ones."""

IMAGES = 1000
"""The noised images of the Gauss-Newton matrix: each training image at one of five
timesteps."""

SEARCHES = ((1e-3, 5), (1e-2, 5), (1e-3, 20), (1e-2, 20), (1e-4, 20))
"""Dampings and iterations."""


def main(run_folder: Path, workdir: Path, until_now: bool) -> None:
    """Computes scores one by one, and writes what they are worth."""
    config = runpy.run_path(str(HERE.parent / "digits_benchmark.py"))["get_config"]()
    run = Run.at(config, run_folder)
    task = run.task(measurement="loss", per_timestep=False)
    train = run.splits.train
    curvature = dtrak.ekfac(
        *(task, run.params(), train), store=workdir / "curvature.npz"
    )
    arguments = curvature, train, {k: images(run, k) for k in run.queries}
    named = {"query_ids": {k: v.ids[:QUERIES] for k, v in run.queries.items()}}
    wanted: dict[str, Callable] = {"trak": lambda: trak(run)}
    for damping, iterations in SEARCHES:
        how = named | {"damping": damping}
        more = how | {"iterations": iterations, "curvature_images": IMAGES}
        wanted[f"ekfac {damping:g} 0"] = functools.partial(
            dtrak.ekfac_influence, *arguments, **how
        )
        wanted[f"gauss-newton {damping:g} {iterations}"] = functools.partial(
            dtrak.gauss_newton_influence, *arguments, **more
        )
    scores = {}
    for name, make in wanted.items():
        path = workdir / f"{name.replace(' ', '-')}.npz"
        if until_now and not path.exists():
            continue
        scores[name] = kept(path, make)
        write(run, scores)


def images(run: Run, queries: str) -> np.ndarray:
    """Returns the images of the first queries of a set."""
    return run.queries[queries].images[:QUERIES]


def trak(run: Run) -> dict[str, dtrak.Scores]:
    """Returns TRAK's scores of the same gradients, kept apart, by the default damping."""
    how = run.task(measurement="loss"), run.params()
    train = dtrak.featurize(*how, run.splits.train, run.projection)
    query = {
        name: dtrak.featurize(
            *how, images(run, name), run.projection, ids=examples.ids[:QUERIES]
        )
        for name, examples in run.queries.items()
    }
    return dtrak.attribute(train, query, method="trak")


def kept(path: Path, make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """Returns the scores in a file, with what they took, which is made if it is not there."""
    if not path.exists():
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = {name: own.scores for name, own in make().items()}
        said = " ".join(str(warning.message) for warning in caught)
        seconds = np.array(time.process_time() - start)
        files.write_npz(path, **scores, seconds=seconds, said=np.array(said))
    return files.read_npz(path)


def write(run: Run, scores: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes digits_gauss_newton.json."""
    settings = {"queries": QUERIES, "images": IMAGES, "cotangents": 1}
    settings["timesteps"] = list(run.task().grid)
    result = {"settings": settings, "rows": list(rows(run, scores))}
    path = HERE / "digits_gauss_newton.json"
    revision = json.loads(path.read_text())["revision"] if path.exists() else ""
    files.write_json(path, {"revision": revision} | result)


def rows(run: Run, scores: dict[str, dict[str, np.ndarray]]) -> Iterator[dict]:
    """Yields the LDS of each method's scores, and how much it is more than that of TRAK and
    of EK-FAC with the same damping."""
    saved = np.load(HERE / "digits_outputs.npz")
    for queries, examples in run.queries.items():
        own = np.flatnonzero(saved["query_set"] == queries)[:QUERIES]
        ids = saved["query_ids"][own]
        if list(ids) != list(examples.ids[:QUERIES]):
            raise ValueError(
                f"{queries}: the losses are of other queries than the run's."
            )
        truth = dtrak.RetrainedLosses(
            saved["outputs"][:, :, own], saved["masks"], ids, saved["train_ids"]
        )
        found = {name: dtrak.lds(made[queries], truth) for name, made in scores.items()}
        for name, lds in found.items():
            method, damping, iterations = (name.split() + [None, None])[:3]
            row = {"queries": queries, "method": method}
            if damping:
                row |= {"damping": float(damping), "iterations": int(iterations)}
            row |= {"lds": lds.value, "low": lds.low, "high": lds.high}
            row["processor_seconds"] = float(scores[name]["seconds"])
            row["said"] = str(scores[name]["said"])
            for other in ("trak", f"ekfac {damping} 0"):
                if other in found and other != name:
                    row[f"less {other.split()[0]}"] = less(lds, found[other])
            yield row


def less(ours: LDS, theirs: LDS) -> dict[str, float]:
    """Returns how much larger one LDS is, its interval over subsets and queries, and the
    standard error over queries alone."""
    apart = ours.per_query - theirs.per_query
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    return ours.less(theirs)._asdict() | {"error": float(error)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--until-now" in sys.argv)
