"""The settings of the noise schedule and of sampling."""

from dataclasses import dataclass

from dtrak_jax.checks import at_least, between, check_choices, free, seed
from dtrak_jax.diffusion.sampling import SamplerKind
from dtrak_jax.diffusion.schedule import SCHEDULES, Prediction, Schedule, ScheduleName


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
    prediction: Prediction = "epsilon"
    """What the network predicts; `dtrak_jax.Schedule` has the formulas."""

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


def build_schedule(settings: DiffusionConfig) -> Schedule:
    """Returns the noise schedule that settings describe."""
    if settings.schedule == "cosine":
        return SCHEDULES["cosine"](settings.steps, settings.prediction)
    return SCHEDULES[settings.schedule](
        settings.steps, settings.beta_start, settings.beta_end, settings.prediction
    )
