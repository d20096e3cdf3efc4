"""The stages in order, and the run directory that they read and write.

A stage reads what earlier stages left, computes what is not there yet, and writes it;
running it again continues it. See the README for the files.
"""

import dataclasses
import io
import platform
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np
from etils import epath

from dtrak_jax import (
    data,
    diffusion,
    files,
    models,
    parallel,
    report,
    scoring,
    training,
)
from dtrak_jax.attribution import Scores
from dtrak_jax.config import METHODS, Config, flatten, shown_methods
from dtrak_jax.features import Projection, Task, distortion, featurize

FREE_FIELDS = (
    "ablation.",
    "attribution.methods",
    "attribution.solver",
    "ensemble.models",
    "counterfactual.",
    "ensemble.batch_size",
    "ensemble.draws",
    "ensemble.seeds",
    "ensemble.subsets",
    "ensemble.timesteps",
    "features.batch_size",
    "features.proj_devices",
    "report.",
    "sample.batch_size",
    "train.fsdp",
)
"""Settings that may change within a run directory: they change no file that is there,
or only files that know their settings and are made again."""

DISTORTION_EXAMPLES = 8


def open_run(config: Config, workdir: epath.PathLike) -> epath.Path:
    """Makes the run directory, or checks that it belongs to this config.

    Raises:
      ValueError: it was made with another config (names the fields that differ), or
        holds something else.
    """
    workdir = files.at(workdir)
    path = workdir / "config.json"
    settings = flatten(config)
    packages = ("dtrak-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    versions["python"] = platform.python_version()
    made = {"config": settings, "versions": versions}
    if parallel.is_primary() and not path.exists():
        if not files.is_empty(workdir):
            raise ValueError(
                f"{workdir} is not empty and holds no run; name another --workdir."
            )
        files.write_json(path, made)
    # Early, as gloo gives the processes 30 s to come to their first collective.
    parallel.wait_for_all(f"make {workdir}")
    there, here = (
        {k: v for k, v in one.items() if not k.startswith(FREE_FIELDS)}
        for one in (files.read_json(path)["config"], settings)
    )
    differs = files.differences(there, here)
    if differs:
        raise ValueError(
            f"{workdir} belongs to another config: {'; '.join(differs)}. Name "
            "another --workdir, or delete that one."
        )
    if parallel.is_primary():
        files.write_json(path, made)
    return workdir


def load_data(config: Config, workdir: epath.Path) -> data.Splits:
    """The training and validation images; writes splits.npz."""
    model = config.model
    splits = data.load(config.data, model.sample_size, model.in_channels)
    path = workdir / "splits.npz"
    if parallel.is_primary() and not path.exists():
        labels = {}
        if splits.train.labels is not None:
            labels["train_labels"] = splits.train.labels
            labels["validation_labels"] = splits.validation.labels
            labels["label_names"] = np.array(splits.train.label_names)
        files.write_npz(
            path,
            train_ids=splits.train.ids,
            validation_ids=splits.validation.ids,
            **labels,
        )
    return splits


def train(config: Config, workdir: epath.Path):
    """Trains the model, or continues; returns its parameters."""
    model = models.build(config.model)
    splits = load_data(config, workdir)
    params = training.train(
        models.init_fn(model),
        models.train_apply_fn(model),
        diffusion.build(config.diffusion),
        splits.train.images,
        config.train,
        workdir,
        flip=config.data.flip,
    )
    parallel.wait_for_all("train")
    return params


def load_params(config: Config, workdir: epath.Path, step: int | None = None):
    """The parameters of a step that training kept; of the last one if None."""
    model = models.build(config.model)
    return training.load_params(models.init_fn(model), config.train, workdir, step)


def load_model(config: Config, workdir: epath.Path, name: str):
    """The parameters of one of `scoring.model_names`."""
    model = models.build(config.model)
    try:
        stack = training.load_members(
            models.init_fn(model),
            [name],
            config.train,
            workdir / "ensemble",
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Run `dtrak-jax retrain` with this config and workdir first."
        ) from error
    return jax.tree.map(lambda leaf: leaf[0], stack)


def sample(config: Config, workdir: epath.Path) -> None:
    """Generates images: samples/00000.png, ..., and all of them in samples.npz.

    Each process generates its share, and writes these pictures.
    """
    count = config.sample.count
    path = workdir / "samples" / "samples.npz"
    if count == 0 or parallel.agreed(path.exists()):
        return
    seeds, mine = sample_seeds(config), parallel.share(count)
    images = generate(config, load_params(config, workdir), seeds[mine])
    if not np.isfinite(images).all():
        raise FloatingPointError(
            "a generated image has pixels that are not finite; is the model trained?"
        )
    pixels = data.to_pixels(images)
    for i, image in enumerate(pixels, start=mine.start):
        buffer = io.BytesIO()
        data.to_picture(image).save(buffer, "png")
        files.write_bytes(workdir / "samples" / f"{i:05d}.png", buffer.getvalue())
    # Its file says that all of them are there.
    pixels = parallel.gather(pixels, count)
    if parallel.is_primary():
        ids = np.array([f"generated-{i:05d}" for i in range(count)])
        files.write_npz(path, images=pixels, ids=ids, seeds=seeds)
    parallel.wait_for_all("sample")


def sample_seeds(config: Config) -> np.ndarray:
    """One for each image to generate; image i of seed s has s * 1000 + i, as in the
    reference."""
    return config.sample.seed * 1000 + np.arange(config.sample.count)


def generate(config: Config, params, seeds: np.ndarray, **options):
    """What `diffusion.sample` makes with the config's model and sampler."""
    settings, model = config.sample, config.model
    return diffusion.sample(
        models.apply_fn(models.build(model)),
        params,
        diffusion.build(config.diffusion),
        seeds,
        (model.sample_size, model.sample_size, model.out_channels),
        sampler=settings.sampler,
        steps=settings.steps,
        eta=settings.eta,
        clip=settings.clip,
        batch_size=settings.batch_size,
        **options,
    )


def load_samples(workdir: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """(images in [-1, 1], ids) of the generated images, from their 8-bit pixels."""
    path = workdir / "samples" / "samples.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; run `dtrak-jax sample` with this config and workdir "
            "first."
        )
    saved = files.read_npz(path)
    return saved["images"].astype(np.float32) / 127.5 - 1, saved["ids"]


def query_sets(config: Config) -> list[str]:
    """Which of "validation" and "generated" a config has images of."""
    counts = {"validation": config.data.validation, "generated": config.sample.count}
    return [name for name, count in counts.items() if count]


def load_queries(
    config: Config, workdir: epath.Path, splits: data.Splits
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"validation": (images, ids), "generated": (images, ids)}; no empty ones."""
    load = {
        "validation": lambda: (splits.validation.images, splits.validation.ids),
        "generated": lambda: load_samples(workdir),
    }
    return {name: load[name]() for name in query_sets(config)}


def projection(config: Config) -> Projection:
    """The config's projection."""
    settings = config.features
    return Projection(settings.projection, settings.dim, settings.seed)


def task(config: Config, noise: str) -> Task:
    """What the config's features are gradients of."""
    settings = config.features
    return Task(
        models.apply_fn(models.build(config.model)),
        diffusion.build(config.diffusion),
        measurement=settings.measurements,
        timesteps=settings.timesteps,
        strategy=settings.strategy,
        noise=noise,
        noise_batch=settings.noise_batch,
        draws=settings.draws,
        per_timestep=settings.per_timestep,
        parameters=settings.parameters,
        seed=settings.seed,
    )


def compute_features(config: Config, workdir: epath.Path) -> None:
    """All features that the methods need; features/..."""
    splits = load_data(config, workdir)
    queries = load_queries(config, workdir, splits)
    sets = {"train": (splits.train.images, splits.train.ids)} | queries
    methods, place = config.attribution.methods, workdir / "features"
    params = load_params(config, workdir)
    _featurize(config, params, sets, config.features.measurements, place)
    if not {"tracin", "gas"}.isdisjoint(methods):
        for step in training.kept_steps(config.train)[:-1]:
            at_step = load_params(config, workdir, step)
            _featurize(
                config, at_step, sets, ("loss",), place / "checkpoints" / str(step)
            )
    measurements = tuple(METHODS[m] for m in methods if m.endswith("-ensemble"))
    for name in scoring.model_names(config) if measurements else ():
        other = load_model(config, workdir, name)
        _featurize(config, other, sets, measurements, place / "models" / name)
    if "journey-trak" in methods and "generated" in queries:
        _featurize_journey(config, workdir, params, queries["generated"][1])
    path = place / "distortion.json"
    if (
        config.features.projection != "none"
        and len(splits.train.images) > 1
        and not parallel.agreed(path.exists())
    ):
        measured = distortion(
            task(config, config.features.noise),
            params,
            splits.train.images[:DISTORTION_EXAMPLES],
            projection(config),
            ids=splits.train.ids[:DISTORTION_EXAMPLES],
            batch_size=config.features.batch_size,
            proj_devices=config.features.proj_devices,
        )
        if parallel.is_primary():
            files.write_json(path, {k: v._asdict() for k, v in measured.items()})
    parallel.wait_for_all("featurize")


def _featurize(config, params, sets, measurements, folder: epath.Path) -> None:
    """The features of each set of images under one model; folder/SET."""
    settings = config.features
    label = "featurize" + str(folder).rpartition("features")[2].replace("/", " ")
    for name, (images, ids) in sets.items():
        # Cyclic noise is a control in which only the queries' noise is shifted.
        shifted = settings.noise == "cyclic" and name == "train"
        noise = "common" if shifted else settings.noise
        featurize(
            dataclasses.replace(task(config, noise), measurement=tuple(measurements)),
            params,
            images,
            projection(config),
            ids=ids,
            store=folder / name,
            batch_size=settings.batch_size,
            proj_devices=settings.proj_devices,
            description=f"{label} {name}",
        )


def _featurize_journey(config, workdir, params, ids: np.ndarray) -> None:
    """Features of the images predicted on the way to each sample; features/journey.

    Journey TRAK (Georgiev et al. 2023, arXiv 2312.06205): gradients of the loss at
    every sampling timestep t, of the image that was predicted there, averaged. Where
    timesteps are kept apart, at each of the task's own timesteps, of the image that was
    predicted at the sampling timestep closest to it, so that it meets its kernel.
    """
    schedule = diffusion.build(config.diffusion)
    through = diffusion.sampling_timesteps(schedule, config.sample.steps)
    journey = dataclasses.replace(
        task(config, config.features.noise), measurement="loss"
    )
    if not journey.per_timestep:
        journey = dataclasses.replace(journey, timesteps=tuple(map(int, through)))
    # As they were predicted: not rounded to pixels, but clipped as training images are.
    seeds, mine = sample_seeds(config), parallel.share(len(ids))
    _, predicted = generate(config, params, seeds[mine], trajectory=True)
    steps = [int(np.argmin(np.abs(through - t))) for t, _ in journey.pairs]
    # One after the other: all of them may not fit on a device.
    images = [parallel.gather(predicted[:, step], len(ids)) for step in steps]
    featurize(
        journey,
        params,
        np.clip(np.stack(images, axis=1), -1, 1),
        projection(config),
        ids=ids,
        store=workdir / "features" / "journey",
        batch_size=config.features.batch_size,
        proj_devices=config.features.proj_devices,
        description="featurize journey",
    )


def compute_scores(config: Config, workdir: epath.Path) -> None:
    """Scores of every method for every set of queries; scores/METHOD-QUERIES.npz."""
    splits = load_data(config, workdir)
    queries = load_queries(config, workdir, splits)
    run = scoring.Run(config, workdir, splits, queries)
    for method in config.attribution.methods:
        scores = scoring.score(run, method)
        if parallel.is_primary():
            for name, result in scores.items():
                result.save(workdir / "scores" / f"{method}-{name}.npz")
    parallel.wait_for_all("attribute")


def load_scores(workdir: epath.Path, method: str, queries: str) -> Scores:
    """What `compute_scores` wrote for one method and one set of queries."""
    path = workdir / "scores" / f"{method}-{queries}.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; run `dtrak-jax attribute` with this config and "
            "workdir first."
        )
    return Scores.load(path)


def write_report(config: Config, workdir: epath.Path) -> None:
    """report.html, from whatever the stages before it left."""
    splits = load_data(config, workdir)
    queries = load_queries(config, workdir, splits)
    scores = {}
    for name in queries:
        for method in shown_methods(config):
            if not scoring.applies(method, name):
                continue
            scores[name, method] = load_scores(workdir, method, name)
    if parallel.is_primary():
        page = report.page(
            config, workdir, splits.train, queries=queries, scores=scores
        )
        files.write_bytes(workdir / "report.html", page.encode())
    parallel.wait_for_all("report")


STAGES: dict[str, Callable[[Config, epath.Path], object]] = {
    "train": train,
    "sample": sample,
    "featurize": compute_features,
    "attribute": compute_scores,
    "report": write_report,
}
"""In order; `run` does all of them."""


def run(stage: str, config: Config, workdir: epath.PathLike) -> epath.Path:
    """Runs one stage, or all of them for "run", and returns the run directory."""
    workdir = open_run(config, workdir)
    for name in STAGES if stage == "run" else [stage]:
        STAGES[name](config, workdir)
    return workdir
