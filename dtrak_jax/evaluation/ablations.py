"""Ablations: what each choice of a feature and of a kernel is worth, as an LDS.

An arm is one way to make scores. Arms that differ in the kernel, in the measurement or
in which of their timesteps and draws they use share one feature store, since
projections are linear: an average of projected gradients is the projected average.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from dtrak_jax.attribution import damping_path, gradient_cosine
from dtrak_jax.attribution.methods import DEFAULT_DAMPING
from dtrak_jax.config import NOISES, Config
from dtrak_jax.evaluation import lds
from dtrak_jax.training import kept_steps

KERNELS = ("apart", "pooled", "averaged", "cosine")
"""One kernel for each (timestep, draw), their scores added; one for all of them
together; one of the averaged features; or no kernel, a mean of cosines."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What one feature store holds; its fields are settings of a `Task`."""

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
        """A folder for it; says what it is, and differs for different sources."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=4).hexdigest()
        return (
            f"{self.noise}-{len(self.timesteps)}x{self.draws}-{self.projection}"
            f"{self.dim}-step{self.checkpoint}-{digest}"
        )


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to make scores from a source."""

    study: str
    source: Source
    measurement: str
    kernel: str
    timesteps: tuple[int, ...]
    draws: int
    """The first ones of the source's are used."""
    queries: tuple[str, ...] = ("validation", "generated")

    @property
    def pairs(self) -> list[int]:
        """Positions of its (timestep, draw) pairs in the source's features."""
        source = self.source
        return [
            source.timesteps.index(t) * source.draws + draw
            for t in self.timesteps
            for draw in range(self.draws)
        ]

    def describe(self) -> dict:
        """What a row of ablations.json says of it."""
        source = self.source
        return {
            "name": self.study,
            "measurement": self.measurement,
            "noise": source.noise,
            "kernel": self.kernel,
            "timesteps": list(self.timesteps),
            "draws": self.draws,
            "projection": source.projection,
            "dim": source.dim,
            "checkpoint": source.checkpoint,
            "seed": source.seed,
        }

    @property
    def key(self) -> str:
        """A name for its results; differs for different arms."""
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()


def studies(config: Config) -> dict[str, list[Arm]]:
    """The arms of every study, around the config's own features.

    All arms of one comparison use equally many gradients, but for those of the studies
    that ask what more gradients are worth.
    """
    settings, features = config.ablation, config.features
    base = Source(
        measurements=("loss", "square"),
        timesteps=settings.timesteps,
        draws=settings.draws,
        noise="common",
        seed=features.seed,
        projection=features.projection,
        dim=features.dim,
        checkpoint=config.train.steps,
    )

    def arms(study, source, kernels=("apart",), **use) -> Iterator[Arm]:
        given = {"timesteps": source.timesteps, "draws": source.draws} | use
        for measurement in source.measurements:
            for kernel in kernels:
                yield Arm(study, source, measurement, kernel, **given)

    def like_base(**changes) -> Source:
        return dataclasses.replace(base, **changes)

    def noises() -> Iterator[Arm]:
        for noise in NOISES:
            for seed in range(settings.noise_seeds):
                source = like_base(noise=noise, seed=features.seed + seed)
                yield from arms("noise", source, KERNELS)

    def draws() -> Iterator[Arm]:
        middle = (settings.timesteps[len(settings.timesteps) // 2],)
        # Common noise has nothing to average out: a few draws are enough to see.
        most = {"common": min(8, settings.most_draws)}
        most["independent"] = settings.most_draws
        for noise, limit in most.items():
            source = like_base(noise=noise, timesteps=middle, draws=limit)
            for count in (2**i for i in range(limit.bit_length())):
                for arm in arms("draws", source, ("apart", "averaged"), draws=count):
                    yield dataclasses.replace(arm, queries=("validation",))

    def timesteps() -> Iterator[Arm]:
        for t in settings.timesteps:
            yield from arms("timesteps", base, timesteps=(t,))
        for count in range(2, len(settings.timesteps) + 1):
            use = settings.timesteps[:count]
            yield from arms("timesteps", base, ("apart", "averaged"), timesteps=use)
        stride = config.diffusion.steps // 10
        uniform = like_base(timesteps=tuple(range(0, 10 * stride, stride)), draws=1)
        yield from arms("timesteps", uniform, ("apart", "averaged"))

    def measurements() -> Iterator[Arm]:
        names = ("loss", "square", "mean", "l1", "l2", "linf", "elbo")
        source = like_base(measurements=names, draws=1)
        yield from arms("measurement", source, ("apart", "averaged"))

    def projections() -> Iterator[Arm]:
        for kind in ("sketch", "rademacher", "gaussian", "factorized"):
            for dim in settings.dims if kind == "sketch" else (features.dim,):
                source = like_base(projection=kind, dim=dim, draws=1)
                yield from arms("projection", source)

    def checkpoints() -> Iterator[Arm]:
        for step in kept_steps(config.train):
            yield from arms("checkpoint", like_base(checkpoint=step, draws=1))

    return {
        "noise": list(noises()),
        "draws": list(draws()),
        "timesteps": list(timesteps()),
        "measurement": list(measurements()),
        "projection": list(projections()),
        "checkpoint": list(checkpoints()),
    }


def rows(
    arm: Arm, train: np.ndarray, query: np.ndarray, truth: dict[str, lds.Truth]
) -> list[dict]:
    """The rows of one arm: an LDS for each rule that chooses lambda, and squared.

    Args:
      arm: how to make scores.
      train: its features of the training set [pairs, n, k].
      query: of all queries, one set after the other [pairs, q, k].
      truth: the ensemble, for each set of queries.
    """
    any_truth = next(iter(truth.values()))
    squares = arm.study == "noise"
    if arm.kernel == "cosine":
        scores = gradient_cosine(train, query)
        grid, path, fixed = [None], any_truth.predict(scores)[None], 0
    else:
        if arm.kernel == "averaged":
            train, query = train.mean(axis=0), query.mean(axis=0)
        pooled = arm.kernel == "pooled"
        grid, path = lds.damping_path(train, query, any_truth.masks, pooled=pooled)
        fixed = grid.index(DEFAULT_DAMPING) if DEFAULT_DAMPING in grid else None
        if squares:
            (scores,) = damping_path(train, query, [DEFAULT_DAMPING], pooled=pooled)
    result, end = [], 0
    for name, one in truth.items():
        start, end = end, end + len(one.query_ids)
        own = path[:, :, start:end]

        def add(estimate, rule, damping, transform="linear", name=name):
            whose = arm.describe() | {"queries": name}
            result.append(whose | lds.row(estimate, rule, damping, transform))

        def score(predictions, one=one):
            return lds.bootstrap(predictions, one)[0]

        rule = None if arm.kernel == "cosine" else "label-free"
        if fixed is not None:
            add(score(own[fixed]), rule, grid[fixed])
        if squares:
            squared = one.predict(scores[start:end] ** 2)
            add(score(squared), rule, rule and DEFAULT_DAMPING, "squared")
        if rule is None:
            continue
        estimate, chosen = lds.cross_fitted(own, one)
        add(estimate, "cross-fitted", [grid[i] for i in chosen])
        values = [lds.lds(predictions, one) for predictions in own]
        best = int(np.argmax(values))
        add(score(own[best]), "oracle", grid[best])
    return result
