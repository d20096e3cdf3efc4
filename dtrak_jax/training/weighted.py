"""Training with a weight for every example: what metagradients differentiate.

With seed, order and noise fixed, the trained parameters are a function of the weights w
[n] that the examples have in the loss of every step, (1 / batch) sum_i w_i l_i. The step
is training's own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from dtrak_jax.network import Params
from dtrak_jax.switches import standard
from dtrak_jax.training.config import TrainConfig
from dtrak_jax.training.step import (
    Batch,
    Recipe,
    TrainState,
    batch,
    first_state,
    train_step,
    trained,
)


class Weighted(NamedTuple):
    """A recipe whose examples count with weights, as `train_step` takes one."""

    recipe: Recipe
    weights: jax.Array  # of the batch's examples [B]

    @property
    def config(self) -> TrainConfig:
        """The settings of training."""
        return self.recipe.config

    def losses(self, params, frozen, batch: Batch, key: jax.Array) -> jax.Array:
        """Returns w_i l_i of each example of a batch, [B]."""
        return self.weights * self.recipe.losses(params, frozen, batch, key)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Course:
    """A training with all that decides it: what is replayed, and differentiated."""

    recipe: Recipe
    """The network, the noise schedule and the settings."""
    examples: tuple
    """(images, conditions) as `train` takes them: pytrees of arrays of n rows, or None."""
    frozen: Params | None = None
    """Parameters beside the trained ones, or None."""
    seed: int | None = None
    """The seed of initialisation, batches, noise and dropout; the settings' if None."""

    @property
    def count(self) -> int:
        """The number of training examples."""
        return len(jax.tree.leaves(self.examples)[0])

    @property
    def seed_word(self) -> np.uint32:
        """The seed, as programs take it."""
        own = self.recipe.config.seed
        return np.uint32(own if self.seed is None else self.seed)

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, on the host."""
        size = self.recipe.config.batch_size
        rows, filling = batch(self.count, size, int(self.seed_word), step)
        x, cond = jax.tree.map(lambda leaf: leaf[rows], self.examples)
        return Batch(x, rows.astype(np.int32), filling, cond)

    def states(
        self, weights: np.ndarray, state: TrainState, start: int, stop: int
    ) -> Iterator[TrainState]:
        """Yields the states before the steps from `start` to `stop`, and after the last
        one, in training with these weights [n]."""
        step_fn, frozen = replayed_step(self.recipe), jax.device_put(self.frozen)
        yield state
        for step in range(start, stop):
            examples = self.batch(step)
            rows_weights = weights[examples.index]
            state = step_fn(state, examples, rows_weights, self.seed_word, frozen)
            yield state

    def first(self) -> TrainState:
        """Returns the state before the first step."""
        return first_state(self.recipe.init, self.recipe.config, self.seed_word)


@standard()
def train_weighted(course: Course, weights: np.ndarray) -> Params:
    """Returns the parameters that training with weights [n] ends with, on the host.

    Weights of 1 train as `train` does; a weight of 0 leaves an example out of the loss,
    with the order and the noise of all others as they were.
    """
    steps = course.recipe.config.steps
    for state in course.states(weights, course.first(), 0, steps):
        pass
    return jax.device_get(trained(state))


@functools.cache
def replayed_step(recipe: Recipe) -> Callable:
    """Compiles (state, batch, weights [B], seed, frozen) -> the next state."""

    def step(state, batch, weights, seed, frozen):
        return train_step(Weighted(recipe, weights), state, batch, seed, frozen)

    return jax.jit(step)
