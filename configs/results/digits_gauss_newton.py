"""Holds influence with the Gauss-Newton matrix itself against EK-FAC and TRAK, on digits.

    python configs/results/digits_gauss_newton.py RUN WORKDIR

scores the first queries of a finished run of `configs/digits_benchmark.py`, RUN, whose losses
under retrained models are in digits_outputs.npz. WORKDIR keeps what is done, so that the same
command continues; digits_gauss_newton.json has what came out. With `--until-now` it is made
of the scores that are there.
"""

import functools
import json
import re
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
IMAGES = 1000
"""The noised images of the Gauss-Newton matrix: each training image at one of five
timesteps."""

SEARCHES = ((1e-3, 5, 24), (1e-3, 20, 8), (1e-2, 5, 24))
"""Dampings, iterations, and the queries of each set, its first ones; the first search of a
damping has the most."""


def main(run_folder: Path, workdir: Path, until_now: bool) -> None:
    """Computes scores one by one, and writes what they are worth."""
    config = runpy.run_path(str(HERE.parent / "digits_benchmark.py"))["get_config"]()
    run = Run.at(config, run_folder)
    found: dict[tuple, dict[str, np.ndarray]] = {}
    for key, make in wanted(run, workdir):
        path = workdir / f"{'-'.join(map(str, key))}.npz"
        if path.exists() or not until_now:
            found[key] = kept(path, make)
    settings = {"images": IMAGES, "cotangents": 1, "timesteps": list(run.task().grid)}
    result = {"settings": settings, "rows": list(rows(run, found))}
    path = HERE / "digits_gauss_newton.json"
    revision = json.loads(path.read_text())["revision"] if path.exists() else ""
    files.write_json(path, {"revision": revision} | result)


def wanted(run: Run, workdir: Path) -> Iterator[tuple[tuple, Callable]]:
    """Yields (method, damping, iterations, queries) and what makes these scores."""
    task, train = (
        run.task(measurement="loss", per_timestep=False),
        run.splits.train,
    )
    curvature = dtrak.ekfac(
        *(task, run.params(), train), store=workdir / "curvature.npz"
    )
    most, seen = max(count for *_, count in SEARCHES), set()
    yield ("trak", 0.1, 0, most), functools.partial(trak, run, most)
    for damping, iterations, count in SEARCHES:
        sets = {k: v.images[:count] for k, v in run.queries.items()}
        ids = {k: v.ids[:count] for k, v in run.queries.items()}
        how = {"damping": damping, "query_ids": ids}
        by_ekfac = functools.partial(dtrak.ekfac_influence, curvature, train, sets)
        if damping not in seen:
            yield ("ekfac", damping, 0, count), functools.partial(by_ekfac, **how)
        seen.add(damping)
        searched = functools.partial(
            dtrak.gauss_newton_influence, *(curvature, train, sets)
        )
        how |= {"iterations": iterations, "curvature_images": IMAGES}
        key = "gauss-newton", damping, iterations, count
        yield key, functools.partial(searched, **how)


def trak(run: Run, count: int) -> dict[str, dtrak.Scores]:
    """Returns TRAK's scores of the same gradients, kept apart, by the default damping."""
    how = run.task(measurement="loss"), run.params()
    train = dtrak.featurize(*how, run.splits.train, run.projection)
    query = {
        name: dtrak.featurize(
            *how, own.images[:count], run.projection, ids=own.ids[:count]
        )
        for name, own in run.queries.items()
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


def rows(run: Run, found: dict[tuple, dict[str, np.ndarray]]) -> Iterator[dict]:
    """Yields the LDS of each method's scores, and how much more it is than that of TRAK and
    of EK-FAC with the same damping, on the same queries."""
    saved = np.load(HERE / "digits_outputs.npz")
    for (method, damping, iterations, count), made in found.items():
        row = {"method": method, "damping": damping, "iterations": iterations}
        row["processor_seconds"] = float(made["seconds"])
        # A warning has the median of what is left of the queries' equations.
        if left := re.search(r"median of all is (\d\S*)\.", str(made["said"])):
            row["residual"] = float(left[1])
        others = {"ekfac": ("ekfac", damping, 0), "trak": ("trak", 0.1, 0)}
        for name, examples in run.queries.items():
            of_set = np.flatnonzero(saved["query_set"] == name)[:count]
            ids = saved["query_ids"][of_set]
            if list(ids) != list(examples.ids[:count]):
                raise ValueError(
                    f"{name}: the losses are of other queries than the run's."
                )
            truth = dtrak.RetrainedLosses(
                saved["outputs"][:, :, of_set], saved["masks"], ids, saved["train_ids"]
            )
            lds = dtrak.lds(made[name], truth)
            scored = {"queries": name, "count": count, "lds": lds.value}
            scored |= {"low": lds.low, "high": lds.high}
            for other, key in others.items():
                same = [s for k, s in found.items() if k[:3] == key and k[3] >= count]
                if same and other != method:
                    theirs = dtrak.lds(same[0][name][:count], truth)
                    scored[f"less_{other}"] = less(lds, theirs)
            yield row | scored


def less(ours: LDS, theirs: LDS) -> dict[str, float]:
    """Returns how much larger one LDS is, its interval over subsets and queries, and the
    standard error over queries alone."""
    apart = ours.per_query - theirs.per_query
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    return ours.less(theirs)._asdict() | {"error": float(error)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--until-now" in sys.argv)
