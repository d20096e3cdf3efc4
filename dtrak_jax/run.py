"""A run: its settings and its directory, each artefact loaded or made once."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from dtrak_jax import (
    data,
    diffusion,
    feature_sets,
    files,
    image_sets,
    parallel,
    provenance,
    results,
    score_sets,
    training,
)
from dtrak_jax.attribution import Kernels, Scores
from dtrak_jax.attribution.duplicates import Found
from dtrak_jax.config import Config, flatten
from dtrak_jax.digests import digest_tree
from dtrak_jax.encoding.clip import Clip, kept_embeddings
from dtrak_jax.encoding.latents import Latents
from dtrak_jax.encoding.pixels import Pixels
from dtrak_jax.evaluation import metagradient, truth
from dtrak_jax.evaluation.truth import RetrainedLosses
from dtrak_jax.features import Curvature, Features, Projection, Task
from dtrak_jax.network import Network, Params


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
    def at(cls, config: Config, workdir: epath.PathLike) -> "Run":
        """Returns the run in a directory, which need not be there yet; writes nothing.

        Raises:
          ValueError: the directory holds something else.
          OSError: it is a file.
        """
        run = cls(config, files.check_folder("workdir", workdir))
        path = run.workdir / "config.json"
        if not path.exists() and not files.is_empty(run.workdir):
            raise ValueError(
                f"{run.workdir} is not empty and holds no run; name another --workdir."
            )
        # Early, as gloo gives the processes 30 s to come to their first collective.
        parallel.barrier(f"read {path}")
        return run

    def record(self) -> None:
        """Writes config.json: the settings of the last command, and the packages."""
        if parallel.is_main_process():
            provenance.record(self.workdir / "config.json", flatten(self.config))

    # Data

    @functools.cached_property
    def chosen(self) -> data.Splits:
        """The images that the source has now, of which nothing is decoded or recorded."""
        return image_sets.chosen(self)

    @functools.cached_property
    def recorded(self) -> data.Splits | None:
        """The images, those that the first stage saw; None if it saw none by these
        settings. Nothing is written.

        Raises:
          ValueError: the source has other ids or pixels than then, or other labels or
            captions of a model that is given them.
        """
        return image_sets.recorded(self)

    @functools.cached_property
    def splits(self) -> data.Splits:
        """The training and validation images, those that the first stage saw, see
        `recorded`. Other settings of the data choose anew, in splits.npz; corrected
        groups, and labels that no model is given, are taken over, which a line says."""
        return image_sets.splits(self)

    @property
    def is_sampled(self) -> bool:
        """True if the model generates queries; they may be given, or there are none."""
        return bool(self.config.sample.count) and not self.config.queries.folder

    @property
    def sampled_sets(self) -> tuple[str, ...]:
        """The sets of queries that the model generates."""
        return ("generated",) if self.is_sampled else ()

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

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """The number of images of "train" and of each set of queries.

        They need not be there yet, unless the config leaves a number to the data.
        """
        settings, generated = self.config.data, self.config.sample.count
        train, validation = settings.train, settings.validation
        if settings.validation_folder or not train:
            train, validation = map(len, self.chosen)
        if self.config.queries.folder:
            generated = len(self.generated)
        counts = {"train": train, "validation": validation, "generated": generated}
        return {name: count for name, count in counts.items() if count}

    @property
    def query_counts(self) -> dict[str, int]:
        """The number of images of each set of queries, which need not be there yet."""
        return {name: n for name, n in self.counts.items() if name != "train"}

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
        folder, csv = dataclasses.astuple(self.config.queries)
        if folder:
            size, _, channels = self.space.image_shape
            groups, background = self.config.data.groups, self.config.data.background
            return data.load_queries(folder, size, channels, csv, groups, background)
        if not self.samples.exists():
            raise FileNotFoundError(
                f"there is no {self.samples}; run `dtrak-jax sample` with this config "
                "and workdir first."
            )
        return data.samples(files.read_npz(self.samples))

    # Models

    @functools.cached_property
    def space(self) -> Pixels | Latents:
        """The network, and what it is given: pixels, or latents and text embeddings."""
        return Latents(self) if self.config.is_latent else Pixels(self)

    @property
    def network(self) -> Network:
        """The network that is trained and differentiated."""
        return self.space.network

    @property
    def schedule(self) -> diffusion.Schedule:
        """The noise schedule."""
        return self.space.schedule

    @property
    def param_shapes(self) -> Params:
        """The shapes of the parameters that are trained."""
        return training.abstract_params(self.network.init)

    def recipe(self, steps: int) -> training.Recipe:
        """Returns how a model is trained for so many steps with the config's settings."""
        settings, network = self.config.train, self.network
        return training.Recipe(
            network.init,
            network.train_apply,
            self.schedule,
            dataclasses.replace(settings, steps=steps),
            network.view,
        )

    @once
    def params(self, model: str = "") -> Params:
        """Returns the parameters of a model, named by the folder of its features.

        "" is the main model, trained or given; "checkpoints/STEP" the same at a kept
        step; and "models/NAME" a model that retraining left in ensemble/NAME.
        """
        kind, _, name = model.partition("/")
        if kind == "models":
            steps, folder = self.config.train.steps, self.workdir / "ensemble"
            stack = training.load_members(self.network.init, [name], steps, folder)
            return jax.tree.map(lambda leaf: leaf[0], stack)
        if self.config.is_given and not name:
            return self.space.given
        step, init = int(name) if name else None, self.network.init
        return training.load_params(init, self.config.train, self.workdir, step)

    @once
    def params_digest(self, model: str = "") -> str:
        """Returns the hash of a model's parameters."""
        return digest_tree(self.params(model))

    def generate(self, params: Params, seeds: np.ndarray, **options):
        """Generates x for each of some of `seeds`, see `diffusion.sample`."""
        apply, params, cond = self.space.generator(params, seeds)
        how = apply, params, self.space.sampler, seeds, self.network.shape
        size = self.config.sample.batch_size
        return diffusion.sample(*how, batch_size=size, cond=cond, **options)

    # CLIP

    @functools.cached_property
    def clip_network(self) -> Clip:
        """The CLIP of `clip.folder`."""
        return Clip.from_folder(self.config.clip.folder)

    @once
    def clip(self, name: str) -> np.ndarray:
        """Returns CLIP's embeddings of "train" or of a set of queries, float32 [n, P]."""
        path = self.workdir / "encoded" / "clip" / f"{name}.npz"
        return kept_embeddings(self.clip_network, self.examples(name), path)

    # Features

    def task(self, **changes) -> Task:
        """The task of the config's features, with some of its fields changed."""
        settings = vars(self.config.features)
        shared = {field.name for field in dataclasses.fields(Task)} & settings.keys()
        fields = {name: settings[name] for name in shared}
        fields["measurement"] = settings["measurements"]
        return Task(self.network.apply, self.schedule, **fields | changes)

    @property
    def projection(self) -> Projection:
        """The config's projection."""
        settings = self.config.features
        return Projection(settings.projection, settings.dim, settings.seed)

    def features(self, name: str, measurement: str, folder: str = "") -> Features:
        """The features of "train", of a set of queries or of the "journey"."""
        return Features.load(feature_sets.find(self, name, folder), measurement)

    def features_by_layer(self, name: str, measurement: str) -> dict[str, Features]:
        """The features of a set of queries by group of layers."""
        return feature_sets.by_layer(self, name, measurement)

    @once
    def curvature(self) -> Curvature:
        """Returns EK-FAC's curvature of the main model, made if it is not there yet."""
        return feature_sets.curvature(self)

    # Scores

    @once
    def kernels(self, measurement: str, folder: str = "") -> Kernels:
        """The kernels of the training images, factorised once for all methods and λ."""
        store = feature_sets.find(self, "train", folder)
        place = store.relative_to(self.workdir / "features")
        return Kernels(
            Features.load(store, measurement),
            store=self.workdir / "kernels" / place / measurement,
            solver=self.config.attribution.solver,
        )

    @once
    def output_kernels(self) -> Kernels:
        """The same of the loss with Gauss-Newton matrices of the output in their place,
        which are made if they are not there yet."""
        matrices = feature_sets.gauss_newton_path(self)
        return Kernels(
            Features.load(feature_sets.find(self, "train"), "loss"),
            store=self.workdir / "kernels" / matrices.relative_to(self.workdir),
            curvature=feature_sets.gauss_newton(self),
        )

    def scores(self, method: str, queries: str) -> Scores:
        """The scores of a method for a set of queries, made if they are not there yet.

        They are made anew where what they are made from has changed: features, images,
        retrained models, or the damping. All processes must ask for the same.
        """
        return score_sets.load(self, method, queries)

    @once
    def copies(self) -> Found:
        """Returns which training images are near-duplicates, by pixels and, if a method has
        features that can tell, by these: scores/copies.npz."""
        return score_sets.copies(self)

    @once
    def metagradients(self) -> dict[str, np.ndarray]:
        """Returns the losses' derivatives by training weights, see `metagradient.of_run`."""
        return metagradient.of_run(self)

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
        """The contents of NAME.json; None if there is none, or if it was made from other
        artefacts than there are now, which is a warning."""
        return results.load(self, name)

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        return files.read_json_lines(path) if path.exists() else []

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages that the run was last opened with."""
        return (self.json("config") or {"versions": {}})["versions"]
