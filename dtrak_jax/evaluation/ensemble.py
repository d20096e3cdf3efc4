"""The ensemble of a run: trained, measured, and read again as the truth."""

import dataclasses
import hashlib

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
from dtrak_jax.attribution import Scores
from dtrak_jax.config import Config
from dtrak_jax.evaluation.lds import Truth
from dtrak_jax.evaluation.outputs import measure, timestep_grid


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


def member_steps(config: Config) -> int:
    """Of training on a subset: as many epochs as on everything."""
    return max(1, round(config.ensemble.fraction * config.train.steps))


def retrain(config: Config, workdir: epath.Path) -> None:
    """Trains the ensemble, or continues or extends it, and measures its losses."""
    settings = config.ensemble
    timestep_grid(settings.timesteps, diffusion.build(config.diffusion))
    splits = pipeline.load_data(config, workdir)
    queries = pipeline.load_queries(config, workdir, splits)
    model = models.build(config.model)

    def train(some: list[training.Member], steps: int, description: str):
        train_config = dataclasses.replace(config.train, steps=steps)
        training.train_members(
            models.init_fn(model),
            models.train_apply_fn(model),
            diffusion.build(config.diffusion),
            splits.train.images,
            some,
            train_config,
            workdir / "ensemble",
            flip=config.data.flip,
            description=description,
        )
        return train_config

    everything = np.arange(len(splits.train.ids))
    ensemble = members(config, splits)
    train_config = train(ensemble, member_steps(config), "retrain")
    others = [
        training.Member(name, everything, seed)
        for seed, name in enumerate(scoring.model_names(config))
    ]
    train(others, config.train.steps, "train models")
    _measure_outputs(config, workdir, queries, [m.name for m in ensemble], train_config)
    if parallel.is_primary():
        write_truth(config, workdir, splits, queries)
    parallel.wait_for_all("retrain")


def _measure_outputs(config, workdir, queries, names, train_config) -> None:
    """The losses of every query under every member; ensemble/MEMBER/outputs.npz."""
    model = models.build(config.model)
    images = np.concatenate([images for images, _ in queries.values()])
    ids = np.concatenate([ids for _, ids in queries.values()])
    wanted = {
        "query_ids": ids,
        "query_digests": digests(images),
        "settings": np.array(output_settings(config)),
    }
    mine = names[jax.process_index() :: jax.process_count()]
    left = [
        name
        for name in mine
        if not files.holds(workdir / "ensemble" / name / "outputs.npz", wanted)
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
                models.init_fn(model),
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
                config.ensemble,
            )
            for name, own in zip(group, losses, strict=True):
                path = workdir / "ensemble" / name / "outputs.npz"
                files.write_npz(path, outputs=own, **wanted)
            bar.update(len(group))
    parallel.wait_for_all("measure the ensemble")


def output_settings(config: Config) -> str:
    """What measured losses depend on, besides the member and the queries."""
    settings = config.ensemble
    return f"timesteps={settings.timesteps} draws={settings.draws} seed={settings.seed}"


def digests(images: np.ndarray) -> np.ndarray:
    """A hash of every image, str [n]: an id does not say which pixels were measured."""
    rows = np.ascontiguousarray(images)
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8) for row in rows)
    return np.array([one.hexdigest() for one in hashes])


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
        query_digests=np.concatenate([digests(x) for x, _ in queries.values()]),
        query_set=np.repeat(list(queries), [len(ids) for _, ids in queries.values()]),
        settings=output_settings(config),
    )


def load_truth(
    config: Config, workdir: epath.Path, splits: data.Splits, queries: dict
) -> dict[str, Truth]:
    """The ensemble's losses for each set of queries.

    Raises:
      FileNotFoundError: members are missing; names them, and the command.
      ValueError: the ensemble is of other training images or queries.
    """
    path = workdir / "ensemble" / "outputs.npz"
    wanted = config.ensemble.subsets, config.ensemble.seeds, output_settings(config)
    saved = files.read_npz(path) if path.exists() else None
    found = saved and (*saved["outputs"].shape[:2], str(saved["settings"]))
    if found != wanted:
        _refuse(config, workdir, splits, found, wanted)
    truth = {}
    for name, (images, ids) in queries.items():
        own = saved["query_set"] == name
        if not (
            np.array_equal(saved["query_ids"][own], ids)
            and np.array_equal(saved["query_digests"][own], digests(images))
        ):
            raise ValueError(
                f"{path} is of other {name} queries than this run's; delete it and run "
                "`dtrak-jax retrain`."
            )
        truth[name] = Truth(
            saved["outputs"][:, :, own].astype(np.float64),
            saved["masks"],
            saved["query_ids"][own],
            saved["train_ids"],
        )
    return truth


def _refuse(config, workdir, splits, found: tuple | None, wanted: tuple) -> None:
    """Says why there is no truth: members are missing, or it is another ensemble."""
    folder = workdir / "ensemble"
    names = [member.name for member in members(config, splits)]
    missing = [n for n in names if not (folder / n / "outputs.npz").exists()]
    remedy = "run `dtrak-jax retrain` with this config and workdir first."
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} models of the ensemble are missing in "
            f"{folder} ({shown}); {remedy}"
        )
    raise ValueError(
        f"{folder / 'outputs.npz'} is of subsets, seeds and losses {found}; the config "
        f"asks for {wanted}: {remedy}"
    )


def check_scores(scores: Scores, truth: Truth, what: str) -> None:
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
