"""The work of a stage, in words and in passes of an image through the network.

A pass is a forward pass of one image, and a backward pass counts as two. From the time
of a pass on the devices at hand follows about how long a stage takes.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np

from dtrak_jax import diffusion
from dtrak_jax.config import Config
from dtrak_jax.evaluation.arms import arms
from dtrak_jax.evaluation.outputs import timestep_grid
from dtrak_jax.evaluation.retrain import member_steps
from dtrak_jax.methods import METHODS
from dtrak_jax.planning.programs import shapes
from dtrak_jax.run import Run

WORTH_TIMING = 200_000
"""Passes from which on a network that was not trained yet is timed."""


def passes(stage: str, run: Run) -> float:
    """Returns the passes of a stage if nothing of it is there; 0 if they are few."""
    return PASSES[stage](run) if stage in PASSES else 0


def _training(config: Config, models: float = 1) -> float:
    """Returns the passes of training so many models on everything."""
    return 3 * models * config.train.steps * config.train.batch_size


def _images(run: Run) -> int:
    return run.config.data.train + sum(run.query_counts.values())


def _gradients(run: Run, pairs: int, measurements: int) -> int:
    """Returns the passes of all images; a forward pass is for all measurements."""
    return (1 + 2 * measurements) * pairs * _images(run)


def _features(run: Run) -> int:
    methods = (METHODS[name] for name in run.config.methods)
    stores = {"", *(name for m in methods for name in m.folders(run.config))}
    task = run.task()
    return len(stores) * _gradients(run, len(task.pairs), len(task.measurements))


def _retraining(run: Run) -> float:
    config, settings = run.config, run.config.ensemble
    members = settings.subsets * settings.seeds
    models = members * member_steps(config) / config.train.steps + settings.models
    pairs = len(timestep_grid(settings.timesteps, run.schedule)) * settings.draws
    losses = members * pairs * sum(run.query_counts.values())
    return _training(config, models) + losses


def _removal(run: Run) -> float:
    config, settings = run.config, run.config.counterfactual
    removals = settings.queries * (len(config.removal_methods) + 1)
    # Two controls keep all images.
    models = removals * (1 - settings.count / config.data.train) + 2
    return _training(config, models)


def _ablations(run: Run) -> int:
    specs = {arm.spec for arm in arms(run.config)}
    return sum(
        _gradients(run, len(r.timesteps) * r.draws, len(r.measurements)) for r in specs
    )


PASSES = {
    "train": lambda run: _training(run.config) * (not run.config.model.folder),
    "sample": lambda run: run.is_sampled * len(run.seeds) * run.config.sample.steps,
    "retrain": _retraining,
    "featurize": _features,
    "counterfactual": _removal,
    "ablate": _ablations,
}
"""The functions that count the passes of a stage; all others have few."""


def describe(stage: str, run: Run) -> str:
    """Returns what a stage does in words, such as "2,000 steps of 64 images"."""
    config, ensemble = run.config, run.config.ensemble
    more = f", {ensemble.models} of {config.train.steps:,}" if ensemble.models else ""
    words = {
        "train": f"{config.train.steps:,} steps of {config.train.batch_size} images",
        "sample": f"{config.sample.count:,} images in {config.sample.steps} steps",
        "retrain": f"{ensemble.subsets} x {ensemble.seeds} models of "
        f"{member_steps(config):,} steps{more}",
        "featurize": f"gradients of {_images(run):,} images",
        "attribute": f"scores of {', '.join(config.attribution.methods)}",
    }
    return words[stage]


def seconds(stages: Sequence[str], run: Run) -> float | None:
    """Returns about how long stages take; None if they are too short to tell."""
    total = sum(passes(stage, run) for stage in stages)
    if run.metrics:
        # The last line's speed is the one without compiling.
        batches = run.metrics[-1]["steps_per_second"]
        return total / (3 * batches * run.config.train.batch_size)
    return None if total < WORTH_TIMING else total * seconds_of_pass(run)


def seconds_of_pass(run: Run, images: int = 64) -> float:
    """Times a sampling step with constant parameters, so many images on each device."""
    devices = jax.local_devices()
    program, _ = diffusion.sample_program(
        *(run.apply, shapes(run), run.sampler, run.image_shape),
        *(images * len(devices), images, devices),
    )
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
    return float(np.median(times)) / images / jax.device_count()


def duration(seconds: float) -> str:
    """Returns a duration in words, such as "2 minutes" or "3.5 hours"."""
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
