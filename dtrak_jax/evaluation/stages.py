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
    training,
)
from dtrak_jax.attribution import Scores, random_scores
from dtrak_jax.config import KERNELS, Config
from dtrak_jax.evaluation import ablations, counterfactual, lds
from dtrak_jax.evaluation.outputs import measure, timestep_grid
from dtrak_jax.evaluation.statistics import interval
from dtrak_jax.features import Features, Projection, featurize


def members(config: Config, splits: data.Splits) -> list[training.Member]:
    """The ensemble: all subsets with the first seed, then with the next one."""
    rows = [np.flatnonzero(mask) for mask in subset_masks(config, splits)]
    return [
        training.Member(f"{subset:04d}-{seed}", rows[subset], seed)
        for seed in range(config.ensemble.seeds)
        for subset in range(config.ensemble.subsets)
    ]


def subset_masks(config: Config, splits: data.Splits) -> np.ndarray:
    """Whether a training image is in a subset, bool [subsets, train]."""
    settings, train = config.ensemble, splits.train
    return np.stack(
        [
            data.subset_mask(
                train.ids, train.labels, settings.seed, subset, settings.fraction
            )
            for subset in range(settings.subsets)
        ]
    )


def retrain(config: Config, workdir: epath.Path) -> None:
    """Trains the ensemble, or continues or extends it, and measures its losses."""
    settings = config.ensemble
    timestep_grid(settings.timesteps, diffusion.build(config.diffusion))
    splits = pipeline.load_data(config, workdir)
    queries = pipeline.load_queries(config, workdir, splits)
    model = models.build(config.model)
    ensemble = members(config, splits)
    steps = max(1, round(settings.fraction * config.train.steps))
    train_config = dataclasses.replace(config.train, steps=steps)
    training.train_members(
        lambda key: models.init(model, key),
        models.train_apply_fn(model),
        diffusion.build(config.diffusion),
        splits.train.images,
        ensemble,
        train_config,
        workdir / "ensemble",
        flip=config.data.flip,
    )
    training.train_members(
        lambda key: models.init(model, key),
        models.train_apply_fn(model),
        diffusion.build(config.diffusion),
        splits.train.images,
        [
            training.Member(name, np.arange(len(splits.train.ids)), seed)
            for seed, name in enumerate(scoring.model_names(config))
        ],
        config.train,
        workdir / "ensemble",
        flip=config.data.flip,
        description="train models",
    )
    _measure_outputs(config, workdir, queries, [m.name for m in ensemble], train_config)
    if parallel.is_primary():
        write_truth(config, workdir, splits, queries)
    parallel.wait_for_all("retrain")


def _measure_outputs(config, workdir, queries, names, train_config) -> None:
    """The losses of every query under every member; ensemble/MEMBER/outputs.npz."""
    model, settings = models.build(config.model), config.ensemble
    images = np.concatenate([images for images, _ in queries.values()])
    ids = np.concatenate([ids for _, ids in queries.values()])
    wanted = _output_settings(config)
    mine = names[jax.process_index() :: jax.process_count()]
    left = [
        name
        for name in mine
        if not _is_measured(workdir / "ensemble" / name / "outputs.npz", wanted, ids)
    ]
    width = len(jax.local_devices())
    with tqdm(
        total=len(mine),
        initial=len(mine) - len(left),
        desc="measure",
        unit="model",
        disable=None,
    ) as bar:
        for start in range(0, len(left), width):
            group = left[start : start + width]
            params = training.load_members(
                lambda key: models.init(model, key),
                group,
                train_config,
                workdir / "ensemble",
            )
            losses = measure(
                models.apply_fn(model),
                diffusion.build(config.diffusion),
                params,
                images,
                ids,
                timesteps=settings.timesteps,
                draws=settings.draws,
                seed=settings.seed,
                batch_size=settings.batch_size,
            )
            for name, own in zip(group, losses, strict=True):
                path = workdir / "ensemble" / name / "outputs.npz"
                files.write_npz(path, outputs=own, query_ids=ids, settings=wanted)
            bar.update(len(group))
    parallel.wait_for_all("measure the ensemble")


def _output_settings(config: Config) -> str:
    """What measured losses depend on, besides the member and the queries."""
    settings = config.ensemble
    return f"timesteps={settings.timesteps} draws={settings.draws} seed={settings.seed}"


def _is_measured(path: epath.Path, settings: str, ids: np.ndarray) -> bool:
    if not path.exists():
        return False
    there = files.read_npz(path)
    return str(there["settings"]) == settings and np.array_equal(
        there["query_ids"], ids
    )


def write_truth(config: Config, workdir: epath.Path, splits, queries) -> None:
    """Gathers the members' losses: ensemble/outputs.npz."""
    settings, ensemble = config.ensemble, members(config, splits)
    outputs = [
        files.read_npz(workdir / "ensemble" / member.name / "outputs.npz")["outputs"]
        for member in ensemble
    ]
    shape = (settings.seeds, settings.subsets, -1)
    files.write_npz(
        workdir / "ensemble" / "outputs.npz",
        outputs=np.stack(outputs).reshape(shape).swapaxes(0, 1).astype(np.float32),
        masks=subset_masks(config, splits),
        train_ids=splits.train.ids,
        query_ids=np.concatenate([ids for _, ids in queries.values()]),
        query_set=np.repeat(list(queries), [len(ids) for _, ids in queries.values()]),
        settings=_output_settings(config),
    )


def load_truth(config: Config, workdir: epath.Path) -> dict[str, lds.Truth]:
    """The ensemble's losses for each set of queries.

    Raises:
      FileNotFoundError: members are missing; names them, and the command.
      ValueError: the ensemble is of other training images or queries.
    """
    path = workdir / "ensemble" / "outputs.npz"
    splits = pipeline.load_data(config, workdir)
    names = [member.name for member in members(config, splits)]
    folder = workdir / "ensemble"
    missing = [n for n in names if not (folder / n / "outputs.npz").exists()]
    if missing or not path.exists():
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} models of the ensemble are missing"
            f"{f' ({shown})' if missing else ''} in {folder}; run `dtrak-jax retrain` "
            "with this config and workdir first."
        )
    saved = files.read_npz(path)
    settings = config.ensemble
    shape = (settings.subsets, settings.seeds)
    if saved["outputs"].shape[:2] != shape or str(saved["settings"]) != (
        _output_settings(config)
    ):
        raise ValueError(
            f"{path} holds {saved['outputs'].shape[:2]} subsets and seeds with "
            f"{saved['settings']}; the config asks for {shape} with "
            f"{_output_settings(config)}. Run `dtrak-jax retrain` with this config."
        )
    queries = pipeline.load_queries(config, workdir, splits)
    truth = {}
    for name, (_, ids) in queries.items():
        own = saved["query_set"] == name
        if not np.array_equal(saved["query_ids"][own], ids):
            raise ValueError(
                f"{path} is of other {name} queries than this run's; delete it and run "
                "`dtrak-jax retrain`."
            )
        truth[name] = lds.Truth(
            saved["outputs"][:, :, own].astype(np.float64),
            saved["masks"],
            saved["query_ids"][own],
            saved["train_ids"],
        )
    return truth


def check_scores(scores: Scores, truth: lds.Truth, what: str) -> None:
    """Raises a ValueError unless scores and ensemble are of the same examples."""
    for field in ("train_ids", "query_ids"):
        own, wanted = getattr(scores, field), getattr(truth, field)
        if not np.array_equal(own, wanted):
            raise ValueError(
                f"{what} has other {field} than the ensemble ({len(own)} and "
                f"{len(wanted)}, first {own[:1]} and {wanted[:1]}); they must be of "
                "the same images in the same order. Run `dtrak-jax attribute` and "
                "`dtrak-jax retrain` in one workdir with one config."
            )


def evaluate(config: Config, workdir: epath.Path) -> None:
    """The linear datamodeling score of every method; lds.json."""
    settings = config.ensemble
    queries = {
        name: _evaluate_queries(config, workdir, name, truth)
        for name, truth in load_truth(config, workdir).items()
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
        if method in KERNELS:
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
    row = {"method": method, "damping_rule": rule, "damping": damping}
    row |= {"transform": transform, "lds": estimate.value}
    return row | {"low": estimate.low, "high": estimate.high}


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
    truth = load_truth(config, workdir)
    splits = pipeline.load_data(config, workdir)
    images = {"train": (splits.train.images, splits.train.ids)}
    images |= pipeline.load_queries(config, workdir, splits)
    # Arms of one source follow each other, so that its features are read once.
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
    against = f"{shapes} {_output_settings(config)}"
    if path.exists() and (saved := files.read_json(path))["truth"] == against:
        return saved["rows"]
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
    if (store / "complete").exists():
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
    scores = {
        method: pipeline.load_scores(workdir, method, "generated")
        for method in settings.methods
    }
    params = pipeline.load_params(config, workdir)
    schedule = diffusion.build(config.diffusion)
    counterfactual.counterfactual(
        lambda key: models.init(model, key),
        models.train_apply_fn(model),
        schedule,
        lambda params, seeds: pipeline.generate(config, params, seeds),
        splits.train.images,
        splits.train.ids,
        scores,
        counterfactual.Generated(images, ids, pipeline.sample_seeds(config)),
        config.train,
        workdir,
        queries=ids[chosen],
        count=settings.count,
        embeddings={
            "pixels": counterfactual.pixels,
            "bottleneck": counterfactual.bottleneck(model, params, schedule),
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
