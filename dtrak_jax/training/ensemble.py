"""Retraining: many models on subsets of the training images, members over devices."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from dtrak_jax import parallel
from dtrak_jax.config import TrainConfig
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.parallel import P
from dtrak_jax.streams import stream
from dtrak_jax.training import checkpoint
from dtrak_jax.training.batches import batch
from dtrak_jax.training.loop import init_state, train_step, trained
from dtrak_jax.training.stop import Notice, stop_requests


class Member(NamedTuple):
    """One model to train."""

    name: str
    """Its folder."""
    rows: np.ndarray
    """Positions of its training images, int [n]."""
    seed: int
    """Of its initialisation, batches and noise."""


def train_members(
    init: Callable,
    apply: Callable,
    schedule: Schedule,
    images: np.ndarray,
    members: Sequence[Member],
    config: TrainConfig,
    directory: epath.PathLike,
    *,
    flip: bool = False,
    description: str = "retrain",
) -> None:
    """Trains every member that is not finished, as `train` would train it alone.

    As many members as this process has devices are trained at a time, one on each;
    processes share the members out among themselves.

    Args:
      init: the model's initialisation, key -> params.
      apply: the network in training mode, (params, x, t, cond, key) -> prediction.
      schedule: the noise schedule.
      images: all training images [n, H, W, C] in [-1, 1].
      members: what to train.
      config: steps, batch size, optimiser; the seed is the member's own. Of its
        checkpoints only the last one is kept.
      directory: gets a folder NAME/ of Orbax checkpoints for each member.
      flip: whether to mirror half of the images.
      description: of the progress bar.

    Raises:
      FloatingPointError: a member's loss is no longer finite; names it.
      KeyboardInterrupt: on SIGINT or SIGTERM to any process, after saving the members
        in training.
    """
    directory = epath.Path(directory)
    mine = members[jax.process_index() :: jax.process_count()]
    starts = {m.name: _latest_step(directory / m.name) for m in mine}
    ahead_first = sorted(mine, key=lambda m: -starts[m.name])
    width = len(jax.local_devices())
    groups = [
        (start, group)
        for start, same in itertools.groupby(ahead_first, lambda m: starts[m.name])
        if start < config.steps
        for group in _chunks(list(same), width)
    ]
    trainer = _Trainer(init, apply, schedule, images, config, directory, flip)
    with (
        tqdm(
            total=len(mine) * config.steps,
            initial=sum(starts.values()),
            desc=description,
            unit="step",
            disable=None,
        ) as bar,
        stop_requests() as stop,
    ):
        notice, interrupted = Notice(stop), ""
        done = sum(step == config.steps for step in starts.values())
        for start, group in groups:
            bar.set_postfix_str(f"{done} of {len(mine)} models done")
            for step in trainer.train(group, start, notice.given):
                bar.update(len(group))
            if step < config.steps:
                interrupted = (
                    f" and step {step} of {config.steps} of {_names(group)} saved"
                )
                break
            done += len(group)
        bar.set_postfix_str(f"{done} of {len(mine)} models done")
        if notice.wait_for_all() or interrupted:
            raise KeyboardInterrupt(
                f"stopped with {done} of {len(mine)} models trained{interrupted}; the "
                "same command continues from there"
            )


def load_members(
    init: Callable, names: Sequence[str], config: TrainConfig, directory: epath.PathLike
):
    """The parameters of trained members, stacked along a new first axis, on the host.

    Raises:
      FileNotFoundError: a member is not trained; names it.
      ValueError: a checkpoint is of another model, or damaged.
    """
    directory = epath.Path(directory)
    missing = [n for n in names if _latest_step(directory / n) != config.steps]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} models are not trained: {', '.join(missing)} (in "
            f"{directory})."
        )
    abstract = jax.eval_shape(lambda: init(stream(0, "init")))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract,
    )
    loaded = []
    for name in names:
        with checkpoint.open_manager(
            directory / name, [config.steps], alone=True
        ) as manager:
            loaded.append(checkpoint.restore(manager, config.steps, abstract))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(loaded))


class _Trainer(NamedTuple):
    """Trains groups of members that have come equally far."""

    init: Callable
    apply: Callable
    schedule: Schedule
    images: np.ndarray
    config: TrainConfig
    directory: epath.Path
    flip: bool

    def train(
        self, group: Sequence[Member], start: int, stop: Callable[[], bool]
    ) -> Iterator[int]:
        """Trains from step `start` on; yields after every step, with its number.

        Ends where `stop` says so, after saving.
        """
        config, images = self.config, self.images
        width = len(group)
        mesh = parallel.mesh(jax.local_devices()[:width], width)
        step_function, make_state = _compile(
            self.init, self.apply, self.schedule, self.config, self.flip, mesh
        )
        seeds = np.array([m.seed for m in group], np.uint32)
        with contextlib.ExitStack() as stack:
            managers = [
                stack.enter_context(
                    checkpoint.open_manager(self.directory / m.name, [], alone=True)
                )
                for m in group
            ]
            state = make_state(seeds)
            if start:
                state = _restore(managers, start, state)
            for step in range(start, config.steps):
                batches = [
                    batch(len(m.rows), config.batch_size, m.seed, step) for m in group
                ]
                rows = np.stack([rows for rows, _ in batches])
                x = np.stack([images[m.rows[r]] for m, r in zip(group, rows)])
                weights = np.stack([weights for _, weights in batches])
                state = step_function(state, x, rows.astype(np.int32), weights, seeds)
                done = step + 1
                stopping = stop()
                if done == config.steps or done % config.save_every == 0 or stopping:
                    self._save(managers, group, done, state)
                yield done
                if stopping:
                    return

    def _save(self, managers, group, step: int, state) -> None:
        """Saves a member's state, or at the end its parameters alone."""
        state = jax.device_get(state)
        for i, (manager, member) in enumerate(zip(managers, group, strict=True)):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], state)
            if not np.isfinite(own.loss_sum):
                raise FloatingPointError(
                    f"the training loss of {member.name} is not finite by step {step}; "
                    "try a smaller train.learning_rate in a new workdir."
                )
            last = step == self.config.steps
            checkpoint.save_alone(manager, step, trained(own) if last else own)
            manager.wait_until_finished()


@functools.cache
def _compile(
    init: Callable,
    apply: Callable,
    schedule: Schedule,
    config: TrainConfig,
    flip: bool,
    mesh: jax.sharding.Mesh,
) -> tuple[Callable, Callable]:
    """(step, first state); all that is a member's own has a leading member axis."""

    def step(*arrays):
        own = jax.tree.map(lambda leaf: leaf[0], arrays)
        state = train_step(
            *own, apply=apply, schedule=schedule, config=config, flip=flip
        )
        return jax.tree.map(lambda leaf: leaf[None], state)

    def first(seeds):
        state = init_state(init(stream(seeds[0], "init")), config)
        return jax.tree.map(lambda leaf: leaf[None], state)

    spec = P("member")
    return (
        parallel.over_mesh(step, mesh, (spec,) * 5, spec, donate_argnums=0),
        parallel.over_mesh(first, mesh, (spec,), spec),
    )


def _restore(managers, step: int, like):
    """The members' states, stacked and placed as `like` is."""
    abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape[1:], leaf.dtype), like)
    states = [checkpoint.restore(manager, step, abstract) for manager in managers]
    return jax.tree.map(
        lambda old, *new: jax.device_put(np.stack(new), old.sharding), like, *states
    )


def _latest_step(folder: epath.Path) -> int:
    """The step of a member's newest checkpoint; 0 if there is none."""
    return max(checkpoint.steps(folder), default=0)


def _names(members: Sequence[Member]) -> str:
    return ", ".join(member.name for member in members)


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))
