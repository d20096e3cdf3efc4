"""Holds influence with the Gauss-Newton matrix itself against EK-FAC and TRAK, on digits.

    python configs/results/digits_gauss_newton_cg.py RUN WORKDIR

scores the first queries of a finished run of `configs/digits_benchmark.py`, RUN, whose losses
under retrained models are in digits_outputs.npz. WORKDIR keeps what is done, so that the same
command continues; digits_gauss_newton_cg.json has what came out. With `--until-now` it is made
of the scores that are there.
"""

import collections
import functools
import re
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from studies import estimate, saved, truths

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.evaluation.trust import LDS
from dtrak_jax.run import Run

HERE = Path(__file__).parent
IMAGES = 1000
"""The noised images of the Gauss-Newton matrix: each training image at one of five
timesteps."""

QUERIES, PART = 24, 8
"""The queries of each set, its first ones, and as many as are scored at a time."""

SEARCHES = ((1e-3, 5), (1e-3, 20), (1e-2, 5))
"""Dampings and iterations."""

Found = dict[tuple[str, float, int], list[dict[str, np.ndarray]]]
"""{(method, damping, iterations): scores of each part of the queries}."""


def main(run_folder: Path, workdir: Path, until_now: bool) -> None:
    """Computes scores part by part, and writes what they are worth."""
    config = runpy.run_path(str(HERE.parent / "digits_benchmark.py"))["get_config"]()
    run, found = Run.at(config, run_folder), collections.defaultdict(list)
    task = run.task(measurement="loss", per_timestep=False)
    curvature = dtrak.ekfac(
        *(task, run.params(), run.splits.train), store=workdir / "curvature.npz"
    )
    for key, start in wanted():
        path = workdir / f"{'-'.join(map(str, key))}-{start}.npz"
        if path.exists() or not until_now:
            make = functools.partial(scores, run, curvature, *key, start)
            found[key].append(kept(path, make))
    settings = {"images": IMAGES, "cotangents": 1, "timesteps": list(run.task().grid)}
    result = {"settings": settings, "rows": list(rows(run, found))}
    path = HERE / "digits_gauss_newton_cg.json"
    files.write_json(path, saved(path) | result)


def wanted() -> Iterator[tuple[tuple, int]]:
    """Yields (method, damping, iterations) and the first query of a part."""
    by_ekfac = dict.fromkeys(("ekfac", damping, 0) for damping, _ in SEARCHES)
    searches = (("gauss-newton-cg", *search) for search in SEARCHES)
    for key in (("trak", 0.1, 0), *by_ekfac, *searches):
        yield from ((key, start) for start in range(0, QUERIES, PART))


def scores(
    run: Run,
    curvature: dtrak.features.Curvature,
    method: str,
    damping: float,
    iterations: int,
    start: int,
) -> dict[str, dtrak.Scores]:
    """Returns the scores of a part of each set of queries."""
    rows = slice(start, start + PART)
    images = {k: v.images[rows] for k, v in run.queries.items()}
    ids = {k: v.ids[rows] for k, v in run.queries.items()}
    if method == "trak":
        return trak(run, images, ids)
    arguments = curvature, run.splits.train, images
    how = {"damping": damping, "query_ids": ids}
    if method == "ekfac":
        return dtrak.ekfac_influence(*arguments, **how)
    how |= {"iterations": iterations, "curvature_images": IMAGES}
    return dtrak.gauss_newton_influence(*arguments, **how)


def trak(run: Run, images: dict, ids: dict) -> dict[str, dtrak.Scores]:
    """Returns TRAK's scores of the same gradients, kept apart, by the default damping."""
    how = run.task(measurement="loss"), run.params()
    train = dtrak.featurize(*how, run.splits.train, run.projection)
    query = {
        name: dtrak.featurize(*how, images[name], run.projection, ids=ids[name])
        for name in images
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


def rows(run: Run, found: Found) -> Iterator[dict]:
    """Yields the LDS of each method's scores, and how much more it is than that of TRAK and
    of EK-FAC with the same damping, on the same queries."""
    for (method, damping, iterations), parts in found.items():
        row = {"method": method, "damping": damping, "iterations": iterations}
        row["count"] = PART * len(parts)
        row["processor_seconds"] = sum(float(part["seconds"]) for part in parts)
        # A warning has the median of what is left of the queries' equations.
        said = " ".join(str(part["said"]) for part in parts)
        if left := re.findall(r"median of all is (\d\S*)\.", said):
            row["residual"] = float(np.median(np.array(left, float)))
        others = {"ekfac": ("ekfac", damping, 0), "trak": ("trak", 0.1, 0)}
        for name, examples in run.queries.items():
            truth = truths(count=row["count"])[name]
            if list(truth.query_ids) != list(examples.ids[: row["count"]]):
                raise ValueError(
                    f"{name}: the losses are of other queries than the run's."
                )

            def lds(parts: list, name=name, truth=truth) -> LDS:
                whole = np.concatenate([part[name] for part in parts])
                return dtrak.lds(whole[: len(truth.query_ids)], truth)

            own = lds(parts)
            scored = {"queries": name} | estimate(own)
            for other, key in others.items():
                if other != method and len(found.get(key, ())) >= len(parts):
                    scored[f"less_{other}"] = less(own, lds(found[key]))
            yield row | scored


def less(ours: LDS, theirs: LDS) -> dict[str, float]:
    """Returns how much larger one LDS is, its interval over subsets and queries, and the
    standard error over queries alone."""
    apart = ours.per_query - theirs.per_query
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    return ours.less(theirs)._asdict() | {"error": float(error)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--until-now" in sys.argv)
