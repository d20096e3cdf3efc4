"""One step of training as a pure function: AdamW on the denoising loss of a batch.

There is nothing here about devices: the main model's step is compiled for the whole
batch on all of them, a retrained member's for one (see `programs`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtrak_jax.diffusion.loss import denoising_loss
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.network import (
    Example,
    Init,
    Params,
    TrainApply,
    View,
    network_params,
)
from dtrak_jax.rng import below, bernoulli, fold_in, normal, split, stream
from dtrak_jax.switches import standard
from dtrak_jax.training.config import TrainConfig


def mirror(key: jax.Array, example: Example, frozen: Params) -> Example:
    """Returns an example whose image is mirrored, or not, each in half of the steps."""
    image, cond = example
    return jnp.where(bernoulli(key), image[:, ::-1], image), cond


class Recipe(NamedTuple):
    """A network and how it is trained; hashable, so that programs are kept for it.

    Training calls `init`, `config` and `losses` alone: another objective is another
    class that has them.
    """

    init: Init
    apply: TrainApply
    schedule: Schedule
    config: TrainConfig
    view: View | None = None  # None if every step sees the example as it is kept

    def losses(
        self, params: Params, frozen: Params, batch: "Batch", key: jax.Array
    ) -> jax.Array:
        """Returns the denoising loss of each example of a batch, [B].

        Timestep, noise, view and dropout of an example are functions of the key and of
        its position in the training set.
        """
        x, cond, t, eps = self._noised(frozen, fold_in(key, 1), batch)
        keys = jax.vmap(fold_in, (None, None, 0))(key, 0, batch.index)
        whole = network_params(params, frozen)

        def predict(x_t, t):
            return self.apply(whole, x_t, t, cond, keys)

        return denoising_loss(predict, self.schedule, x, t, eps)

    def _noised(self, frozen, key, batch):
        """Returns images, conditions, timesteps and noise, one draw a row."""

        def draw(index, *example):
            t_key, eps_key, view_key = split(fold_in(key, index), 3)
            image, cond = example
            if self.view:
                image, cond = self.view(view_key, example, frozen)
            t = below(t_key, self.schedule.steps)
            return image, cond, t, normal(eps_key, image.shape)

        return jax.vmap(draw)(batch.index, batch.x, batch.cond)


class TrainState(NamedTuple):
    """Everything that a step changes, and all that a checkpoint holds."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params  # the averaged parameters; () where training keeps none
    loss_sum: jax.Array  # the sum of the losses since the last line of metrics.jsonl


class Batch(NamedTuple):
    """The examples of one step; every array has a row for each of them."""

    x: Any  # images [B, H, W, C], or what the recipe's view makes them of
    index: jax.Array | np.ndarray  # positions in the training set, int32 [B]
    weights: jax.Array | np.ndarray  # 1, or 0 for the filling of a short batch, [B]
    cond: Any = None  # the conditions of the network: a pytree of arrays, or None


def batch(
    n: int, batch_size: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows [batch_size] of a step's examples, and their weights, 0 or 1.

    Every epoch is a new permutation of the n examples; its last batch is smaller where
    batch_size does not divide n, and is filled up with examples of weight 0, so that
    all steps share one compiled program.
    """
    epoch, position = divmod(step, -(-n // batch_size))
    rows = _permutation(n, seed, epoch)[position * batch_size :][:batch_size]
    weights = np.zeros(batch_size, np.float32)
    weights[: len(rows)] = 1
    return np.resize(rows, batch_size), weights


@functools.lru_cache(maxsize=64)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Returns linear warm-up, then half a cosine to 0.

    The warm-up takes ceil(warmup * steps) steps, but never all of them.
    """
    warmup = min(math.ceil(config.warmup * config.steps), config.steps - 1)
    first = 0.0 if warmup else config.learning_rate
    return optax.warmup_cosine_decay_schedule(
        first, config.learning_rate, warmup, config.steps
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then AdamW on every parameter."""
    adamw = optax.adamw(
        learning_rate(config),
        config.b1,
        config.b2,
        eps_root=config.eps_root,
        weight_decay=config.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


@functools.partial(jax.jit, static_argnums=(0, 1))
@standard()
def first_state(init: Init, config: TrainConfig, seed: jax.Array) -> TrainState:
    """Returns the state before the first step of the model with this seed."""
    params = init(stream(seed, "init"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer(config).init(params),
        ema=params if config.ema_decay else (),
        loss_sum=jnp.zeros(()),
    )


def abstract_state(init: Init, config: TrainConfig) -> TrainState:
    """Returns the shapes of a state."""
    return jax.eval_shape(lambda: first_state(init, config, 0))


def abstract_params(init: Init) -> Params:
    """Returns the shapes of the parameters."""
    return jax.eval_shape(lambda: init(stream(0, "init")))


def trained(state: TrainState) -> Params:
    """Returns the parameters that count as the model."""
    return state.ema if jax.tree.leaves(state.ema) else state.params


@standard()
def train_step(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    seed: jax.Array,
    frozen: Params | None = None,
) -> TrainState:
    """Returns the state after a step on a batch of the model with this seed.

    The loss is the mean of the examples' losses with `batch.weights`. All that is drawn
    for an example is a function of (seed, step, position in the training set): neither
    the batch's order nor its filling, nor the devices that share it, change it. The
    network is called with the pair (params, frozen) in place of params if there are
    frozen parameters.
    """
    given = state.step, batch, seed, frozen
    (value, _), grads = gradient(recipe, state.params, *given)
    return updated(recipe.config, state, value, grads)


def gradient(
    recipe: Recipe,
    params: Params,
    step: jax.Array,
    batch: Batch,
    seed: jax.Array,
    frozen: Params | None,
) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """Returns the loss of a step, the losses of its examples [B], and its gradient."""
    key = fold_in(stream(seed, "train"), step)

    def loss(params):
        losses = recipe.losses(params, frozen, batch, key)
        return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights), losses

    return jax.value_and_grad(loss, has_aux=True)(params)


def updated(
    config: TrainConfig, state: TrainState, value: jax.Array, grads: Params
) -> TrainState:
    """Returns the state after a step with this loss and its gradient."""
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if config.ema_decay:
        # Early on the average must forget the random start.
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1 - decay)
    # A sum begins anew after every line of metrics.jsonl.
    loss_sum = jnp.where(state.step % config.log_every == 0, 0, state.loss_sum)
    return TrainState(state.step + 1, params, opt_state, ema, loss_sum + value)
