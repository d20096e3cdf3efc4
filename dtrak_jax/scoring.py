"""From the artefacts of a run to the scores of each method."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from etils import epath

from dtrak_jax import attribution, data, files, training
from dtrak_jax.attribution import Damping, Scores, attribute
from dtrak_jax.config import KERNELS, Config
from dtrak_jax.features import Features


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What methods score with: a run's settings, images and features."""

    config: Config
    workdir: epath.Path
    splits: data.Splits
    queries: dict[str, tuple[np.ndarray, np.ndarray]]
    """Images and ids of each set of queries."""

    @property
    def damping(self) -> Damping:
        settings = self.config.attribution
        return Damping(settings.damping, settings.absolute)

    def features(self, measurement: str, *folder: str) -> tuple[Features, dict]:
        """Features of the training images and of each set of queries."""
        place = self.workdir.joinpath("features", *folder)
        train = Features.load(place / "train", measurement)
        return train, {n: Features.load(place / n, measurement) for n in self.queries}


def score(run: Run, method: str) -> dict[str, Scores]:
    """The scores of one method for each set of queries that it applies to.

    Raises:
      FileNotFoundError: a stage before has not been run; says which.
    """
    found = {}
    for name, scores in SCORERS[method](run).items():
        if not isinstance(scores, Scores):
            scores = _with_ids(run, name, scores)
        found[name] = dataclasses.replace(scores, method=method)
    return found


def _with_ids(run: Run, queries: str, scores: np.ndarray, **fields) -> Scores:
    ids = run.splits.train.ids, run.queries[queries][1]
    return Scores(scores.astype(np.float32), *ids, method="", **fields)


def _kernel(run: Run, method: str, *folder: str) -> dict[str, Scores]:
    train, queries = run.features(KERNELS[method], *folder)
    return _attribute(run, train, queries, method)


def _attribute(run: Run, train, queries, method: str):
    settings = run.config.attribution
    return attribute(
        train, queries, method=method, damping=run.damping, solver=settings.solver
    )


def _from_features(function: Callable, run: Run, *options) -> dict[str, np.ndarray]:
    train, queries = run.features("loss")
    return {name: function(train, query, *options) for name, query in queries.items()}


def _damped(function: Callable, run: Run) -> dict[str, Scores]:
    scores = _from_features(function, run, run.damping)
    damping = tuple(run.damping)
    return {n: _with_ids(run, n, one, damping=damping) for n, one in scores.items()}


def _over_checkpoints(function: Callable, run: Run) -> dict[str, np.ndarray]:
    *earlier, _ = training.kept_steps(run.config.train)
    folders = [("checkpoints", str(step)) for step in earlier] + [()]
    features = [run.features("loss", *folder) for folder in folders]
    return {
        name: function([train for train, _ in features], [q[name] for _, q in features])
        for name in run.queries
    }


def _journey(run: Run) -> dict[str, Scores]:
    """Only generated images have a trajectory."""
    if "generated" not in run.queries:
        return {}
    place = run.workdir / "features"
    train = Features.load(place / "train", "loss")
    journey = Features.load(place / "journey", "loss")
    # As an array: the paper's averages over more timesteps than the training images'.
    scores = _attribute(run, train, np.asarray(journey), "trak")
    return {"generated": dataclasses.replace(scores, query_ids=np.array(journey.ids))}


def _ensemble(method: str, run: Run) -> dict[str, Scores]:
    folders = [("models", name) for name in model_names(run.config)]
    each = [_kernel(run, method, *folder) for folder in [(), *folders]]
    return {
        name: attribution.ensemble_mean([scores[name] for scores in each])
        for name in run.queries
    }


def _retrained(function: Callable, run: Run) -> dict[str, np.ndarray]:
    path = run.workdir / "ensemble" / "outputs.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; run `dtrak-jax retrain` with this config and workdir "
            "first."
        )
    saved = files.read_npz(path)
    losses = saved["outputs"].mean(axis=1)
    return {
        name: function(saved["masks"], losses[:, saved["query_set"] == name])
        for name in run.queries
    }


def _pixels(function: Callable, run: Run) -> dict[str, np.ndarray]:
    train = run.splits.train.images
    return {name: function(train, images) for name, (images, _) in run.queries.items()}


def _random(run: Run) -> dict[str, np.ndarray]:
    train = run.splits.train.ids
    return {
        name: attribution.random_scores(train, ids)
        for name, (_, ids) in run.queries.items()
    }


RETRAINING = {
    "empirical-influence": attribution.empirical_influence,
    "datamodels": attribution.datamodels,
}
"""Methods that learn from the ensemble itself: functions (masks, outputs) -> scores."""

SCORERS: dict[str, Callable[[Run], dict]] = {
    **{name: functools.partial(_kernel, method=name) for name in KERNELS},
    "gradient-dot": functools.partial(_from_features, attribution.gradient_dot),
    "gradient-cosine": functools.partial(_from_features, attribution.gradient_cosine),
    "tracin": functools.partial(_over_checkpoints, attribution.tracin),
    "gas": functools.partial(_over_checkpoints, attribution.gas),
    "relative-influence": functools.partial(_damped, attribution.relative_influence),
    "renormalised-influence": functools.partial(
        _damped, attribution.renormalised_influence
    ),
    "journey-trak": _journey,
    "trak-ensemble": functools.partial(_ensemble, "trak"),
    "dtrak-ensemble": functools.partial(_ensemble, "dtrak"),
    **{
        name: functools.partial(_retrained, function)
        for name, function in RETRAINING.items()
    },
    "pixel-dot": functools.partial(_pixels, attribution.pixel_dot),
    "pixel-cosine": functools.partial(_pixels, attribution.pixel_cosine),
    "random": _random,
}
"""For every one of `config.METHODS`, the function that makes its scores."""


def applies(method: str, queries: str) -> bool:
    """Whether a method scores a set of queries: only what was generated has a journey."""
    return method != "journey-trak" or queries == "generated"


def model_names(config: Config) -> list[str]:
    """The models beside the main one that ensembles of scores average over."""
    return [f"full-{seed}" for seed in range(config.ensemble.models)]
