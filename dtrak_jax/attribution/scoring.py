"""From the features of one model, or the artefacts of a run, to `Scores`."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dtrak_jax.attribution.coverage import coverage
from dtrak_jax.attribution.damping import Damping
from dtrak_jax.attribution.das import checked_probes, das
from dtrak_jax.attribution.errors import PairSum, draws_of, summed
from dtrak_jax.attribution.groups import check_columns
from dtrak_jax.attribution.influence import influence
from dtrak_jax.attribution.inputs import Array, check_features, example_ids, joined
from dtrak_jax.attribution.kernel import Kernels
from dtrak_jax.attribution.layers import TOP, layer_weights
from dtrak_jax.attribution.mean import ensemble_mean
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.features import Features, probes
from dtrak_jax.training import kept_steps

if TYPE_CHECKING:
    from dtrak_jax.config import Config
    from dtrak_jax.methods import Method
    from dtrak_jax.run import Run


class Inputs(NamedTuple):
    """The arguments that methods' functions take, and where a run has them."""

    words: str  # to follow "made from"
    scores: Callable[["Run", "Method"], dict[str, Scores]]
    """Calls the method's function; returns the scores for each set of queries."""
    needs: tuple[str, ...] = ("featurize",)
    """The stages that make them, beyond training images and queries."""
    folders: Callable[["Config"], Sequence[str]] = lambda config: ()
    """Returns the folders in features/ that they are read from; "" is the main one."""
    python: str = ""
    """The way to such scores from Python; "" if it is to call the method's function."""
    settings: tuple[tuple[str, str], ...] = ()
    """The function's further arguments, and the settings of attribution that they are."""


def score(
    method: "Method",
    kernels: Kernels,
    queries: Mapping[str, Array | Mapping[str, Array]],
    damping: Damping | None,
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int | None = None,
) -> dict[str, Scores]:
    """Returns the scores for each set of queries, by a method of one model's features.

    All sets are scored at once, so that no kernel is decomposed twice. A set of a method
    that is `probed` is {probe: features}. `groups` and `draws` are those of `attribute`;
    a method without a damping needs none.
    """
    if not queries:
        raise ValueError("query is {}; it must have one set of queries or more.")
    sets = [
        checked_probes(kernels.train, query, name)
        if method.probed
        else [check_features(kernels.train, query)[1]]
        for name, query in queries.items()
    ]
    if len(counts := {len(parts) for parts in sets}) > 1:
        raise ValueError(
            f"query has sets of {' and '.join(map(str, sorted(counts)))} probes; those "
            "that are scored together must have the same number."
        )
    train_ids = example_ids(kernels.train)
    columns = check_columns(groups, len(train_ids))
    every = [kernels.train, *itertools.chain(*sets)]
    total = PairSum(draws_of(every, draws), columns)
    _warn_of_slots(kernels.train)
    query = list(map(joined, zip(*sets, strict=True)))
    query = query if method.probed else query[0]
    fields = {"train_ids": train_ids, "method": method.name, "columns": columns}
    fields["signed"] = method.signed
    if method.damping:
        method.function(kernels, query, damping, total)
        fields["damping"] = damping
    else:
        method.function(kernels.train, query, total)
    if method.function in (influence, coverage, das):
        made = kernels.seen.values()
        fields["lambdas"] = np.array([kernel.lambda_of(damping) for kernel in made])
        if kernels.solver == "eigh":
            fields["eigenvalues"] = np.array([kernel.eigenvalues for kernel in made])
    results, start = {}, 0
    for name, parts in zip(queries, sets, strict=True):
        ids = example_ids(parts[0])
        rows = slice(start, start + len(ids))
        results[name] = summed(total, rows, query_ids=ids, **fields)
        _warn_of_equal(results[name].scores, ids)
        start = rows.stop
    return results


def _warn_of_slots(train: Array) -> None:
    """Warns of noise that queries share with some of the training images."""
    made_with = train.fingerprint if isinstance(train, Features) else {}
    if made_with.get("noise") == "reference":
        warnings.warn(
            "noise='reference' gives a query the noise of the training images in its own "
            f"slot, one in {made_with['noise_batch']} of all, and favours them: at 10 "
            "timesteps nine in ten of its top images are of that slot. noise='common' "
            "favours none.",
            stacklevel=5,
        )


def _warn_of_equal(rows: np.ndarray, query_ids: np.ndarray) -> None:
    """Warns of queries whose scores name no training image before another."""
    equal = np.ptp(rows, axis=1) <= 1e-6 * np.abs(rows).max(axis=1)
    if rows.shape[1] > 1 and equal.any():
        warnings.warn(
            f"{equal.sum()} of {len(rows)} queries, such as "
            f"{str(query_ids[np.argmax(equal)])!r}, have the same score for every "
            "training image, so that their order means nothing: their features, or "
            "those of all training images, are the same or 0.",
            stacklevel=5,
        )


def _scored(
    run: "Run", method: "Method", kernels: Kernels, queries: Mapping
) -> dict[str, Scores]:
    """Returns the scores of some features with the run's lambda and groups, see `score`."""
    damping = run.config.attribution.damping_of(method)
    return score(method, kernels, queries, damping, run.splits.train.groupings)


def _one_model(run: "Run", method: "Method", folder: str = "") -> dict[str, Scores]:
    """Calls the function with (train, query), or (kernels, query, damping)."""
    measurement = method.measurement
    queries = {q: run.features(q, measurement, folder) for q in run.queries}
    return _scored(run, method, run.kernels(measurement, folder), queries)


def _output_kernels(run: "Run", method: "Method") -> dict[str, Scores]:
    """Calls the function with (kernels, query, damping), these being of the output."""
    queries = {name: run.features(name, method.measurement) for name in run.queries}
    return _scored(run, method, run.output_kernels(), queries)


def _probes(run: "Run", method: "Method") -> dict[str, Scores]:
    """Calls the function with (kernels, queries' features of each probe, damping)."""
    names = [probe.__name__ for probe in probes(run.config.attribution.das_probes)]
    queries = {
        name: {probe: run.features(name, probe, "probes") for probe in names}
        for name in run.queries
    }
    return _scored(run, method, run.output_kernels(), queries)


def _curvature(run: "Run", method: "Method") -> dict[str, Scores]:
    """Calls the function with the curvature, training images and all queries."""
    space, train, settings = run.space, run.splits.train, method.inputs.settings
    given = {name: getattr(run.config.attribution, field) for name, field in settings}
    return method.function(
        run.curvature(),
        space.x("train"),
        {name: space.x(name) for name in run.queries},
        damping=run.config.attribution.damping_of(method),
        ids=train.ids,
        cond=space.cond("train"),
        query_ids={name: queries.ids for name, queries in run.queries.items()},
        query_cond={name: space.cond(name) for name in run.queries},
        bounds=space.bounds or (-math.inf, math.inf),
        groups=train.groupings,
        batch_size=run.config.features.batch_size,
        **given,
    )


def _layers(run: "Run", method: "Method") -> dict[str, Scores]:
    """Calls it with (kernels, weighted query, damping), weights being of a set of queries."""
    measurement = method.measurement
    kernels, results = run.kernels(measurement), {}
    damping = run.config.attribution.damping_of(method)
    top = min(TOP, len(run.splits.train.ids))
    for name in run.queries:
        by_layer = run.features_by_layer(name, measurement)
        fitted = layer_weights(kernels, by_layer, damping=damping, top=top)
        made = _scored(run, method, kernels, {name: fitted.query})
        layers = dict(
            zip(fitted.names, zip(fitted.weights, fitted.shares), strict=True)
        )
        results[name] = dataclasses.replace(made[name], layers=layers)
    return results


def _models(run: "Run", method: "Method") -> dict[str, Scores]:
    """Does so for each model, and returns the mean of their scores."""
    members = [_one_model(run, method, folder) for folder in model_folders(run.config)]
    return {q: ensemble_mean([scores[q] for scores in members]) for q in run.queries}


def _journey(run: "Run", method: "Method") -> dict[str, Scores]:
    """Calls the function with the features along the trajectories of generated images."""
    if "generated" not in run.queries:
        return {}
    journey = run.features("journey", method.measurement)
    # As an array, since a trajectory may have other timesteps than the training images.
    queries = {"generated": np.asarray(journey)}
    kernels = run.kernels(method.measurement)
    scores = _scored(run, method, kernels, queries)["generated"]
    return {"generated": dataclasses.replace(scores, query_ids=np.array(journey.ids))}


def _each(arguments: Callable, run: "Run", method: "Method") -> dict[str, Scores]:
    """Calls the function with arguments(run, method, name) for each set of queries."""
    train, results = run.splits.train, {}
    columns = train.groupings
    for name, examples in run.queries.items():
        rows = method.function(*arguments(run, method, name)).astype(np.float32)
        results[name] = Scores(
            rows, train.ids, examples.ids, method.name, columns=columns
        )
    return results


def _checkpoints(run: "Run", method: "Method") -> dict[str, Scores]:
    """Calls the function with the features at all kept steps, for each set of queries."""
    folders, results = checkpoint_folders(run.config), {}
    columns = run.splits.train.groupings
    for name in run.queries:
        trains, queries = (
            [run.features(examples, method.measurement, folder) for folder in folders]
            for examples in ("train", name)
        )
        total = PairSum(draws_of([*trains, *queries]), columns)
        method.function(trains, queries, total)
        ids = {"train_ids": trains[0].ids, "query_ids": queries[0].ids}
        named = ids | {"method": method.name, "columns": columns}
        results[name] = summed(total, slice(None), **named)
    return results


def _outputs(run: "Run", method: "Method", queries: str) -> tuple:
    """Returns masks [M, n] and losses [M, q] of M retrained models."""
    truth = run.truth()[queries]
    return truth.masks, truth.outputs.mean(axis=1)


def model_folders(config: "Config") -> list[str]:
    """Returns the folders of features of the main model and of further ones."""
    return ["", *(f"models/{name}" for name in config.ensemble.model_names)]


def checkpoint_folders(config: "Config") -> list[str]:
    """Returns the folders of features at all kept steps; that of the last step is ""."""
    *earlier, _ = kept_steps(config.train)
    return [*(f"checkpoints/{step}" for step in earlier), ""]


ONE_MODEL = Inputs("features", _one_model, folders=lambda config: [""])
MODELS = Inputs(
    *("features of further models", _models),
    folders=model_folders,
    python="dtrak_jax.ensemble_mean, of `attribute` for each model",
)
LAYERS = Inputs(
    "features of queries by layer",
    _layers,
    folders=lambda config: ["", "layers"],
    python="`attribute`, method 'trak', with the query of dtrak_jax.layer_weights",
)
GAUSS_NEWTON = Inputs(
    "features, and the Gauss-Newton matrix",
    _output_kernels,
    folders=lambda config: [""],
    python="attribute with curvature=dtrak_jax.gauss_newton(...)",
)
PROBES = Inputs(
    "features of probes, and the Gauss-Newton matrix",
    _probes,
    folders=lambda config: ["", "probes"],
    python="attribute with curvature=dtrak_jax.gauss_newton(...)",
)
CURVATURE = Inputs("the curvature, and images", _curvature, needs=())
SEARCH = CURVATURE._replace(
    settings=(
        ("iterations", "ggn_iterations"),
        ("tolerance", "ggn_tolerance"),
        ("curvature_images", "ggn_images"),
    ),
)
CHECKPOINTS = Inputs(
    "features at several checkpoints", _checkpoints, folders=checkpoint_folders
)
JOURNEY = Inputs(
    "features along sampling trajectories",
    _journey,
    folders=lambda config: ["", "journey"],
    python="`attribute`, method 'trak', with these features as the query's",
)
OUTPUTS = Inputs(
    "models retrained on subsets", partial(_each, _outputs), needs=("retrain",)
)
REPLAY = Inputs(
    "training again, with its derivative",
    partial(_each, lambda run, _, q: (run.metagradients()[q],)),
    needs=("train",),
    python="dtrak_jax.metagradients",
)
IMAGES = Inputs(
    "images, or their latents",
    partial(_each, lambda run, _, q: (run.space.x("train"), run.space.x(q))),
    needs=(),
)
EMBEDDINGS = Inputs(
    "CLIP's embeddings of images",
    partial(_each, lambda run, _, q: (run.clip("train"), run.clip(q))),
    needs=(),
)
IDS = Inputs(
    "ids",
    partial(_each, lambda run, _, q: (run.splits.train.ids, run.queries[q].ids)),
    needs=(),
)
