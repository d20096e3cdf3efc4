"""Exact metagradients: reverse mode through a whole training.

The derivative of any measurements of the trained parameters by the weights of the examples
in training (see `weighted`), exact but for rounding (MAGIC, arXiv 2504.16430; REPLAY,
arXiv 2503.13751).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax import files, host, parallel
from dtrak_jax.checks import at_least
from dtrak_jax.digests import digest_tree
from dtrak_jax.network import Init, Params
from dtrak_jax.parallel import REPLICATED, P
from dtrak_jax.progress import progress
from dtrak_jax.training.config import TrainConfig
from dtrak_jax.training.step import (
    Recipe,
    TrainState,
    abstract_state,
    gradient,
    trained,
    updated,
)
from dtrak_jax.training.weighted import Course

Q = P("member")
"""The spec of arrays that have a row for each query, spread over the devices."""

PER_DEVICE = 8
"""The queries that go through the derivative of a step at a time, on each device."""


def check(config: TrainConfig, queries: int, state_bytes: int, count: int) -> None:
    """Raises an error if training cannot be differentiated, or not for so many queries.

    Raises:
      ValueError: `train.eps_root` is 0.
      MemoryError: the states and adjoints do not fit this host, see `memory`.
    """
    if not config.eps_root:
        raise ValueError(
            "train.eps_root is 0, so that AdamW's square root has an infinite derivative "
            "at 0; metagradients need one above 0, such as 1e-8 (--train.eps-root 1e-8), "
            "in the training of the model too."
        )
    host.check_fits(
        f"metagradients of {queries} queries through {config.steps} steps",
        memory(config.steps, queries, state_bytes, count),
    )


def memory(steps: int, queries: int, state_bytes: int, count: int) -> int:
    """Returns the bytes of about 2 sqrt(steps) states, of an adjoint of the state for each
    query, and of the derivatives [queries, count]."""
    interval = default_interval(steps)
    states = -(-steps // interval) + interval + queries
    return states * state_bytes + 8 * queries * count


def default_interval(steps: int) -> int:
    """Returns the steps between two kept states: as many as there are such states."""
    return math.isqrt(max(steps - 1, 0)) + 1


def state_bytes(init: Init, config: TrainConfig) -> int:
    """Returns the bytes of a state: parameters, AdamW's moments, and averages if any."""
    leaves = jax.tree.leaves(abstract_state(init, config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def metagradient(
    course: Course,
    measured: Callable[[Params], Params],
    queries: int,
    *,
    interval: int | None = None,
    per_device: int = PER_DEVICE,
    partial: epath.Path | None = None,
) -> np.ndarray:
    """Returns d m_q(A(w)) / d w_n at w = 1 for every query, float64 [queries, n].

    A(w) are the parameters of `train_weighted`. Training is replayed once, keeping a state
    each `interval` steps on the host; then, from the last stretch to the first, its states
    are computed again and the adjoints of all queries are pulled back through every step.
    That is two trainings, and about four times the work of a step for each query.

    Args:
      course: the training.
      measured: parameters -> the gradients of m_q by them, stacked [queries, ...].
      queries: their number.
      interval: steps between kept states; about the root of all steps if None.
      per_device: queries at a time on each of this process's devices; limits memory.
      partial: a file that keeps how far the way back has come after every stretch, for
        the same call to continue; it is deleted in the end.

    Raises:
      ValueError, MemoryError: as `check` does.
      FloatingPointError: a derivative is not finite.
    """
    config, count = course.recipe.config, course.count
    size = state_bytes(course.recipe.init, config)
    check(config, queries, size, count)
    interval = default_interval(config.steps) if interval is None else interval
    at_least("interval", interval, 1)
    ones, kept = np.ones(count, np.float32), {}
    with progress(total=3 * config.steps, desc="metagradient", unit="step") as bar:
        states = course.states(ones, course.first(), 0, config.steps)
        for step, state in enumerate(states):
            if step % interval == 0 and step < config.steps:
                kept[step] = jax.device_get(state)
            bar.update(step > 0)
        gradients = measured(jax.device_get(trained(state)))
        way = WayBack(course, state, gradients, per_device, partial)
        bar.update(2 * (config.steps - way.step))
        for start in reversed(kept):
            stop = way.step
            if start < stop:
                stretch = list(course.states(ones, kept[start], start, stop - 1))
                for step in reversed(range(start, stop)):
                    way.pull(step, stretch.pop())
                    bar.update(2)
                way.keep()
    if not np.isfinite(way.totals).all():
        raise FloatingPointError(
            "metagradients are not finite; try a larger train.eps_root, or a smaller "
            "train.learning_rate."
        )
    if partial and parallel.is_main_process():
        partial.unlink(missing_ok=True)
    return way.totals


class WayBack:
    """The adjoints of all queries on their way from the last step to the first.

    An adjoint has the derivative of a query's measurement by every number of a state that
    has one. Each of `adjoints` is a group of queries that go through a step at a time.
    """

    def __init__(
        self,
        course: Course,
        state: TrainState,
        gradients: Params,
        per_device: int,
        partial: epath.Path | None,
    ):
        queries = len(jax.tree.leaves(gradients)[0])
        self.course, self.partial = course, partial
        self.step = course.recipe.config.steps
        self.totals = np.zeros((queries, course.count))
        groups = parallel.groups(range(queries), per_device)
        self.meshes = [_mesh(group) for group in groups]
        # On every device once, however many groups there are.
        meshes = dict.fromkeys(self.meshes)
        self.frozen = {mesh: parallel.put(course.frozen, mesh) for mesh in meshes}
        adjoints = _of_result(state, gradients)
        self.made_from = np.array(digest_tree(gradients))
        if partial and files.holds(partial, {"made_from": self.made_from}):
            saved = files.read_npz(partial)
            self.step, self.totals = int(saved["step"]), saved["totals"]
            adjoints = [saved[f"adjoint{i}"] for i in range(len(adjoints))]
        self.adjoints = [
            parallel.put([leaf[group[0] : group[-1] + 1] for leaf in adjoints], mesh, Q)
            for group, mesh in zip(groups, self.meshes, strict=True)
        ]

    def pull(self, step: int, state: TrainState) -> None:
        """Pulls all adjoints back through a step, of which this is the state before it."""
        examples, parts = self.course.batch(step), []
        for i, mesh in enumerate(self.meshes):
            pull = pulled_step(self.course.recipe, mesh)
            shared = parallel.put((state, examples), mesh)
            given = *shared, self.course.seed_word, self.frozen[mesh]
            self.adjoints[i], part = pull(self.adjoints[i], *given)
            parts.append(part)
        # The filling of a short batch repeats rows, with derivatives of 0.
        by_row = np.concatenate([np.asarray(part) for part in parts]).T
        np.add.at(self.totals.T, examples.index, by_row)
        self.step = step

    def keep(self) -> None:
        """Writes how far all has come, if there is a file for that."""
        if self.partial and parallel.is_main_process():
            parts = [jax.device_get(part) for part in self.adjoints]
            leaves = [np.concatenate(leaves) for leaves in zip(*parts, strict=True)]
            arrays = {f"adjoint{i}": leaf for i, leaf in enumerate(leaves)}
            arrays |= {"step": np.array(self.step), "totals": self.totals}
            files.write_npz(self.partial, made_from=self.made_from, **arrays)


def _mesh(group) -> jax.sharding.Mesh:
    """Returns the mesh of a group of queries, as many on each device."""
    devices = jax.local_devices()[: len(group)]
    return parallel.mesh(devices, len(devices))


def _real(state: TrainState) -> list[jax.Array]:
    """Returns the leaves of a state that have derivatives: not the counts of steps."""
    leaves = jax.tree.leaves(state)
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_real(state: TrainState, leaves: list[jax.Array]) -> TrainState:
    """Returns a state with other leaves in place of those of `_real`."""
    new = iter(leaves)
    return jax.tree.map(
        lambda leaf: next(new) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        state,
    )


def _of_result(state: TrainState, gradients: Params) -> list[np.ndarray]:
    """Returns the adjoints of the last state, of gradients by the trained parameters."""

    def result(leaves):
        return trained(_with_real(state, leaves))

    _, pull = jax.vjp(result, _real(state))
    return jax.device_get(jax.vmap(pull)(gradients)[0])


@functools.cache
def pulled_step(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (adjoints, state, batch, seed, frozen) -> the adjoints before a step, and
    its derivatives by the batch's weights [queries, B].

    The queries are spread over the devices of the mesh. What AdamW does with a gradient is
    pulled back in reverse mode, to an adjoint u of the gradient g. As its derivative by
    the parameters is symmetric, the rest is forward mode along u: of g, and of every
    example's loss, whose weight w_i adds w_i l_i / batch. On a CPU that is several times
    faster than reverse mode over reverse mode, which flips the kernels of convolutions.
    """

    def pull(adjoints, state, batch, seed, frozen):
        given = state.step, batch, seed, frozen

        def by_params(params):
            (value, losses), grads = gradient(recipe, params, *given)
            return grads, losses, value

        grads, _, value = by_params(state.params)

        def update(leaves, grads):
            return _real(
                updated(recipe.config, _with_real(state, leaves), value, grads)
            )

        _, back = jax.vjp(update, _real(state), grads)

        def pull_one(adjoint):
            before, along = back(adjoint)
            _, rates = jax.jvp(by_params, (state.params,), (along,))
            curved, of_losses, _ = rates
            # Parameters come first in a state.
            curved = jax.tree.leaves(curved)
            before[: len(curved)] = map(jnp.add, before, curved)
            return before, of_losses * batch.weights / jnp.sum(batch.weights)

        return jax.vmap(pull_one)(adjoints)

    specs = (Q, *4 * [REPLICATED])
    return parallel.sharded(pull, mesh, specs, Q, donate_argnums=0)
