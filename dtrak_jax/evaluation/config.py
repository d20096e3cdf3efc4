"""The settings of retraining and of what is held against retrained models."""

from dataclasses import dataclass
from typing import Literal, get_args

from dtrak_jax.checks import (
    at_least,
    between,
    check_choices,
    distinct,
    free,
    seed,
)
from dtrak_jax.methods import METHODS, KernelName, RemovalName

SignedName = Literal[*(name for name in get_args(RemovalName) if METHODS[name].signed)]
"""The type of a setting that names a method whose squares have another order."""


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Models retrained on subsets of the training images: what scores must predict."""

    subsets: int = free(64)
    """The number of subsets; more may be asked for later. An LDS needs 8 or more, and
    16 where a half of them chooses lambda and the other half is scored."""
    seeds: int = free(3)
    """Models trained on each subset, with the seeds 0, 1, ...; from 2 on there is a
    noise ceiling."""
    models: int = free(0)
    """Models trained on everything, with the seeds 0, 1, ...: what the scores of
    trak-ensemble and dtrak-ensemble are averaged over, beside the main model."""
    fraction: float = 0.5
    """Share of the training images, and of `train.steps`, that a member gets."""
    timesteps: int | tuple[int, ...] = free(1000)
    """The timesteps at which the loss of a query is measured: their number, evenly
    spaced, or themselves."""
    draws: int = free(3)
    """Noise draws at each of them, the same for all members."""
    batch_size: int = free(256)
    """Noised queries at once on each device when losses are measured."""
    per_device: int = free(1)
    """Models that train at a time on each device, in one batch: worth more than 1 for
    adapters, which share the frozen network."""
    seed: int = 0
    """Decides the subsets and the noise of the measured losses."""

    def __post_init__(self):
        check_choices("ensemble", self)
        for name in ("subsets", "seeds", "draws", "batch_size", "per_device"):
            at_least(f"ensemble.{name}", getattr(self, name), 1)
        at_least("ensemble.models", self.models, 0)
        between("ensemble.fraction", self.fraction, 0.01, 0.99)
        seed("ensemble.seed", self.seed)

    @property
    def model_names(self) -> list[str]:
        """The names of the models that are trained on everything."""
        return [f"full-{seed}" for seed in range(self.models)]

    @property
    def measured(self) -> str:
        """The settings of measured losses, besides the member and the queries."""
        return f"timesteps={self.timesteps} draws={self.draws} seed={self.seed}"


@dataclass(frozen=True, kw_only=True)
class CounterfactualConfig:
    """Retraining without the strongest training images of some generated images."""

    queries: int = free(60)
    """The number of generated images, chosen by the hash of their ids."""
    count: int = free(0)
    """The number of training images that are removed for each, near-duplicates together; 0
    takes a fifth of the training images, which is 1,000 of the paper's 5,000."""
    methods: tuple[RemovalName, ...] = free(())
    """Methods whose highest scores choose what is removed; if there are none, those of
    `attribution.methods`. A random choice is always beside them."""
    squared: tuple[SignedName, ...] = free(())
    """Methods whose largest squared scores, of either sign, choose what is removed."""
    sets: tuple[KernelName, ...] = free(())
    """Methods by whose kernels a set is chosen as a set (`removal_set`): of coverage the
    set that leaves most of a query uncovered."""
    seed: int = free(0)
    """Chooses the queries and the random images."""

    def __post_init__(self):
        check_choices("counterfactual", self)
        at_least("counterfactual.queries", self.queries, 1)
        at_least("counterfactual.count", self.count, 0)
        seed("counterfactual.seed", self.seed)
        for name in ("methods", "squared", "sets"):
            distinct(f"counterfactual.{name}", getattr(self, name))

    def removed_of(self, n: int) -> int:
        """Returns how many of n training images are removed: `count`, or a fifth."""
        return self.count or max(1, round(n / 5))


Study = Literal[
    *("noise", "draws", "timesteps", "measurement", "projection", "checkpoint"),
    "coverage",
]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Which choices `dtrak-jax ablate` compares; the rest is as in `features`."""

    studies: tuple[Study, ...] = free(get_args(Study))
    """The comparisons to make."""
    timesteps: tuple[int, ...] = free((100, 200, 300, 400, 500))
    """The timesteps at which gradients are taken."""
    draws: int = free(2)
    """Noise draws per timestep where noises and kernels are compared."""
    noise_seeds: int = free(2)
    """The number of noises with which that comparison is repeated."""
    most_draws: int = free(64)
    """Up to how many draws of one timestep are tried; a power of 2."""
    dims: tuple[int, ...] = free((256, 512, 1024, 2048, 4096))
    """Dimensions of the sketch."""

    def __post_init__(self):
        for name in ("studies", "timesteps", "dims"):
            if not getattr(self, name):
                raise ValueError(f"ablation.{name} is empty; name one or more.")
        check_choices("ablation", self)
        for name in ("studies", "timesteps", "dims"):
            distinct(f"ablation.{name}", getattr(self, name))
        for name in ("draws", "noise_seeds", "most_draws"):
            at_least(f"ablation.{name}", getattr(self, name), 1)
        for dim in self.dims:
            at_least("ablation.dims", dim, 1)
