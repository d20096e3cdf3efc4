"""The stages in order, and the run directory that they read and write.

A stage reads what earlier stages left, computes what is not there yet, and writes it;
running it again continues it. See the README for the files.
"""

import io
import platform
from collections.abc import Callable
from importlib import metadata

import numpy as np
from etils import epath

from dtrak_jax import data, diffusion, files, models, parallel, report, training
from dtrak_jax.attribution import Damping, Scores, attribute
from dtrak_jax.config import METHODS, Config, flatten
from dtrak_jax.features import Features, Projection, Task, distortion, featurize

FREE_FIELDS = ("features.batch_size", "sample.batch_size", "report.")
"""Settings that may change within a run directory: they change no result."""

DISTORTION_EXAMPLES = 8


def open_run(config: Config, workdir: epath.PathLike) -> epath.Path:
    """Makes the run directory, or checks that it belongs to this config.

    Raises:
      ValueError: it was made with another config (names the fields that differ), or
        holds something else.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    settings = flatten(config)
    packages = ("dtrak-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    versions["python"] = platform.python_version()
    if not path.exists() and workdir.exists() and any(workdir.iterdir()):
        raise ValueError(
            f"{workdir} is not empty and holds no run; name another --workdir."
        )
    if path.exists():
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
        files.write_json(path, {"config": settings, "versions": versions})
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
    return training.train(
        lambda key: models.init(model, key),
        models.train_apply_fn(model),
        diffusion.build(config.diffusion),
        splits.train.images,
        config.train,
        workdir,
        flip=config.data.flip,
    )


def load_params(config: Config, workdir: epath.Path):
    """The trained parameters."""
    model = models.build(config.model)
    return training.load_params(
        lambda key: models.init(model, key), config.train, workdir
    )


def sample(config: Config, workdir: epath.Path) -> None:
    """Generates images: samples/00000.png, ..., and all of them in samples.npz."""
    settings, model = config.sample, config.model
    path = workdir / "samples" / "samples.npz"
    if settings.count == 0 or path.exists():
        return
    # The reference's seeds: image i of seed s has s * 1000 + i.
    seeds = settings.seed * 1000 + np.arange(settings.count)
    images = diffusion.sample(
        models.apply_fn(models.build(model)),
        load_params(config, workdir),
        diffusion.build(config.diffusion),
        seeds,
        (model.sample_size, model.sample_size, model.out_channels),
        sampler=settings.sampler,
        steps=settings.steps,
        eta=settings.eta,
        clip=settings.clip,
        batch_size=settings.batch_size,
    )
    if not np.isfinite(images).all():
        raise FloatingPointError(
            "a generated image has pixels that are not finite; is the model trained?"
        )
    pixels = data.to_pixels(images)
    if parallel.is_primary():
        for i, image in enumerate(pixels):
            buffer = io.BytesIO()
            data.to_picture(image).save(buffer, "png")
            files.write_bytes(workdir / "samples" / f"{i:05d}.png", buffer.getvalue())
        ids = np.array([f"generated-{i:05d}" for i in range(settings.count)])
        files.write_npz(path, images=pixels, ids=ids, seeds=seeds)
    parallel.wait_for_all("sample")


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
    """Features of the training images and of all queries; features/NAME."""
    settings = config.features
    projection = Projection(settings.projection, settings.dim, settings.seed)
    splits = load_data(config, workdir)
    sets = {"train": (splits.train.images, splits.train.ids)}
    sets |= load_queries(config, workdir, splits)
    params = load_params(config, workdir)
    for name, (images, ids) in sets.items():
        # Cyclic noise is a control in which only the queries' noise is shifted.
        shifted = settings.noise == "cyclic" and name == "train"
        featurize(
            task(config, "common" if shifted else settings.noise),
            params,
            images,
            projection,
            ids=ids,
            store=workdir / "features" / name,
            batch_size=settings.batch_size,
            description=f"featurize {name}",
        )
    path = workdir / "features" / "distortion.json"
    if projection.kind != "none" and len(splits.train.images) > 1 and not path.exists():
        few = splits.train.images[:DISTORTION_EXAMPLES]
        measured = distortion(
            task(config, settings.noise),
            params,
            few,
            projection,
            ids=splits.train.ids[:DISTORTION_EXAMPLES],
            batch_size=settings.batch_size,
        )
        if parallel.is_primary():
            files.write_json(path, {k: v._asdict() for k, v in measured.items()})


def compute_scores(config: Config, workdir: epath.Path) -> None:
    """Scores of every method for every set of queries; scores/METHOD-QUERIES.npz."""
    settings = config.attribution
    for method in settings.methods:
        measurement = METHODS[method]
        scores = attribute(
            Features.load(workdir / "features" / "train", measurement),
            {
                name: Features.load(workdir / "features" / name, measurement)
                for name in query_sets(config)
            },
            method=method,
            damping=Damping(settings.damping, settings.absolute),
        )
        if parallel.is_primary():
            for name, result in scores.items():
                result.save(workdir / "scores" / f"{method}-{name}.npz")
    parallel.wait_for_all("attribute")


def write_report(config: Config, workdir: epath.Path) -> None:
    """report.html, from whatever the stages before it left."""
    splits = load_data(config, workdir)
    queries = load_queries(config, workdir, splits)
    scores = {}
    for name in queries:
        for method in config.attribution.methods:
            path = workdir / "scores" / f"{method}-{name}.npz"
            if not path.exists():
                raise FileNotFoundError(
                    f"there is no {path}; run `dtrak-jax attribute` with this config "
                    "and workdir first."
                )
            scores[name, method] = Scores.load(path)
    if parallel.is_primary():
        page = report.page(
            config, workdir, splits.train, queries=queries, scores=scores
        )
        files.write_bytes(workdir / "report.html", page.encode())


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
