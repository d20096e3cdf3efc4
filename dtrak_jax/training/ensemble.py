"""Retraining: many models on subsets of the training images, members over devices."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from dtrak_jax import parallel
from dtrak_jax.network import Init, Params
from dtrak_jax.parallel import P
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard
from dtrak_jax.training import checkpoint, programs
from dtrak_jax.training.config import regular_steps
from dtrak_jax.training.step import (
    Batch,
    Recipe,
    abstract_params,
    abstract_state,
    batch,
    first_state,
    trained,
)
from dtrak_jax.training.stop import Notice, stop_requests


class Member(NamedTuple):
    """One model to train."""

    name: str  # of its folder
    rows: np.ndarray  # positions of its training images, int [n]
    seed: int  # of its initialisation, batches, noise and dropout


@standard()
def train_members(
    recipe: Recipe,
    images: np.ndarray,
    members: Sequence[Member],
    directory: epath.PathLike,
    *,
    cond=None,
    frozen: Params | None = None,
    per_device: int = 1,
    description: str = "retrain",
) -> None:
    """Trains every member that is not finished, as `train` would train it alone.

    `per_device` members are trained at a time on each of this process's devices, in one
    batch that shares the frozen parameters; processes share the members out among
    themselves.

    Args:
      recipe: as in `train`; the seed is the member's own, and of its checkpoints only
        the last one is kept.
      members: what to train.
      directory: gets a folder NAME/ of Orbax checkpoints for each member.
      images, cond, frozen: as in `train`.
      description: the progress bar's.

    Raises:
      FloatingPointError: a member's loss is no longer finite; names it.
      KeyboardInterrupt: on SIGINT or SIGTERM to any process, after saving the members
        in training.
    """
    directory, steps = epath.Path(directory), recipe.config.steps
    members, examples = parallel.of_process(members), (images, cond)
    starts = {m.name: checkpoint.latest_step(directory / m.name) for m in members}
    done, interrupted = sum(start == steps for start in starts.values()), ""
    with (
        progress(
            total=len(members) * steps,
            initial=sum(starts.values()),
            desc=description,
            unit="step",
        ) as bar,
        stop_requests() as stop,
    ):
        notice = Notice(stop)
        for start, group in _unfinished(members, starts, steps, per_device):
            bar.set_postfix_str(f"{done} of {len(members)} models done")
            for step in train_group(
                recipe, group, start, examples, frozen, directory, notice.given
            ):
                bar.update(len(group))
            if step < steps:
                names = ", ".join(member.name for member in group)
                interrupted = f" and step {step} of {steps} of {names} saved"
                break
            done += len(group)
        bar.set_postfix_str(f"{done} of {len(members)} models done")
        if notice.barrier() or interrupted:
            raise KeyboardInterrupt(
                f"stopped with {done} of {len(members)} models trained{interrupted}; "
                "the same command continues from there"
            )


def _unfinished(
    members: Sequence[Member], starts: dict[str, int], steps: int, per_device: int
) -> Iterator[tuple[int, Sequence[Member]]]:
    """Yields the groups to train with the steps that they start from, most first."""
    ahead_first = sorted(members, key=lambda m: -starts[m.name])
    for start, alike in itertools.groupby(ahead_first, lambda m: starts[m.name]):
        if start < steps:
            for group in parallel.groups(list(alike), per_device):
                yield start, group


def train_group(
    recipe: Recipe,
    group: Sequence[Member],
    start: int,
    examples: tuple,
    frozen: Params | None,
    directory: epath.Path,
    stop: Callable[[], bool],
) -> Iterator[int]:
    """Trains members that have all come to step `start`, as many on each device.

    Yields the number of every step that is done, the last one where `stop` says so.
    """
    config = recipe.config
    devices = jax.local_devices()[: len(group)]
    mesh = parallel.mesh(devices, len(devices))
    step_fn, saved = programs.member_step_function(recipe, mesh), regular_steps(config)
    seeds = np.array([m.seed for m in group], np.uint32)
    folders = [directory / m.name for m in group]
    if start:
        shapes = abstract_state(recipe.init, config)
        states = [checkpoint.load(f, start, shapes, alone=True) for f in folders]
    else:
        first = (first_state(recipe.init, config, seed) for seed in seeds)
        states = [jax.device_get(state) for state in first]
    states = parallel.put(_stack(states), mesh, P("member"))
    frozen = parallel.put(frozen, mesh)
    for step in range(start, config.steps):
        batches = [_batch(m, examples, config.batch_size, step) for m in group]
        states = step_fn(states, _stack(batches), seeds, frozen)
        done, stopping = step + 1, stop()
        if done in saved or stopping:
            _save(folders, done, states, config.steps)
        yield done
        if stopping:
            return


def load_members(
    init: Init, names: Sequence[str], steps: int, directory: epath.PathLike
) -> Params:
    """Returns the parameters of members trained for so many steps, stacked, on the host.

    Raises:
      FileNotFoundError: a member is not trained; names it.
      ValueError: a checkpoint is of another model, or damaged.
    """
    directory, shapes = epath.Path(directory), abstract_params(init)
    missing = [n for n in names if checkpoint.latest_step(directory / n) != steps]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} models are not trained: {', '.join(missing)} (in "
            f"{directory})."
        )
    return _stack(
        [checkpoint.load(directory / n, steps, shapes, alone=True) for n in names]
    )


def _stack(trees: Sequence):
    """Returns members' arrays along a new first axis, on the host."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _batch(member: Member, examples: tuple, size: int, step: int) -> Batch:
    """Returns a member's batch of a step."""
    index, weights = batch(len(member.rows), size, member.seed, step)
    rows = member.rows[index]
    x, cond = jax.tree.map(lambda leaf: leaf[rows], examples)
    return Batch(x, index.astype(np.int32), weights, cond)


def _save(folders: Sequence[epath.Path], step: int, states, end: int) -> None:
    """Saves every member's state, or at the end its parameters alone."""
    states = jax.device_get(states)
    for i, folder in enumerate(folders):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        if not np.isfinite(state.loss_sum):
            raise FloatingPointError(
                f"the training loss of {folder.name} is not finite by step {step}; "
                "try a smaller train.learning_rate."
            )
        checkpoint.save_alone(folder, step, trained(state) if step == end else state)
