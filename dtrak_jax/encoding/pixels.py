"""Runs whose network sees pixels."""

import functools
from typing import TYPE_CHECKING

import jax
import numpy as np

from dtrak_jax import diffusion, models, training
from dtrak_jax.diffusion.config import build_schedule, given_schedule
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
        """The sampler of the queries."""
        settings = self.config.sample
        return diffusion.Sampler(
            self.schedule, settings.sampler, settings.steps, settings.eta, settings.clip
        )

    @property
    def shapes(self) -> Shapes:
        """The shapes of what the network is given."""
        x = jax.ShapeDtypeStruct((1, *self.image_shape), np.float32)
        return Shapes(x, None, None, x)

    @property
    def sampled(self) -> Apply:
        """The network that is sampled."""
        return self.network.apply

    def x(self, name: str) -> np.ndarray:
        """Returns what the network is given of a set, float32 [n, H, W, C]."""
        return self.run.examples(name).images

    def cond(self, name: str) -> None:
        """Returns the conditions of a set, a pytree of arrays of n rows or None."""

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

    prompts = None

    def generator(
        self, params: Params, seeds: np.ndarray
    ) -> tuple[Apply, Params, None]:
        """Returns network, parameters and conditions with which to sample from seeds."""
        return self.sampled, params, None

    def prepare_prompts(self) -> None:
        """Makes what `generator` needs of the prompts."""

    def export(self, params: Params) -> None:
        """Writes trained parameters in formats that other programs read, if there are any."""

    def decode(self, x: np.ndarray) -> np.ndarray:
        """Returns the images of x, [n, H, W, C] in [-1, 1]."""
        return x
