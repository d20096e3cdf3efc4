"""The settings of training."""

from dataclasses import dataclass

from dtrak_jax.checks import at_least, between, check_choices, free, positive, seed


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW with linear warm-up, half-cosine decay and clipping."""

    steps: int = 8000
    """Training steps; 0, for a model that is given, where nobody says how it was trained."""
    batch_size: int = 128
    """Pictures in a step, over all devices together."""
    learning_rate: float = 1e-4
    """The highest learning rate."""
    warmup: float = 0.1
    """Fraction of the steps over which the rate grows from 0."""
    b1: float = 0.95
    """AdamW's decay of the mean of gradients."""
    b2: float = 0.999
    """AdamW's decay of the mean of squared gradients."""
    eps_root: float = 0.0
    """A number that AdamW adds under its square root; metagradients need more than 0."""
    weight_decay: float = 1e-6
    """AdamW's weight decay."""
    clip_norm: float = 1.0
    """The norm that gradients are clipped to."""
    caption_dropout: float = 0.0
    """The share of captions that are left out in a step, in text-to-image."""
    ema_decay: float = 0.0
    """Decay of the averaged parameters, which then are the model; 0 is off."""
    checkpoints: tuple[float, ...] = free((0.25, 0.5, 0.75, 1.0))
    """Fractions of the run whose state is kept; the last one must be 1."""
    save_every: int = free(1000)
    """Steps between the checkpoints that an interrupted run continues from."""
    log_every: int = free(50)
    """Steps between two lines of metrics.jsonl."""
    fsdp: bool = free(False)
    """Spread the parameters, their averages and AdamW's moments over the devices (fully
    sharded data parallelism), for a network whose state one device cannot hold. Changes
    results by rounding only. Retrained members always live on one device each."""
    seed: int = 42
    """Decides initialisation, batches, noise and dropout."""

    def __post_init__(self):
        check_choices("train", self)
        at_least("train.steps", self.steps, 0)
        for name in ("batch_size", "save_every", "log_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        positive("train.learning_rate", self.learning_rate)
        between("train.warmup", self.warmup, 0, 1)
        for name in ("eps_root", "weight_decay"):
            between(f"train.{name}", getattr(self, name), 0)
        positive("train.clip_norm", self.clip_norm)
        for name in ("b1", "b2", "ema_decay", "caption_dropout"):
            between(f"train.{name}", getattr(self, name), 0, 0.999999)
        for fraction in self.checkpoints:
            between("train.checkpoints", fraction, 0, 1)
        if not self.checkpoints or self.checkpoints[-1] != 1:
            raise ValueError(
                f"train.checkpoints is {self.checkpoints}; the last one must be 1.0, "
                "the end of the run."
            )
        # Counterfactuals train a control with the next seed.
        seed("train.seed", self.seed, most=2**32 - 2)


def kept_steps(config: TrainConfig) -> list[int]:
    """Returns the steps whose checkpoints stay, ascending; the last is the end."""
    return sorted({max(1, round(f * config.steps)) for f in config.checkpoints})


def regular_steps(config: TrainConfig) -> list[int]:
    """Returns every `save_every`-th step, and the last: those that a member saves."""
    return [*range(config.save_every, config.steps, config.save_every), config.steps]


def saved_steps(config: TrainConfig) -> list[int]:
    """Returns the steps that the main model saves, though some only for a while."""
    return sorted({*kept_steps(config), *regular_steps(config)})
