"""The record that a page is made from: arrays, results and text, from anywhere."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dtrak_jax import files
from dtrak_jax.attribution import Damping, Scores, pixel_cosine
from dtrak_jax.checks import at_least, instance
from dtrak_jax.config import Config, flatten
from dtrak_jax.data import Dataset
from dtrak_jax.features import Features
from dtrak_jax.methods import METHODS
from dtrak_jax.report.learning import Learning, learning

if TYPE_CHECKING:
    from dtrak_jax.run import Run

MOST_PIXELS = 5 * 10**7
"""Pixels of all training images beyond which their cosines are not computed here."""

FILES = {
    "report.html": "this page",
    "config.json": "settings and versions of the run",
    "splits.npz": "ids, labels and captions of the training and validation images",
    "metrics.jsonl": "loss, learning rate and speed of training, a line per interval",
    "checkpoints": "states of training; the last one is the model",
    "samples": "the generated images as PNG, and all of them in samples.npz",
    "features": "projected gradients of training images and queries",
    "features/distortion.json": "how far the projection changed inner products",
    "ensemble": "models trained on subsets, and the queries' losses under them",
    "lds.json": "linear datamodeling scores",
    "counterfactual.json": "what became of images without their top training images",
    "counterfactual": "the models trained without them, and their images",
    "ablations.json": "linear datamodeling scores of other choices",
    "ablations": "their features and results",
    "scores": "METHOD-QUERIES.npz: a score for each query and training image",
}
"""Files of a run directory, as the page explains them."""

SOURCES = {
    "digits": "scikit-learn's digits",
    "hands": "scikit-learn's digits, drawn again by five hands",
}
"""The words for sources of images that have no name of their own."""


class Recipe(NamedTuple):
    """The recipe of features: timesteps, noise and projection."""

    timesteps: Sequence[int]
    draws: int
    per_timestep: bool
    noise: str
    projection: str
    dim: int
    distortion: Mapping | None = None
    """The contents of distortion.json, if anybody measured it."""

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that such features make."""
        if not self.per_timestep:
            return ["average"]
        draws = [f", draw {d}" for d in range(self.draws)] if self.draws > 1 else [""]
        return [f"t = {t}{draw}" for t in self.timesteps for draw in draws]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """All that a page shows; what is empty is left out."""

    train: Dataset
    queries: Mapping[str, Dataset]
    """Sets of queries by name, such as "generated"."""
    scores: Mapping[str, Mapping[str, Scores]]
    """{set: {method: scores}} of the methods that are shown."""
    pixels: Mapping[str, Scores] = dataclasses.field(default_factory=dict)
    """Cosines of pixels, which need no model, by set."""
    shown: int = 16
    """Queries shown of each set."""
    top: int = 6
    """Supporting and opposing images shown of each query."""
    source: str = ""
    """The name of the training images' source."""
    damping: Damping | None = None
    recipe: Recipe | None = None
    metrics: Sequence[Mapping] = ()
    """The lines of metrics.jsonl: step, loss, learning_rate."""
    learning: Learning | None = None
    """The model's loss beside that without learning; None if nobody knows."""
    lds: Mapping | None = None
    counterfactual: Mapping | None = None
    removed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """The arrays of counterfactual/images.npz."""
    ablations: Mapping | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Dates, commands and digests, by what they are."""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The files of the run directory, explained; {} without one."""
    is_run: bool = False
    """True if commands of `dtrak-jax` can make more of it."""

    def __post_init__(self):
        at_least("shown", self.shown, 0)
        at_least("top", self.top, 1)
        for name in ("removed", "settings", "versions", "provenance", "files"):
            instance(name, getattr(self, name), Mapping)


def _settings(config: Config) -> dict[str, object]:
    """Returns the settings of a run, but for those of training where a model is given, and
    those of the network where its folder decides them."""
    settings = flatten(config)
    if not config.is_given:
        return settings
    kept = "model.folder", "model.variance"
    return {
        name: value
        for name, value in settings.items()
        if name in kept or name.partition(".")[0] not in ("model", "train")
    }


def of_run(run: "Run") -> Record:
    """Returns the record of a run, which must have scores of every shown method.

    The same run gives the same record. Results that are not in the run directory are
    left out.
    """
    config, train, sets = run.config, run.splits.train, sorted(run.queries)
    settings, data = config.attribution, config.data
    path = run.workdir / "counterfactual" / "images.npz"
    features = features_of(run)
    return Record(
        train=train,
        queries={name: run.queries[name] for name in sets},
        scores={
            name: {
                method: run.scores(method, name)
                for method in config.shown_methods
                if METHODS[method].applies_to(name)
            }
            for name in sets
        },
        pixels={
            name: run.scores("pixel-cosine", name)
            for name in sets
            if "pixel-cosine" in settings.methods
        }
        or similarities(train, run.queries),
        shown=config.report.queries,
        top=config.report.top,
        source=SOURCES.get(data.source, data.name.rstrip("/").split("/")[-1]),
        damping=Damping(settings.damping, settings.absolute, settings.share),
        recipe=recipe_of(run),
        metrics=run.metrics,
        learning=learning(run.metrics, features, run.schedule, run.space.x("train")),
        lds=run.json("lds"),
        counterfactual=run.json("counterfactual"),
        removed=files.read_npz(path) if path.exists() else {},
        ablations=run.json("ablations"),
        settings=_settings(config),
        versions=run.versions,
        provenance=provenance_of(run, features),
        # The page is listed although it may not have been written yet.
        files={
            name: text
            for name, text in FILES.items()
            if name == "report.html" or (run.workdir / name).exists()
        },
        is_run=True,
    )


def recipe_of(run: "Run") -> Recipe | None:
    """Returns how a run's features are made."""
    task, settings = run.task(), run.config.features
    return Recipe(
        *(task.grid, task.draws, task.per_timestep, settings.noise),
        *(settings.projection, settings.dim, run.json("features/distortion")),
    )


def features_of(run: "Run") -> Features | None:
    """Returns the training images' features, if there are any."""
    try:
        return run.features("train", run.config.features.measurements[0])
    except (FileNotFoundError, ValueError):
        return None


def provenance_of(run: "Run", features: Features | None) -> dict[str, str]:
    """Returns when and by which command a run began, and the digests of its model and
    training images."""
    begun = (run.json("config") or {}).get("begun", {})
    of_model = {} if features is None else digests_of(features)
    return begun | of_model | {"training images": run.splits.train.digest}


def digests_of(features: Features) -> dict[str, str]:
    """Returns the digests of the model that features were made with."""
    names = {"network": "network", "params": "parameters"}
    return {text: features.fingerprint[name] for name, text in names.items()}


def similarities(train: Dataset, queries: Mapping[str, Dataset]) -> dict[str, Scores]:
    """Returns cosines of pixels by set; none where images are many, or not alike."""
    shape = train.images.shape
    if train.images.size > MOST_PIXELS:
        return {}
    return {
        name: Scores(
            pixel_cosine(train.images, images.images).astype(np.float32),
            *(train.ids, images.ids, "pixel-cosine"),
        )
        for name, images in queries.items()
        if images.images.shape[1:] == shape[1:]
    }
