"""A run: its settings and its directory, each artefact loaded or made once."""

import contextlib
import dataclasses
import functools
import platform
from collections.abc import Callable, Iterable
from importlib import metadata

import jax
import numpy as np
from etils import epath

from dtrak_jax import data, diffusion, files, models, parallel, score_sets, training
from dtrak_jax.attribution import Damping, Kernels, Scores
from dtrak_jax.config import Config, flatten, locked
from dtrak_jax.diffusion.config import build_schedule
from dtrak_jax.digests import digest_tree
from dtrak_jax.evaluation import truth
from dtrak_jax.evaluation.truth import RetrainedLosses
from dtrak_jax.features import Features, Projection, Task
from dtrak_jax.network import Apply, Init, Params, TrainApply

PACKAGES = ("dtrak-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def once(method: Callable) -> Callable:
    """Keeps the results of a method of `Run`, by its arguments, as long as the run."""

    @functools.wraps(method)
    def kept(run: "Run", *arguments):
        # An empty argument is the same as one that is left out.
        key = (method.__name__, *filter(None, arguments))
        if key not in run.kept:
            run.kept[key] = method(run, *arguments)
        return run.kept[key]

    return kept


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Everything that a stage reads, from a config and the run directory.

    No other module knows which file is where, but for the stages, which write them.
    """

    config: Config
    workdir: epath.Path
    kept: dict = dataclasses.field(default_factory=dict, repr=False)
    """Results that were loaded already, see `once`."""

    @classmethod
    def open(cls, config: Config, workdir: epath.PathLike) -> "Run":
        """Makes the run directory, or checks that it belongs to this config.

        Raises:
          ValueError: the directory was made with other settings (names them), or holds
            something else.
        """
        run, settings = cls(config, files.at(workdir)), flatten(config)
        path = run.workdir / "config.json"
        # A config that no stage has made anything of is no run yet.
        if not files.is_empty(run.workdir, besides=path.name):
            if not path.exists():
                raise ValueError(
                    f"{run.workdir} is not empty and holds no run; name another "
                    "--workdir."
                )
            saved = flatten(Config()) | files.read_json(path)["config"]
            differing = files.differences(locked(saved), locked(settings))
            if differing:
                raise ValueError(
                    f"{run.workdir} belongs to another config: {'; '.join(differing)}. "
                    "Name another --workdir, or delete that one."
                )
        # Early, as gloo gives the processes 30 s to come to their first collective.
        parallel.barrier(f"read {path}")
        if parallel.is_main_process():
            installed = versions(PACKAGES) | {"python": platform.python_version()}
            files.write_json(path, {"config": settings, "versions": installed})
        return run

    # Data

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The height, width and channels of an image."""
        size = self.model_config.sample_size
        return size, size, self.model_config.in_channels

    @functools.cached_property
    def splits(self) -> data.Splits:
        """The training and validation images, those that the first stage saw.

        Raises:
          ValueError: the source has other ids, labels, groups or pixels than then.
        """
        size, _, channels = self.image_shape
        splits = data.load(self.config.data, size, channels)
        path = self.workdir / "splits.npz"
        roles = {"train": splits.train, "validation": splits.validation}
        if parallel.is_main_process() and not path.exists():
            columns = {"label_names": np.array(splits.train.label_names, str)}
            for role, images in roles.items():
                described = images.columns() | {"digests": images.digests}
                columns |= {f"{role}_{name}": c for name, c in described.items()}
            files.write_npz(path, **columns)
        parallel.barrier(f"write {path}")
        saved = files.read_npz(path)
        return data.Splits(
            **{role: images.recorded_in(saved, role) for role, images in roles.items()}
        )

    @property
    def is_sampled(self) -> bool:
        """True if the model generates queries; they may be given, or there are none."""
        return bool(self.config.sample.count) and not self.config.queries.folder

    @property
    def seeds(self) -> np.ndarray:
        """A seed for each image to generate; image i of seed s has 1000 s + i, as in the
        paper's code."""
        settings = self.config.sample
        return settings.seed * 1000 + np.arange(settings.count)

    @property
    def samples(self) -> epath.Path:
        """The file of all generated images."""
        return self.workdir / "samples" / "samples.npz"

    @property
    def query_counts(self) -> dict[str, int]:
        """The number of images of each set of queries, which need not be there yet."""
        validation, generated = self.config.data.validation, self.config.sample.count
        if self.config.queries.folder:
            generated = len(self.generated)
        counts = {"validation": validation, "generated": generated}
        return {name: count for name, count in counts.items() if count}

    @property
    def queries(self) -> dict[str, data.Dataset]:
        """The sets of queries that have images: "validation", "generated"."""
        return {name: self.examples(name) for name in self.config.query_sets}

    def examples(self, name: str) -> data.Dataset:
        """Returns the images of "train" or of a set of queries."""
        return self.generated if name == "generated" else getattr(self.splits, name)

    @functools.cached_property
    def generated(self) -> data.Dataset:
        """The generated images, from their 8-bit pixels or from `queries.folder`."""
        given = self.config.queries
        if given.folder:
            size, _, channels = self.image_shape
            return data.load_queries(given.folder, size, channels, given.csv)
        if not self.samples.exists():
            raise FileNotFoundError(
                f"there is no {self.samples}; run `dtrak-jax sample` with this config "
                "and workdir first."
            )
        saved = files.read_npz(self.samples)
        return data.Dataset.of(data.from_pixels(saved["images"]), saved["ids"])

    # Models

    @functools.cached_property
    def model_config(self) -> models.ModelConfig:
        """The network's settings, those of the given model if there is one."""
        return models.resolve(self.config.model)

    @functools.cached_property
    def model(self) -> models.UNet2D:
        return models.build(self.model_config)

    @property
    def init(self) -> Init:
        return models.init_fn(self.model)

    @property
    def apply(self) -> Apply:
        return models.apply_fn(self.model)

    @property
    def train_apply(self) -> TrainApply:
        return models.train_apply_fn(self.model)

    @property
    def param_shapes(self) -> Params:
        """The shapes of the parameters."""
        return training.abstract_params(self.init)

    @functools.cached_property
    def schedule(self) -> diffusion.Schedule:
        """The noise schedule."""
        return build_schedule(self.config.diffusion)

    @functools.cached_property
    def sampler(self) -> diffusion.Sampler:
        """The sampler of the queries."""
        settings = self.config.sample
        return diffusion.Sampler(
            self.schedule, settings.sampler, settings.steps, settings.eta, settings.clip
        )

    def recipe(self, steps: int) -> training.Recipe:
        """Returns how a model is trained for so many steps with the config's settings."""
        settings = dataclasses.replace(self.config.train, steps=steps)
        network = self.init, self.train_apply, self.schedule
        return training.Recipe(*network, settings, self.config.data.flip)

    @once
    def params(self, model: str = "") -> Params:
        """Returns the parameters of a model, named by the folder of its features.

        "" is the main model, trained or given; "checkpoints/STEP" the same at a kept
        step; and "models/NAME" a model that retraining left in ensemble/NAME.
        """
        kind, _, name = model.partition("/")
        if kind == "models":
            steps, folder = self.config.train.steps, self.workdir / "ensemble"
            stack = training.load_members(self.init, [name], steps, folder)
            return jax.tree.map(lambda leaf: leaf[0], stack)
        if self.config.model.folder and not name:
            return models.from_diffusers(self.config.model.folder)[1]
        step = int(name) if name else None
        return training.load_params(self.init, self.config.train, self.workdir, step)

    @once
    def params_digest(self, model: str = "") -> str:
        """Returns the hash of a model's parameters."""
        return digest_tree(self.params(model))

    def generate(self, params: Params, seeds: np.ndarray, **options):
        """Generates an image for each seed, see `diffusion.sample`."""
        how = self.apply, params, self.sampler, seeds, self.image_shape
        size = self.config.sample.batch_size
        return diffusion.sample(*how, batch_size=size, **options)

    # Features

    def task(self, **changes) -> Task:
        """The task of the config's features, with some of its fields changed."""
        settings = vars(self.config.features)
        shared = {field.name for field in dataclasses.fields(Task)} & settings.keys()
        fields = {name: settings[name] for name in shared}
        fields["measurement"] = settings["measurements"]
        return Task(self.apply, self.schedule, **fields | changes)

    @property
    def projection(self) -> Projection:
        """The config's projection."""
        settings = self.config.features
        return Projection(settings.projection, settings.dim, settings.seed)

    def features(self, name: str, measurement: str, folder: str = "") -> Features:
        """The features of "train", of a set of queries or of the "journey"."""
        return Features.load(self.workdir / "features" / folder / name, measurement)

    # Scores

    @property
    def damping(self) -> Damping:
        """The config's lambda."""
        settings = self.config.attribution
        return Damping(settings.damping, settings.absolute)

    @once
    def kernels(self, measurement: str, folder: str = "") -> Kernels:
        """The kernels of the training images, factorised once for all methods and λ."""
        return Kernels(
            self.features("train", measurement, folder),
            store=self.workdir / "kernels" / folder / measurement,
            solver=self.config.attribution.solver,
        )

    def scores(self, method: str, queries: str) -> Scores:
        """The scores of a method for a set of queries, made if they are not there yet.

        They are made anew where what they are made from has changed: features, images,
        retrained models, or the damping. All processes must ask for the same.
        """
        return score_sets.load(self, method, queries)

    # Retrained models and results

    @property
    def outputs(self) -> epath.Path:
        """The file of the queries' losses under all retrained models."""
        return self.workdir / "ensemble" / "outputs.npz"

    @once
    def truth(self) -> dict[str, RetrainedLosses]:
        """Returns the losses of each set of queries under the retrained models."""
        return truth.load(self)

    def json(self, name: str) -> dict | None:
        """The contents of NAME.json; None if there is none."""
        path = self.workdir / f"{name}.json"
        return files.read_json(path) if path.exists() else None

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        return files.read_json_lines(path) if path.exists() else []

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages that the run was last opened with."""
        return (self.json("config") or {"versions": {}})["versions"]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those of the packages that are installed."""
    installed = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed
