"""The work of a stage, in words and in passes of an image through the network.

A pass is a forward pass of one image, and a backward pass counts as two. From the time
of a pass on the devices at hand follows about how long a stage takes.
"""

import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from dtrak_jax import diffusion, feature_sets
from dtrak_jax.evaluation.arms import arms
from dtrak_jax.evaluation.retrain import member_steps
from dtrak_jax.features.products import batch_of
from dtrak_jax.methods import METHODS
from dtrak_jax.network import network_params
from dtrak_jax.progress import counted
from dtrak_jax.run import Run

WORTH_TIMING = 200_000
"""Passes from which on a network that was not trained yet is timed."""


def passes(run: Run) -> dict[str, float]:
    """Returns the passes of each stage if nothing of it is there; all others have few."""
    config, ensemble, removal = (
        run.config,
        run.config.ensemble,
        run.config.counterfactual,
    )
    queries = sum(run.query_counts.values())
    images = run.counts["train"] + queries
    training = 3 * config.train.steps * config.train.batch_size
    settings, specs = config.features, {arm.spec for arm in arms(config)}
    stores = {""}.union(*(METHODS[name].folders(config) for name in config.methods))
    members = ensemble.subsets * ensemble.seeds
    models = members * ensemble.fraction + ensemble.models
    noised = ensemble.draws * timestep_count(ensemble.timesteps)
    pairs = settings.draws * timestep_count(settings.timesteps)
    removals = removal.queries * (len(config.removal_methods) + 1)
    train = run.counts["train"]
    removals *= 1 - removal.removed_of(train) / train

    replays = any(METHODS[name].replays for name in config.attribution.methods)
    of_output = any(METHODS[name].of_output for name in config.attribution.methods)
    curved = [name for name in config.attribution.methods if METHODS[name].curved]
    # Two passes over all cotangents make the curvature.
    made = 6 * pairs * run.counts["train"]
    made *= config.attribution.cotangents or math.prod(run.network.shape)
    # A derivative forward and one back, each two passes, for each query.
    iterations = config.attribution.ggn_iterations * ("gauss-newton-cg" in curved)
    batch, _ = batch_of(config.attribution.ggn_images, run.counts["train"], pairs)
    searched = iterations * 4 * queries * len(batch)

    # Cotangents of an image share a forward pass, as far as they fit a batch.
    cotangents = config.attribution.gauss_newton_cotangents
    cotangents = cotangents or math.prod(run.network.shape)
    forward = -(-cotangents // settings.batch_size)
    matrices = (forward + 2 * cotangents) * pairs * run.counts["train"]

    def gradients(pairs: int, measurements: int, count: int = images) -> int:
        # A forward pass is for all measurements.
        return (1 + 2 * measurements) * pairs * count

    # Features by layer, and those of probes, are of queries alone.
    by_layer = len(feature_sets.folders(config).get("layers", ()))
    probes = config.attribution.das_probes if "probes" in stores else 0
    stores -= {"layers", "probes"}

    return {
        "train": 0 if config.is_given else training,
        "sample": run.is_sampled
        * config.sample.count
        * config.sample.steps
        * sides(run),
        "retrain": training * models + members * noised * queries,
        "featurize": len(stores) * gradients(pairs, len(settings.measurements))
        + bool(by_layer) * gradients(pairs, by_layer, queries)
        + bool(probes) * gradients(pairs, probes, queries),
        # A step back of a replay is about four steps for each query.
        "attribute": replays * training * (2 + 4 * queries)
        + bool(curved) * made
        + len(curved) * gradients(pairs, 1)
        + searched
        + of_output * matrices,
        # Two controls keep all images.
        "counterfactual": training * (removals + 2),
        "ablate": sum(
            gradients(len(spec.timesteps) * spec.draws, len(spec.measurements))
            for spec in specs
        ),
    }


def sides(run: Run) -> int:
    """Returns the passes of an image in a sampling step: guidance has two sides."""
    return 2 if run.config.is_latent else 1


def timestep_count(timesteps: int | tuple[int, ...]) -> int:
    """Returns how many timesteps a setting names, or is."""
    return timesteps if isinstance(timesteps, int) else len(timesteps)


def describe(stage: str, run: Run) -> str:
    """Returns what a stage does in words, such as "2,000 steps of 64 images"."""
    config, ensemble = run.config, run.config.ensemble
    images = sum(run.counts.values())
    removal = config.counterfactual
    more = f", {ensemble.models} of {config.train.steps:,}" if ensemble.models else ""
    words = {
        "base": f"a small Stable Diffusion, {config.base.autoencoder_steps:,} and "
        f"{config.base.steps:,} steps",
        "encode": "latents of pictures, text embeddings of captions",
        "train": "nothing, as the model is given"
        if config.is_given
        else f"{counted(config.train.steps, 'step')} of "
        f"{counted(config.train.batch_size, 'image')}",
        "sample": f"{counted(config.sample.count, 'image')} in "
        f"{counted(config.sample.steps, 'step')}"
        if run.is_sampled
        else "nothing, as the queries are given",
        "retrain": f"{ensemble.subsets} x {ensemble.seeds} models of "
        f"{counted(member_steps(config), 'step')}{more}",
        "featurize": f"gradients of {counted(images, 'image')}",
        "attribute": f"scores of {', '.join(config.attribution.methods)}",
        "lds": "scores against retrained models",
        "counterfactual": f"{counted(removal.queries, 'image')} for each of "
        f"{len(config.removal_methods) + 1} choices of "
        f"{removal.removed_of(run.counts['train']):,} to remove, a model each",
        "ablate": f"the studies {', '.join(config.ablation.studies)}",
        "report": "one page to look at",
        "export": f"{config.export.format.replace('both', 'csv and json')} of scores and "
        "groups",
    }
    return words[stage]


def seconds(stages: Sequence[str], run: Run) -> float | None:
    """Returns about how long stages take; None if they are too short to tell, or if
    nobody knows the network yet, as of a base that is to be trained."""
    if "base" in stages and run.config.base.pictures:
        return None
    by_stage = passes(run)
    total = sum(by_stage.get(stage, 0) for stage in stages)
    if run.metrics:
        # The last line's speed is the one without compiling.
        batches = run.metrics[-1]["steps_per_second"]
        return total / (3 * batches * run.config.train.batch_size)
    return None if total < WORTH_TIMING else total * seconds_of_pass(run)


def seconds_of_pass(run: Run) -> float:
    """Times a sampling step with constant parameters, some images on each device."""
    devices, given = jax.local_devices(), run.space.shapes
    images = 4 if run.config.is_latent else 64
    params = network_params(run.param_shapes, given.frozen)
    network = run.space.sampled, params, run.space.sampler, run.network.shape
    count, cond = images * len(devices), run.space.sampled_cond
    program, _ = diffusion.sample_program(*network, count, images, devices, cond)
    arguments = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), program.arguments
    )
    # The first call compiles. Large networks are timed once.
    jax.block_until_ready(program.function(*arguments))
    times: list[float] = []
    while not times or len(times) < 5 and sum(times) < 1:
        start = time.perf_counter()
        jax.block_until_ready(program.function(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / images / sides(run) / jax.device_count()


def duration(seconds: float) -> str:
    """Returns a duration in words, such as "2 minutes" or "3.5 hours"."""
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
