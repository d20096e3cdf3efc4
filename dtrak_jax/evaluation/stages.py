"""The stages that say how far scores can be trusted; each continues what it finds.

They take much longer than the pipeline's own, since they train many models.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from dtrak_jax import (
    data,
    diffusion,
    files,
    models,
    parallel,
    pipeline,
    scoring,
)
from dtrak_jax.attribution import Scores, random_scores
from dtrak_jax.config import KERNELS, SQUARED, Config
from dtrak_jax.evaluation import ablations, counterfactual, lds
from dtrak_jax.evaluation.ensemble import (
    check_scores,
    load_truth,
    output_settings,
    retrain,
)
from dtrak_jax.evaluation.outputs import measure
from dtrak_jax.evaluation.statistics import interval
from dtrak_jax.features import Features, Projection, featurize


def evaluate(config: Config, workdir: epath.Path) -> None:
    """The linear datamodeling score of every method; lds.json."""
    settings = config.ensemble
    splits = pipeline.load_data(config, workdir)
    truths = load_truth(
        config, workdir, splits, pipeline.load_queries(config, workdir, splits)
    )
    queries = {
        name: _evaluate_queries(config, workdir, name, truth)
        for name, truth in truths.items()
    }
    if parallel.is_primary():
        described = {
            "subsets": settings.subsets,
            "seeds": settings.seeds,
            "fraction": settings.fraction,
            "timesteps": settings.timesteps,
            "draws": settings.draws,
            "resamples": lds.RESAMPLES,
        }
        result = {"settings": described, "queries": queries}
        files.write_json(workdir / "lds.json", result)
        print(table(result))
    parallel.wait_for_all("lds")


def _evaluate_queries(config, workdir, queries: str, truth: lds.Truth) -> dict:
    """What lds.json says of one set of queries."""
    rows, curves, samples = [], {}, {}

    def add(method, predictions, rule=None, damping=None, transform="linear"):
        estimate, drawn = lds.bootstrap(predictions, truth)
        if transform == "linear" and rule in (None, "label-free"):
            samples[method] = (estimate.value, drawn)
        row = _row(method, rule, damping, estimate, transform)
        rows.append(row | {"reference": lds.reference_interval(predictions, truth)})

    methods = [m for m in config.attribution.methods if scoring.applies(m, queries)]
    for method in tqdm(methods, desc=f"lds {queries}", unit="method", disable=None):
        if method in scoring.RETRAINING:
            function = scoring.RETRAINING[method]
            rows.append(_row(method, "halves", None, lds.from_halves(function, truth)))
            continue
        scores = pipeline.load_scores(workdir, method, queries)
        check_scores(scores, truth, f"{method}-{queries}.npz")
        rule = None if scores.damping is None else "label-free"
        damping = None if scores.damping is None else scores.damping[0]
        add(method, truth.predict(scores.scores), rule, damping)
        squared = truth.predict(np.square(scores.scores, dtype=np.float64))
        add(method, squared, rule, damping, "squared")
        if method in KERNELS and config.attribution.solver == "eigh":
            grid, predictions = lds.damping_path(
                Features.load(workdir / "features" / "train", KERNELS[method]),
                Features.load(workdir / "features" / queries, KERNELS[method]),
                truth.masks,
            )
            values = [lds.lds(p, truth) for p in predictions]
            curves[method] = {"damping": grid, "lds": values}
            best = int(np.argmax(values))
            add(method, predictions[best], "oracle", grid[best])
            estimate, chosen = lds.cross_fitted(predictions, truth)
            dampings = [grid[i] for i in chosen]
            rows.append(_row(method, "cross-fitted", dampings, estimate))
    # Subsets of one size give every constant the same sum.
    same = np.ones((len(truth.query_ids), len(truth.train_ids)))
    estimate, _ = lds.bootstrap(truth.predict(same), truth)
    rows.append(_row("constant", None, None, estimate))
    if "random" not in methods:
        add("random", truth.predict(random_scores(truth.train_ids, truth.query_ids, 0)))
    ceiling = lds.ceiling(truth)
    return {
        "ceiling": ceiling and ceiling._asdict(),
        "rows": rows,
        "differences": _differences(samples),
        "curves": curves,
    }


def _row(method, rule, damping, estimate, transform="linear") -> dict:
    return {"method": method} | lds.row(estimate, rule, damping, transform)


def _differences(samples: dict[str, tuple[float, np.ndarray]]) -> list[dict]:
    """Each method against the first one, from resamples that they share."""
    (first, (value, drawn)), *others = samples.items()
    differences = []
    for name, (other, other_drawn) in others:
        estimate = interval(value - other, drawn - other_drawn)
        differences.append({"a": first, "b": name, **estimate._asdict()})
    return differences


def table(result: dict) -> str:
    """lds.json as text."""
    lines = []
    for queries, one in result["queries"].items():
        lines += ["", f"{queries} queries: LDS [95% interval]"]
        if one["ceiling"]:
            ceiling = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**one["ceiling"])
            lines.append(f"  {'noise ceiling':<42} {ceiling}")
        for row in one["rows"]:
            name = row["method"] + (" squared" if row["transform"] == "squared" else "")
            if row["damping_rule"]:
                said = [row["damping_rule"]]
                if row["damping"] is not None:
                    said += [f"{value:.3g}" for value in np.atleast_1d(row["damping"])]
                name += f" ({', '.join(said)})"
            numbers = "{lds:.3f} [{low:.3f}, {high:.3f}]".format(**row)
            lines.append(f"  {name:<42} {numbers}")
    return "\n".join(lines)


def ablate(config: Config, workdir: epath.Path) -> None:
    """The rows of every study, those that are there excepted; ablations.json."""
    studies = ablations.studies(config)
    arms = [arm for name in config.ablation.studies for arm in studies[name]]
    splits = pipeline.load_data(config, workdir)
    queries = pipeline.load_queries(config, workdir, splits)
    truth = load_truth(config, workdir, splits, queries)
    images = {"train": (splits.train.images, splits.train.ids)} | queries
    # Arms of one source follow each other: what was interrupted is of one source.
    arms.sort(key=lambda arm: arm.source.name)
    rows = []
    with tqdm(total=len(arms), desc="ablate", unit="arm", disable=None) as bar:
        for arm in arms:
            own = {name: truth[name] for name in arm.queries if name in truth}
            rows += _arm_rows(config, workdir, arm, images, own)
            bar.update()
    rows.sort(key=lambda row: config.ablation.studies.index(row["name"]))
    ceilings = {name: lds.ceiling(one) for name, one in truth.items()}
    if parallel.is_primary():
        files.write_json(
            workdir / "ablations.json",
            {
                "rows": rows,
                "ceiling": {k: v and v._asdict() for k, v in ceilings.items()},
            },
        )
    parallel.wait_for_all("ablate")


def _arm_rows(config, workdir, arm, images, truth: dict[str, lds.Truth]) -> list[dict]:
    """The rows of one arm, from a file or computed."""
    path = workdir / "ablations" / "rows" / f"{arm.key}.json"
    shapes = {name: one.outputs.shape for name, one in truth.items()}
    against = f"{shapes} {output_settings(config)}"
    if parallel.agreed(path.exists() and files.read_json(path)["truth"] == against):
        return files.read_json(path)["rows"]
    train, *queries = (
        _source_features(config, workdir, arm.source, name, images)[arm.measurement]
        for name in ("train", *truth)
    )
    query = np.concatenate([one.pairs(arm.pairs) for one in queries], axis=1)
    rows = ablations.rows(arm, train.pairs(arm.pairs), query, truth)
    if parallel.is_primary():
        files.write_json(path, {"truth": against, "rows": rows})
    return rows


def _source_features(config, workdir, source, name: str, images) -> dict[str, Features]:
    """The features of one set of images in a store of their own, computed once."""
    if source.noise == "cyclic" and name == "train":
        # Only the queries' noise is shifted.
        source = dataclasses.replace(source, noise="common")
    task = dataclasses.replace(
        pipeline.task(config, source.noise),
        measurement=source.measurements,
        timesteps=source.timesteps,
        draws=source.draws,
        per_timestep=True,
        seed=source.seed,
    )
    store = workdir / "ablations" / "features" / source.name / name
    if parallel.agreed((store / "complete").exists()):
        return {m: Features.load(store / "store", m) for m in source.measurements}
    own, ids = images[name]
    features = featurize(
        task,
        pipeline.load_params(config, workdir, source.checkpoint),
        own,
        Projection(source.projection, source.dim, config.features.seed),
        ids=ids,
        store=store / "store",
        batch_size=config.features.batch_size,
        # Not proj_devices: these dense projections are small.
        description=f"{source.name} {name}",
    )
    if parallel.is_primary():
        # Saves the fingerprint, and with it a compilation, of every arm after this.
        files.write_bytes(store / "complete", b"")
    return features


def remove_and_retrain(config: Config, workdir: epath.Path) -> None:
    """Retrains without the top images of some generated ones; counterfactual.json."""
    settings, model = config.counterfactual, models.build(config.model)
    splits = pipeline.load_data(config, workdir)
    if config.sample.count == 0:
        raise ValueError(
            "sample.count is 0; counterfactuals compare generated images: it must be 1 "
            "or more."
        )
    images, ids = pipeline.load_samples(workdir)
    count = min(settings.queries, len(ids))
    chosen = data.choose(ids, None, count, settings.seed, "counterfactual")
    params = pipeline.load_params(config, workdir)
    schedule = diffusion.build(config.diffusion)

    def load_scores(method: str) -> Scores:
        scores = pipeline.load_scores(
            workdir, method.removesuffix(SQUARED), "generated"
        )
        if method.endswith(SQUARED):
            return dataclasses.replace(scores, scores=np.square(scores.scores))
        return scores

    def measure_losses(params, images, ids) -> np.ndarray:
        one = jax.tree.map(lambda leaf: leaf[None], params)
        apply = models.apply_fn(model)
        return measure(apply, schedule, one, images, ids, config.ensemble)[0]

    counterfactual.counterfactual(
        models.init_fn(model),
        models.train_apply_fn(model),
        schedule,
        lambda params, seeds: pipeline.generate(config, params, seeds),
        splits.train.images,
        splits.train.ids,
        {method: load_scores(method) for method in settings.methods},
        counterfactual.Generated(images, ids, pipeline.sample_seeds(config)),
        config.train,
        workdir,
        queries=ids[chosen],
        count=settings.count,
        params=params,
        measure=measure_losses,
        measured=output_settings(config),
        embeddings={
            "pixels": counterfactual.pixels,
            "bottleneck": counterfactual.bottleneck(
                model, params, schedule, splits.train.images
            ),
        },
        seed=settings.seed,
        flip=config.data.flip,
    )


STAGES: dict[str, Callable[[Config, epath.Path], object]] = {
    "retrain": retrain,
    "lds": evaluate,
    "ablate": ablate,
    "counterfactual": remove_and_retrain,
}


def run(stage: str, config: Config, workdir: epath.PathLike) -> epath.Path:
    """Runs one stage and returns the run directory."""
    workdir = pipeline.open_run(config, workdir)
    STAGES[stage](config, workdir)
    return workdir
