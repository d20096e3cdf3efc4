"""The arms of every ablation: ways to make scores that differ in one choice.

Arms that differ in the kernel, in the measurement or in which of their timesteps and
draws they use share one feature store, since projections are linear: an average of
projected gradients is the projected average.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from dtrak_jax.config import Config
from dtrak_jax.digests import short_digest
from dtrak_jax.features.measurements import FUNCTIONS
from dtrak_jax.features.task import Noise
from dtrak_jax.training import kept_steps

KERNELS = ("apart", "pooled", "averaged", "cosine")
"""One kernel for each (timestep, draw), their scores added; one for all of them
together; one of the averaged features; or no kernel, a mean of cosines."""


@dataclass(frozen=True)
class FeatureSpec:
    """The contents of one feature store; the fields are settings of a task."""

    measurements: tuple[str, ...]
    timesteps: tuple[int, ...]
    draws: int
    noise: str
    seed: int
    projection: str
    dim: int
    checkpoint: int

    @property
    def name(self) -> str:
        """A folder for the store, which says what it holds and differs for each spec."""
        return (
            f"{self.noise}-{len(self.timesteps)}x{self.draws}-{self.projection}"
            f"{self.dim}-step{self.checkpoint}-{short_digest(repr(self).encode())}"
        )


@dataclass(frozen=True)
class Arm:
    """One way to make scores from the features of a spec."""

    study: str
    spec: FeatureSpec
    measurement: str
    kernel: str
    timesteps: tuple[int, ...]
    draws: int
    """The first draws of the spec's are used."""
    queries: tuple[str, ...] = ("validation", "generated")

    @property
    def pairs(self) -> list[int]:
        """The positions of its (timestep, draw) pairs in the spec's features."""
        spec = self.spec
        starts = [spec.timesteps.index(t) * spec.draws for t in self.timesteps]
        return [start + draw for start in starts for draw in range(self.draws)]

    def describe(self) -> dict:
        """Returns what a row of ablations.json says of it."""
        return {
            "name": self.study,
            "measurement": self.measurement,
            "noise": self.spec.noise,
            "kernel": self.kernel,
            "timesteps": list(self.timesteps),
            "draws": self.draws,
            "projection": self.spec.projection,
            "dim": self.spec.dim,
            "checkpoint": self.spec.checkpoint,
            "seed": self.spec.seed,
        }

    @property
    def key(self) -> str:
        """A name for its results, which differs for different arms."""
        return short_digest(repr(self).encode(), 8)


def arms(config: Config) -> list[Arm]:
    """Returns the arms of all studies of a config, around the config's own features.

    All arms of one comparison use equally many gradients, but for those of the studies
    that ask what more gradients are worth.
    """
    features, settings = config.features, config.ablation
    base = FeatureSpec(
        measurements=("loss", "square"),
        timesteps=settings.timesteps,
        draws=settings.draws,
        noise="common",
        seed=features.seed,
        projection=features.projection,
        dim=features.dim,
        checkpoint=config.train.steps,
    )
    return [arm for name in settings.studies for arm in STUDIES[name](config, base)]


def _arms(study: str, spec: FeatureSpec, kernels=("apart",), **fields) -> Iterator[Arm]:
    """Yields an arm for each measurement and kernel, of the spec's pairs if no fields
    say otherwise."""
    fields = {"timesteps": spec.timesteps, "draws": spec.draws} | fields
    for measurement in spec.measurements:
        for kernel in kernels:
            yield Arm(study, spec, measurement, kernel, **fields)


def _noises(config: Config, base: FeatureSpec) -> Iterator[Arm]:
    for noise in get_args(Noise):
        for seed in range(config.ablation.noise_seeds):
            spec = replace(base, noise=noise, seed=base.seed + seed)
            yield from _arms("noise", spec, KERNELS)


def _draws(config: Config, base: FeatureSpec) -> Iterator[Arm]:
    middle, most = base.timesteps[len(base.timesteps) // 2], config.ablation.most_draws
    # Many draws are costly: the first set of queries is enough.
    queries = config.query_sets[:1]
    # Common noise has nothing to average out: a few draws are enough to see.
    for noise, limit in (("common", min(8, most)), ("independent", most)):
        spec = replace(base, noise=noise, timesteps=(middle,), draws=limit)
        for count in (2**i for i in range(limit.bit_length())):
            fields = {"draws": count, "queries": queries}
            yield from _arms("draws", spec, ("apart", "averaged"), **fields)


def _timesteps(config: Config, base: FeatureSpec) -> Iterator[Arm]:
    for t in base.timesteps:
        yield from _arms("timesteps", base, timesteps=(t,))
    for count in range(2, len(base.timesteps) + 1):
        first = base.timesteps[:count]
        yield from _arms("timesteps", base, ("apart", "averaged"), timesteps=first)
    stride = config.diffusion.steps // 10
    uniform = replace(base, timesteps=tuple(range(0, 10 * stride, stride)), draws=1)
    yield from _arms("timesteps", uniform, ("apart", "averaged"))


def _measurements(config: Config, base: FeatureSpec) -> Iterator[Arm]:
    spec = replace(base, measurements=tuple(FUNCTIONS), draws=1)
    yield from _arms("measurement", spec, ("apart", "averaged"))


def _projections(config: Config, base: FeatureSpec) -> Iterator[Arm]:
    for kind in ("sketch", "rademacher", "gaussian", "factorized"):
        for dim in config.ablation.dims if kind == "sketch" else (base.dim,):
            spec = replace(base, projection=kind, dim=dim, draws=1)
            yield from _arms("projection", spec)


def _checkpoints(config: Config, base: FeatureSpec) -> Iterator[Arm]:
    for step in kept_steps(config.train):
        yield from _arms("checkpoint", replace(base, checkpoint=step, draws=1))


def _coverage(config: Config, base: FeatureSpec) -> Iterator[Arm]:
    for draws in dict.fromkeys((1, base.draws)):
        yield from _arms("coverage", base, ("apart", "pooled"), draws=draws)


STUDIES = {
    "noise": _noises,
    "draws": _draws,
    "timesteps": _timesteps,
    "measurement": _measurements,
    "projection": _projections,
    "checkpoint": _checkpoints,
    "coverage": _coverage,
}
"""For each study of the config, the function (config, base spec) -> arms."""
