"""The settings of the noise schedule and of sampling."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dtrak_jax.checks import at_least, between, check_choices, free, seed
from dtrak_jax.diffusion.sampling import Sampler, SamplerKind, sampling_timesteps
from dtrak_jax.diffusion.schedule import SCHEDULES, Schedule, ScheduleName
from dtrak_jax.diffusion.scheduler_config import DIFFUSERS_FILE, find_scheduler
from dtrak_jax.files import at


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise schedule, and what the network predicts."""

    schedule: ScheduleName = "linear"
    """The course of the betas, as in diffusers."""
    steps: int = 1000
    """The number T of timesteps."""
    beta_start: float = 1e-4
    """The first beta of linear and scaled_linear; cosine has no such setting."""
    beta_end: float = 0.02
    """The last beta of linear and scaled_linear."""
    prediction: Literal["epsilon", "v", "sample"] = "epsilon"
    """epsilon, the noise; sample, the image; or v (Salimans & Ho 2022)."""

    def __post_init__(self):
        check_choices("diffusion", self)
        at_least("diffusion.steps", self.steps, 1)
        between("diffusion.beta_start", self.beta_start, 1e-12, 0.999)
        between("diffusion.beta_end", self.beta_end, self.beta_start, 0.999)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The images to generate; they are the second set of queries."""

    count: int = 1000
    """Pictures that the model generates as queries."""
    sampler: SamplerKind = "ddim"
    """The kind of steps: DDIM's, or the posterior's with new noise in each."""
    steps: int = 50
    """Sampling steps of a picture."""
    eta: float = 0.0
    """Noise of DDIM, from 0 (none) to 1."""
    clip: bool = True
    """Clip the predicted image to [-1, 1] in every step."""
    batch_size: int = free(128)
    """Images generated at once on each device."""
    seed: int = 0
    """Decides the noise that sampling begins with."""
    prompts: tuple[str, ...] = ()
    """The prompts of text-to-image, each for an equal block of the images, one after
    the other. If there are none, the captions of the training images, sorted."""
    labels: tuple[str, ...] = ()
    """The labels of a model that is given classes, each for an equal block of the images,
    one after the other. If there are none, those of the training images."""
    negative: str = ""
    """The prompt that guidance leads away from."""
    guidance: float = 7.5
    """The scale w of classifier-free guidance in text-to-image,
    prediction = p(negative) + w (p(prompt) - p(negative)); 1 is without."""

    def __post_init__(self):
        check_choices("sample", self)
        between("sample.guidance", self.guidance, 0)
        at_least("sample.count", self.count, 0)
        at_least("sample.steps", self.steps, 1)
        between("sample.eta", self.eta, 0, 1)
        at_least("sample.batch_size", self.batch_size, 1)
        # Images have the seeds 1000 s, 1000 s + 1, ...
        seed("sample.seed", self.seed, most=(2**32 - self.count) // 1000)


def blocks(count: int, kinds: int) -> np.ndarray:
    """Returns the kind of each of `count` images, in equal blocks, int [count]."""
    return np.arange(count) * kinds // max(count, 1)


def build_schedule(settings: DiffusionConfig) -> Schedule:
    """Returns the noise schedule that settings describe."""
    if settings.schedule == "cosine":
        return SCHEDULES["cosine"](settings.steps, settings.prediction)
    return SCHEDULES[settings.schedule](
        settings.steps, settings.beta_start, settings.beta_end, settings.prediction
    )


def build_sampler(
    settings: SampleConfig, schedule: Schedule, scheduler: Mapping, clip: bool
) -> Sampler:
    """Returns the sampler that settings describe, with a scheduler's own timesteps.

    Of a scheduler_config.json, or {}, it takes steps_offset, or the last timesteps where
    timestep_spacing is "trailing", and set_alpha_to_one. More steps than the schedule has
    are a ValueError.
    """
    at_least("sample.steps", settings.steps, 1, schedule.steps)
    offset = scheduler.get("steps_offset", 0)
    if scheduler.get("timestep_spacing") == "trailing":
        first = sampling_timesteps(schedule, settings.steps)[0]
        offset = max(0, schedule.steps - 1 - int(first))
    return Sampler(
        schedule,
        settings.sampler,
        settings.steps,
        settings.eta,
        clip,
        offset=offset,
        to_one=scheduler.get("set_alpha_to_one", True),
    )


def given_schedule(settings: DiffusionConfig, folder: str) -> Schedule:
    """Returns the noise schedule of a given network: that of its folder, if it has one.

    Without a scheduler_config.json in the folder or beside it, `settings` describe it.
    A warning says which of them it is, unless it is in the folder itself.

    Raises:
      ValueError: the folder's schedule is one of flow matching, or has no counterpart
        here; or `settings` are not left as they are and describe another one.
    """
    path = find_scheduler(folder)
    if path is None:
        warnings.warn(
            f"model.folder={folder!r} has no {DIFFUSERS_FILE}: its noise schedule and "
            f"prediction are taken from `diffusion` ({settings.schedule}, "
            f"{settings.steps} steps, {settings.prediction}).",
            stacklevel=2,
        )
        return build_schedule(settings)
    schedule = Schedule.from_diffusers(path.parent)
    if schedule.prediction == "flow":
        raise ValueError(
            f"{path} is of flow matching, which runs do not know; from Python, "
            "`featurize` takes such a network of yours with `dtrak.flow_schedule`."
        )
    if settings != DiffusionConfig():
        described = build_schedule(settings)
        equal = (
            described.prediction == schedule.prediction
            and described.steps == schedule.steps
            and np.allclose(described.alpha_bar, schedule.alpha_bar, atol=1e-6)
        )
        if not equal:
            raise ValueError(
                f"{path} decides the noise schedule and the prediction, and `diffusion` "
                f"describes another one ({settings}); leave it out."
            )
    if at(folder) not in path.parents:
        warnings.warn(f"the noise schedule is that of {path}.", stacklevel=2)
    return schedule
