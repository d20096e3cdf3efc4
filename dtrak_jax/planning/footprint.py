"""The footprint of models, features and kernels: disk, and memory of this host."""

from collections.abc import Iterable
from typing import NamedTuple

import jax

from dtrak_jax import feature_sets, training
from dtrak_jax.attribution.kernel import KEPT_ON_DISK, eigh_bytes
from dtrak_jax.attribution.layers import contribution_bytes
from dtrak_jax.evaluation.truth import member_names
from dtrak_jax.feature_sets import FeatureSet
from dtrak_jax.features.gradients import LayerGroups, feature_names, variables
from dtrak_jax.features.layers import groups_of
from dtrak_jax.features.microbatches import Layout
from dtrak_jax.features.passes import Draws
from dtrak_jax.methods import METHODS
from dtrak_jax.run import Run


class Footprint(NamedTuple):
    """Bytes on disk that stay, and bytes of memory at the peak."""

    disk: int = 0
    memory: int = 0

    def beside(self, other: "Footprint") -> "Footprint":
        """Returns the footprint of both, one after the other."""
        return Footprint(self.disk + other.disk, max(self.memory, other.memory))


def models(run: Run, stages: Iterable[str]) -> Footprint:
    """Returns the footprint of the checkpoints that stages leave, besides what is there."""
    config, ensemble, disk = run.config, run.config.ensemble, 0
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(run.param_shapes))
    if "train" in stages and not config.is_given:
        # Parameters, their average if there is one, and AdamW's two moments.
        state = size * (3 + bool(config.train.ema_decay))
        disk += state * len(training.kept_steps(config.train))
    if "retrain" in stages:
        names = [*member_names(ensemble.subsets, ensemble.seeds), *ensemble.model_names]
        folders = [run.workdir / "ensemble" / name for name in names]
        disk += size * sum(not training.latest_step(folder) for folder in folders)
    return Footprint(disk)


def features(run: Run, stores: Iterable[FeatureSet], besides_made: bool) -> Footprint:
    """Returns the footprint of stores of features, n J k 4 bytes for a measurement; or of
    those that are not there yet."""
    counts = {"train": len(run.chosen.train), **run.query_counts}
    total = Footprint()
    for feature_set in stores:
        if besides_made and feature_sets.is_made(run, feature_set):
            continue
        layout, count = layout_of(run, feature_set), counts[feature_set.examples]
        arrays = len(feature_names(feature_set.task, groups(run, feature_set)))
        disk = layout.bytes_written(count, arrays)
        memory = layout.bytes_in_memory(count, arrays)
        total = total.beside(Footprint(disk, memory))
    return total


def kernels(run: Run) -> Footprint:
    """Returns the footprint of one model's kernels: n k 4 bytes of features in memory, twice,
    and min(n, k)^2 8 bytes for each matrix of a decomposition; and of layers' scores."""
    settings, n, total = run.config.attribution, len(run.chosen.train), Footprint()
    chosen = [METHODS[name] for name in settings.methods]
    own = [row for row in chosen if not (row.curved or row.of_output)]
    measured = {row.measurement for row in own if row.damping}
    for _ in measured:
        layout = layout_of(run, next(feature_sets.sets(run, "")))
        features, side = 4 * n * layout.dim, min(n, layout.dim)
        disk, memory = 0, 2 * features
        if settings.solver == "eigh":
            memory = max(memory, features + eigh_bytes(side))
            size = 8 * layout.per_example * side**2
            disk = size if size <= KEPT_ON_DISK else 0
        total = total.beside(Footprint(disk, memory))
    for row in chosen:
        if row.weighs_layers:
            count = len(groups(run, next(feature_sets.sets(run, "layers"))))
            size = contribution_bytes(count, max(run.query_counts.values()), n)
            total = total.beside(Footprint(0, size))
    return total


def gauss_newton(run: Run) -> Footprint:
    """Returns the footprint of Gauss-Newton matrices, which no method has if none needs
    them: k^2 4 bytes for each, and as of kernels for their decompositions."""
    if not any(METHODS[name].of_output for name in run.config.attribution.methods):
        return Footprint()
    layout = layout_of(run, next(feature_sets.sets(run, "")))
    matrix, count = 4 * layout.dim**2, layout.per_example
    kept = 2 * count * matrix if 2 * count * matrix <= KEPT_ON_DISK else 0
    return Footprint(count * matrix + kept, eigh_bytes(layout.dim))


def groups(run: Run, feature_set: FeatureSet) -> LayerGroups:
    """Returns the groups of layers whose features are kept apart, if there are any."""
    return groups_of(feature_set.task, run.param_shapes, feature_set.layers)


def curvature(run: Run) -> Footprint:
    """Returns the footprint of EK-FAC's curvature, which no method has if none needs it: its
    eigenvectors and eigenvalues, thrice in memory while they are made."""
    if not any(METHODS[name].curved for name in run.config.attribution.methods):
        return Footprint()
    task, given = run.task(measurement="loss"), run.space.shapes
    network = run.param_shapes, given.frozen
    draws = Draws.of(task, network, given.x, given.cond, 1)
    size = 4 * draws.entries(run.param_shapes)
    return Footprint(size, 3 * size)


def layout_of(run: Run, feature_set: FeatureSet) -> Layout:
    """Returns the sizes of a set of features."""
    p, settings = 0, run.config.features
    if settings.projection == "none":
        p = sum(leaf.size for leaf in variables(feature_set.task, run.param_shapes, {}))
    devices = len(jax.local_devices())
    return Layout.of(
        feature_set.task, feature_set.projection, p, settings.batch_size, devices
    )
