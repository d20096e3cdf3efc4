"""The features of a run: which ones its methods need, and whether they are there.

A store is in features/SETTINGS/FOLDER/EXAMPLES-HASH. The hash is that of all the features
are made from, so that none are taken for others, and those of other settings, models or
pictures stay beside them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from dtrak_jax import diffusion, features, locks, parallel
from dtrak_jax.config import Config
from dtrak_jax.digests import digest, short_digest
from dtrak_jax.features import Features, Projection, Task
from dtrak_jax.features.layers import Layers
from dtrak_jax.features.measurements import MEASUREMENTS
from dtrak_jax.features.store import Store
from dtrak_jax.methods import METHODS

if TYPE_CHECKING:
    from dtrak_jax.run import Run


class FeatureSet(NamedTuple):
    """Features of some examples under one model, in a store of their own."""

    store: str  # the folder of the store in the run directory, without its hash
    examples: str  # "train" or a set of queries
    task: Task
    projection: Projection
    model: str = ""  # the parameters, see `Run.params`
    images: Callable[[], np.ndarray] | None = None
    """Makes the images, where they are not those of the examples."""
    layers: Layers | None = None
    """The groups of parameters whose features are kept apart, see `features.layers`."""


def wanted(run: "Run") -> Iterator[FeatureSet]:
    """Yields all features that the config's methods need, a store of them at a time."""
    for folder in folders(run.config):
        yield from sets(run, folder)


def sets(run: "Run", folder: str) -> Iterator[FeatureSet]:
    """Yields the features of a folder, whether they, or what they are of, are there."""
    measurements = folders(run.config)[folder]
    if folder == "journey":
        if run.is_sampled:
            yield _journey(run)
        return
    model, layers, names = folder, None, ("train", *run.config.query_sets)
    if folder == "layers":
        model, layers, names = "", run.config.features.layer_groups, names[1:]
    if folder == "probes":
        measurements = features.probes(run.config.attribution.das_probes)
        model, names = "", names[1:]
    for name in names:
        noise = noise_of(run.config.features.noise, name)
        task = run.task(measurement=measurements, noise=noise)
        store = "/".join(filter(None, (place(run), folder, name)))
        yield FeatureSet(store, name, task, run.projection, model, layers=layers)


def place(run: "Run") -> str:
    """Returns the folder of all features with the config's settings, in words."""
    settings, pairs = run.config.features, f"{len(run.task().grid)}"
    averaged = "" if settings.per_timestep else "-averaged"
    dim = "" if settings.projection == "none" else settings.dim
    return (
        f"features/{settings.noise}-{pairs}x{settings.draws}{averaged}-"
        f"{settings.projection}{dim}"
    )


def find(run: "Run", name: str, folder: str = "") -> epath.Path:
    """Returns the store of "train" or of a set of queries, or that of the "journey"."""
    if name == "journey":
        return path(run, _journey(run))
    (found,) = (s for s in sets(run, folder) if s.examples == name)
    return path(run, found)


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


def _journey(run: "Run") -> FeatureSet:
    """Returns the features of the images predicted on the way to each sample.

    Journey TRAK (Georgiev et al. 2023, arXiv 2312.06205): gradients of the loss at
    every sampling timestep t, of the image that was predicted there, averaged. Where
    timesteps are kept apart, it is at each of the task's timesteps, of the image that was
    predicted at the sampling timestep closest to it: so it meets its kernel.
    """
    sampler = run.space.sampler
    through = diffusion.sampling_timesteps(
        sampler.schedule, sampler.steps, sampler.offset
    )
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

    store = f"{place(run)}/journey"
    return FeatureSet(store, "generated", task, run.projection, "", images)


def featurize(run: "Run", feature_set: FeatureSet) -> dict[str, Features]:
    """Returns the features, by measurement (and group of layers, see `feature_names`),
    computed unless they are there."""
    store = path(run, feature_set)
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
            store=store,
            batch_size=settings.batch_size,
            proj_devices=settings.proj_devices,
            layers=feature_set.layers,
        )
    saved = Store.load(store)
    return saved.features(saved.phi)


def curvature(run: "Run") -> features.Curvature:
    """Returns EK-FAC's curvature of the main model, computed unless it is there.

    Its task averages, whatever that of features does.
    """
    space, examples = run.space, run.splits.train
    return features.ekfac(
        run.task(measurement="loss", per_timestep=False),
        run.params(),
        space.x("train"),
        frozen=space.frozen,
        ids=examples.ids,
        cond=space.cond("train"),
        bounds=space.bounds or (-math.inf, math.inf),
        cotangents=run.config.attribution.cotangents,
        store=curvature_path(run),
        batch_size=run.config.features.batch_size,
    )


def by_layer(run: "Run", name: str, measurement: str) -> dict[str, Features]:
    """Returns the features of a set of queries by group of layers."""
    saved = Store.load(find(run, name, "layers"))
    named = [text.partition("/") for text in saved.phi]
    groups = [group for kind, _, group in named if kind == measurement]
    loaded = saved.features([f"{measurement}/{group}" for group in groups])
    return dict(zip(groups, loaded.values(), strict=True))


def gauss_newton(run: "Run") -> features.GaussNewton:
    """Returns the main model's Gauss-Newton matrices, computed unless they are there."""
    space, examples, store = run.space, run.splits.train, gauss_newton_path(run)
    made = None
    with contextlib.suppress(FileNotFoundError):
        made = features.GaussNewton.load(store)
    if parallel.agreed(made is not None):
        return made
    return features.gauss_newton(
        gauss_newton_task(run),
        run.params(),
        space.x("train"),
        run.projection,
        frozen=space.frozen,
        ids=examples.ids,
        cond=space.cond("train"),
        bounds=space.bounds or (-math.inf, math.inf),
        cotangents=run.config.attribution.gauss_newton_cotangents,
        store=store,
        batch_size=run.config.features.batch_size,
    )


def gauss_newton_task(run: "Run") -> Task:
    """Returns the task of the training images' features of the loss."""
    noise = noise_of(run.config.features.noise, "train")
    return run.task(measurement="loss", noise=noise)


def gauss_newton_path(run: "Run") -> epath.Path:
    """Returns the folder of the Gauss-Newton matrices, named by what decides them."""
    cotangents = run.config.attribution.gauss_newton_cotangents or "all"
    task = gauss_newton_task(run)
    name = place(run).replace("features", "gauss-newton", 1)
    return path(run, FeatureSet(f"{name}-{cotangents}", "train", task, run.projection))


def curvature_path(run: "Run") -> epath.Path:
    """Returns the file of the curvature, named by what decides it."""
    settings, pairs = run.config.features, len(run.task().grid)
    cotangents = run.config.attribution.cotangents or "all"
    name = f"curvature/{settings.noise}-{pairs}x{settings.draws}-{cotangents}"
    task = run.task(measurement="loss", per_timestep=False)
    made = path(run, FeatureSet(name, "train", task, Projection("none")))
    return made.with_name(f"{made.name}.npz")


def is_made(run: "Run", feature_set: FeatureSet) -> bool:
    """Returns whether features are there, of this model, these settings and examples."""
    # Where there are none at all, what they would be made from need not be known.
    if not (run.workdir / feature_set.store).parent.exists():
        return False
    try:
        return Store.load(path(run, feature_set)).is_whole
    except FileNotFoundError:
        return False


def path(run: "Run", feature_set: FeatureSet) -> epath.Path:
    """Returns the store's folder, named by what decides the features.

    That is known without tracing, and without decoding pictures seen before.
    """
    task, projection = feature_set.task, feature_set.projection
    made_from = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(task)
        if field.name not in ("apply", "schedule", "measurement")
    }
    made_from |= {
        "measurements": list(task.measurements),
        "schedule": locks.schedule_digest(task.schedule),
        "projection": projection.kind != "none" and dataclasses.astuple(projection),
        "network": run.network.settings,
        "params": run.params_digest(feature_set.model),
        "examples": locks.examples_digest(
            run, run.examples(feature_set.examples), feature_set.examples
        ),
        "trajectory": digest(*map(str, locks.samples_made_from(run).values()))
        if feature_set.images
        else "",
    }
    if feature_set.layers:
        made_from["layers"] = feature_set.layers
    name = short_digest(repr(made_from).encode())
    return run.workdir / f"{feature_set.store}-{name}"
