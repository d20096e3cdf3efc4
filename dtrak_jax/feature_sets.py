"""The features of a run: which ones its methods need, and whether they are there."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dtrak_jax import diffusion, features, parallel
from dtrak_jax.config import Config
from dtrak_jax.digests import digest, settings_text
from dtrak_jax.features import Features, Projection, Task
from dtrak_jax.features.measurements import MEASUREMENTS
from dtrak_jax.features.store import Store
from dtrak_jax.methods import METHODS
from dtrak_jax.run import Run


class FeatureSet(NamedTuple):
    """Features of some examples under one model, in a store of their own."""

    store: str  # the folder of the store in the run directory
    examples: str  # "train" or a set of queries
    task: Task
    projection: Projection
    model: str = ""  # the parameters, see `Run.params`
    images: Callable[[], np.ndarray] | None = None
    """Makes the images, where they are not those of the examples."""


def wanted(run: Run) -> Iterator[FeatureSet]:
    """Yields all features that the config's methods need, a store of them at a time."""
    by_folder = folders(run.config)
    journey = by_folder.pop("journey", None)
    for folder, measurements in by_folder.items():
        for name in ("train", *run.queries):
            noise = noise_of(run.config.features.noise, name)
            task = run.task(measurement=measurements, noise=noise)
            store = "/".join(filter(None, ("features", folder, name)))
            yield FeatureSet(store, name, task, run.projection, folder)
    if journey and run.is_sampled:
        yield _journey(run)


def folders(config: Config) -> dict[str, tuple[str, ...]]:
    """Returns the measurements whose features are kept, by folder of features/.

    A folder has those of all methods that may read it, so that it still serves when
    further methods are asked for.
    """
    measured = {MEASUREMENTS[name] for name in config.features.measurements}
    by_folder = {"": config.features.measurements}
    for method in map(METHODS.get, config.methods):
        alike = {m.measurement for m in METHODS.values() if m.inputs is method.inputs}
        for folder in filter(None, method.folders(config)):
            by_folder[folder] = tuple(sorted(alike & measured))
    return by_folder


def noise_of(noise: str, examples: str) -> str:
    """Returns the noise of some examples; cyclic noise shifts only the queries'."""
    return "common" if noise == "cyclic" and examples == "train" else noise


def _journey(run: Run) -> FeatureSet:
    """Returns the features of the images predicted on the way to each sample.

    Journey TRAK (Georgiev et al. 2023, arXiv 2312.06205): gradients of the loss at
    every sampling timestep t, of the image that was predicted there, averaged. Where
    timesteps are kept apart, it is at each of the task's timesteps, of the image that was
    predicted at the sampling timestep closest to it: so it meets its kernel.
    """
    through = diffusion.sampling_timesteps(run.space.sampler)
    task = run.task(measurement=("loss",))
    if not task.per_timestep:
        task = run.task(measurement=("loss",), timesteps=tuple(map(int, through)))

    def images() -> np.ndarray:
        seeds = run.seeds[parallel.share(len(run.seeds))]
        _, predicted = run.generate(run.params(), seeds, trajectory=True)
        steps = [int(np.argmin(np.abs(through - t))) for t, _ in task.pairs]
        # One step after the other: all of them may not fit on a device.
        columns = [parallel.gather(predicted[:, i], len(run.seeds)) for i in steps]
        # They are not rounded to pixels, but clipped as training images are.
        images = np.stack(columns, axis=1)
        return np.clip(images, *run.space.bounds) if run.space.bounds else images

    return FeatureSet("features/journey", "generated", task, run.projection, "", images)


def featurize(run: Run, feature_set: FeatureSet) -> dict[str, Features]:
    """Returns the features, by measurement, computed unless they are there."""
    path = run.workdir / feature_set.store
    if not parallel.agreed(is_made(run, feature_set)):
        name, space, settings = feature_set.examples, run.space, run.config.features
        features.featurize(
            feature_set.task,
            run.params(feature_set.model),
            feature_set.images() if feature_set.images else space.x(name),
            feature_set.projection,
            frozen=space.frozen,
            ids=run.examples(name).ids,
            cond=space.cond(name),
            role="train" if name == "train" else "query",
            # Latents have no bounds.
            bounds=space.bounds or (-math.inf, math.inf),
            store=path,
            batch_size=settings.batch_size,
            proj_devices=settings.proj_devices,
        )
        Store.load(path).note(_made_from(run, feature_set))
    return Store.load(path).features(feature_set.task.measurements)


def is_made(run: Run, feature_set: FeatureSet) -> bool:
    """Returns whether features are there, and what they are made from is the same."""
    try:
        store = Store.load(run.workdir / feature_set.store)
    except FileNotFoundError:
        return False
    made_from = _made_from(run, feature_set)
    return store.is_made_from(made_from, feature_set.task.measurements)


def _made_from(run: Run, feature_set: FeatureSet) -> dict[str, str]:
    """Returns what decides the features, known without tracing or decoding."""
    task = {
        field.name: getattr(feature_set.task, field.name)
        for field in dataclasses.fields(feature_set.task)
        if field.name not in ("apply", "measurement", "schedule")
    }
    return {
        "network": digest(run.network.settings),
        "params": run.params_digest(feature_set.model),
        "task": digest(repr(task), settings_text(feature_set.task.schedule)),
        "projection": repr(feature_set.projection),
        "examples": _examples_digest(run, feature_set.examples),
        "trajectory": repr(run.config.sample) if feature_set.images else "",
    }


def _examples_digest(run: Run, name: str) -> str:
    """Returns the hash of all that the network is given of a set."""
    examples, base = run.examples(name), run.space.digest
    if not base:
        return examples.digest
    return digest(examples.digest, base, *map(str, examples.captions))
