"""Runs whose network sees pixels."""

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from dtrak_jax import diffusion, models, training
from dtrak_jax.data import Dataset
from dtrak_jax.diffusion.config import (
    blocks,
    build_sampler,
    build_schedule,
    given_schedule,
)
from dtrak_jax.diffusion.scheduler_config import find_scheduler
from dtrak_jax.encoding.classes import class_numbers, classes_of, label_names_of
from dtrak_jax.files import read_json
from dtrak_jax.network import Apply, Network, Params, Shapes, mean_of

if TYPE_CHECKING:
    from dtrak_jax.run import Run


class Pixels:
    """A UNet, and images as they are; `Latents` has the same properties."""

    frozen = None

    def __init__(self, run: "Run"):
        self.run, self.config = run, run.config

    @functools.cached_property
    def model(self) -> models.UNet2D:
        """The network, with the settings of the given model if there is one.

        Raises:
          ValueError: it is not one of grey or RGB pictures, or predicts a variance that
            is not to be ignored.
        """
        settings = models.resolve(self.config.model)
        settings.check_variance()
        source, channels = self.config.data.source, settings.in_channels
        allowed = (1,) if source == "digits" else (1, 3)
        if channels not in allowed:
            raise ValueError(
                f"model.in_channels is {channels}, but pictures of data.source="
                f"{source!r} have {' or '.join(map(str, allowed))}."
            )
        if settings.class_embed_type == "identity":
            raise ValueError(
                "model.class_embed_type is 'identity', for which a run has no embeddings "
                "of classes; from Python, give them to `featurize` as cond."
            )
        if self.config.sample.labels and not settings.takes_classes:
            raise ValueError(
                f"sample.labels is {self.config.sample.labels}, but the model in "
                f"{self.config.model.folder} is not given classes."
            )
        return models.build(settings)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The height, width and channels of an image."""
        settings = self.model.config
        return settings.sample_size, settings.sample_size, settings.in_channels

    @functools.cached_property
    def network(self) -> Network:
        """The network that is trained and differentiated."""
        apply, train_apply = (
            models.apply_fn(self.model),
            models.train_apply_fn(self.model),
        )
        if self.config.model.variance == "ignore":
            apply, train_apply = mean_of(apply), mean_of(train_apply)
        return Network(
            models.init_fn(self.model),
            apply,
            train_apply,
            self.image_shape,
            training.mirror if self.config.data.flip else None,
            repr(self.model.config),
        )

    @property
    def given(self) -> Params:
        """The parameters of `model.folder`."""
        return models.from_diffusers(self.config.model.folder)[1]

    @functools.cached_property
    def schedule(self) -> diffusion.Schedule:
        """The noise schedule."""
        settings, folder = self.config.diffusion, self.config.model.folder
        return given_schedule(settings, folder) if folder else build_schedule(settings)

    @property
    def sampler(self) -> diffusion.Sampler:
        """The sampler of the queries, with what a given model's folder says of it."""
        settings, folder = self.config.sample, self.config.model.folder
        path = find_scheduler(folder) if folder else None
        scheduler = read_json(path) if path else {}
        return build_sampler(settings, self.schedule, scheduler, settings.clip)

    @property
    def shapes(self) -> Shapes:
        """The shapes of what the network is given."""
        x, *_, classes = (*self.model.inputs(), None)[:3]
        return Shapes(x, classes, None, x)

    @property
    def sampled_cond(self) -> jax.ShapeDtypeStruct | None:
        """The shape of the condition of one image that is sampled."""
        return self.shapes.cond

    @property
    def sampled(self) -> Apply:
        """The network that is sampled."""
        return self.network.apply

    def x(self, name: str) -> np.ndarray:
        """Returns what the network is given of a set, float32 [n, H, W, C]."""
        return self.run.examples(name).images

    def cond(self, name: str) -> np.ndarray | None:
        """Returns the classes of a set, int32 [n], or None."""
        return self.classes_if_taken(self.run.examples(name), name)

    @property
    def deciding(self) -> tuple[str, ...]:
        """The columns that the network is given, see `Dataset.recorded_in`."""
        return ("label",) if self.model.config.takes_classes else ()

    def check_conditions(self, examples: Dataset, name: str) -> None:
        """Raises a ValueError unless there is a class for each example, if one is needed."""
        if not self.model.config.takes_classes:
            return
        self.classes(examples, name)
        numbers = class_numbers(self.run.chosen.train.label_names)
        if name == "train" and not all(map(str.isdecimal, numbers)):
            listed = ", ".join(f"{label} is {n}" for label, n in numbers.items())
            warnings.warn(
                f"The model is given the labels as classes: {listed}. They must be those "
                "that it was trained with.",
                stacklevel=2,
            )

    def classes_if_taken(self, examples: Dataset, name: str) -> np.ndarray | None:
        """Returns the classes of examples if the network is given any, else None."""
        takes_classes = self.model.config.takes_classes
        return self.classes(examples, name) if takes_classes else None

    def classes(self, examples: Dataset, name: str) -> np.ndarray:
        """Returns the classes of examples that are called `name`, int32 [n].

        Raises:
          ValueError: they have no labels, or one that is no class of the network.
        """
        what = f"the {name} images"
        return self._classes(label_names_of(examples, what), what)

    def _classes(self, labels: Sequence[str], what: str) -> np.ndarray:
        """Returns the classes of labels, see `classes_of`."""
        names = self.run.chosen.train.label_names
        return classes_of(labels, names, self.model.config, what)

    @property
    def training_examples(self) -> np.ndarray:
        """The images of `training.train`, of which `Network.view` makes x."""
        return self.run.splits.train.images

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the largest value that x may have."""
        return -1.0, 1.0

    @property
    def digest(self) -> str:
        """The hash of all that decides x and the conditions, beside pictures and captions."""
        return ""

    @functools.cached_property
    def generated_columns(self) -> dict[str, np.ndarray]:
        """The label of every picture to generate, str [count], if the model takes one."""
        if not self.model.config.takes_classes:
            return {}
        settings, train = self.config.sample, self.run.chosen.train
        in_use = label_names_of(train, "the training images")
        ordered = [name for name in train.label_names if name in set(in_use)]
        labels = np.array(settings.labels or ordered, str)
        self._classes(labels, "the images of sample.labels")
        return {"labels": labels[blocks(settings.count, len(labels))]}

    def generator(
        self, params: Params, seeds: np.ndarray
    ) -> tuple[Apply, Params, np.ndarray | None]:
        """Returns network, parameters and conditions with which to sample from seeds."""
        if not self.generated_columns:
            return self.sampled, params, None
        labels = self.generated_columns["labels"]
        labels = labels[np.asarray(seeds) - self.run.seeds[0]]
        return self.sampled, params, self._classes(labels, "the generated images")

    def prepare_prompts(self) -> None:
        """Makes what `generator` needs of the prompts."""

    def export(self, params: Params) -> None:
        """Writes trained parameters in formats that other programs read, if there are any."""

    def decode(self, x: np.ndarray) -> np.ndarray:
        """Returns the images of x, [n, H, W, C] in [-1, 1]."""
        return x
