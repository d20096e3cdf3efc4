"""The training loop: AdamW on the denoising loss, resumable at any step."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from tqdm import tqdm

from dtrak_jax import files, parallel
from dtrak_jax.config import TrainConfig
from dtrak_jax.diffusion.loss import denoising_loss
from dtrak_jax.diffusion.schedule import Schedule
from dtrak_jax.parallel import WHOLE, P
from dtrak_jax.streams import fold_in, stream
from dtrak_jax.training import checkpoint, fsdp
from dtrak_jax.training.batches import batch
from dtrak_jax.training.stop import stop_requests


class TrainState(NamedTuple):
    """Everything that a step changes, and all that a checkpoint holds."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict | tuple
    """Averaged parameters; () where training keeps none."""
    loss_sum: jax.Array
    """Losses added up since the last line of metrics.jsonl."""


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0 over ceil(warmup * steps), then half a cosine to 0."""
    warmup = math.ceil(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate,
        config.learning_rate,
        warmup,
        config.steps,
    )


REPLICATED = TrainState(*[WHOLE] * 5)
"""The specs of a state that is whole on every device."""


def optimizer(config: TrainConfig, specs=WHOLE) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW on every parameter.

    Its update takes and returns this device's parts; see `fsdp`.
    """
    return optax.chain(
        _clip_by_global_norm(config.clip_norm, specs),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        ),
    )


def _clip_by_global_norm(limit: float, specs) -> optax.GradientTransformation:
    """Optax's, of gradients that are spread over devices."""

    def update(grads, state, params=None):
        norm = fsdp.global_norm(grads, specs)
        clipped = jax.tree.map(
            lambda g: jax.lax.select(norm < limit, g, g / norm * limit), grads
        )
        return clipped, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def init_state(params, config: TrainConfig) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer(config).init(params),
        ema=params if config.ema_decay else (),
        loss_sum=jnp.zeros(()),
    )


def train_step(
    state: TrainState,
    x: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    seed: jax.Array,
    *,
    apply: Callable,
    schedule: Schedule,
    config: TrainConfig,
    flip: bool,
    specs=WHOLE,
) -> TrainState:
    """One step on this device's share of the batch; runs under `shard_map`.

    Timestep, noise and flip of an example are functions of (seed, step, index).

    Args:
      state: the same on all devices, but for what `specs` spreads over them.
      x: images [b, H, W, C].
      index: positions of the images in the training set [b].
      weights: 1, or 0 for the filling of a short batch [b].
      seed: `config.seed`, or that of this member of an ensemble.
      apply: the network in training mode, (params, x, t, cond, key) -> prediction.
      schedule: the noise schedule.
      config: the optimiser's settings; not its seed.
      flip: whether to mirror half of the images.
      specs: where the parameters are, and so all that is like them.
    """
    key = fold_in(stream(seed, "train"), state.step)
    dropout_key = fold_in(key, 0, jax.lax.axis_index("data"))

    def draw(i, image):
        t_key, eps_key, flip_key = jax.random.split(fold_in(key, 1, i), 3)
        if flip:
            mirrored = jax.random.bernoulli(flip_key)
            image = jnp.where(mirrored, image[:, ::-1], image)
        t = jax.random.randint(t_key, (), 0, schedule.steps)
        return image, t, jax.random.normal(eps_key, image.shape)

    x, t, eps = jax.vmap(draw)(index, x)
    total = jax.lax.psum(jnp.sum(weights), "data")

    def loss(params):
        def predict(x_t, t):
            return apply(params, x_t, t, None, dropout_key)

        losses = denoising_loss(predict, schedule, x, t, eps)
        return jnp.sum(weights * losses) / total

    value, grads = jax.value_and_grad(loss)(fsdp.gather(state.params, specs))
    value, grads = jax.lax.psum(value, "data"), fsdp.scatter_sum(grads, specs)
    updates, opt_state = optimizer(config, specs).update(
        grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if config.ema_decay:
        # Early on the average must forget the random start.
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1 - decay)
    return TrainState(state.step + 1, params, opt_state, ema, state.loss_sum + value)


def train(
    init: Callable,
    apply: Callable,
    schedule: Schedule,
    images: np.ndarray,
    config: TrainConfig,
    directory: epath.PathLike,
    *,
    flip: bool = False,
):
    """Trains to the end, or continues to it, and returns the trained parameters.

    Args:
      init: the model's initialisation, key -> params.
      apply: the network in training mode, (params, x, t, cond, key) -> prediction.
      schedule: the noise schedule.
      images: training images [n, H, W, C] in [-1, 1]; may be mapped from a file.
      config: steps, batch size, optimiser, checkpoints, seed.
      directory: run directory; gets `checkpoints/` and `metrics.jsonl`.
      flip: whether to mirror half of the images.

    Returns:
      Parameters on the host (averaged ones if `config.ema_decay`).

    Raises:
      FloatingPointError: the loss is no longer finite.
      KeyboardInterrupt: on SIGINT or SIGTERM to any process, after saving the state.
      ValueError: a checkpoint in the directory is of another model.
    """
    directory = epath.Path(directory)
    mesh = parallel.mesh(jax.devices())
    make_state, specs = _state_maker(init, config, mesh)
    step_function = _compile(apply, schedule, config, flip, mesh, specs)
    kept = kept_steps(config)
    with (
        checkpoint.open_manager(directory / "checkpoints", kept) as manager,
        stop_requests() as stop,
    ):
        start = manager.latest_step() or 0
        if start:
            state = checkpoint.restore(manager, start, jax.eval_shape(make_state))
        else:
            state = make_state()
        log = _Log(directory / "metrics.jsonl", start, config)
        alone, asked = jax.process_count() == 1, False
        with tqdm(
            total=config.steps, initial=start, desc="train", unit="step", disable=None
        ) as bar:
            for step in range(start, config.steps):
                rows, weights = batch(len(images), config.batch_size, config.seed, step)
                arrays = _place(mesh, images, rows, weights, stop.is_set())
                before = asked
                state, asked = step_function(state, *arrays, np.uint32(config.seed))
                done = step + 1
                # Processes must stop at the same step: each goes by the answer of the
                # step before, which is the same in all, and waits for none that runs.
                stopping = stop.is_set() if alone else bool(before)
                stopping = stopping and done < config.steps
                bar.update()
                if done % config.log_every == 0 or done == config.steps:
                    bar.set_postfix(loss=f"{log.write(done, state.loss_sum):.4f}")
                    state = state._replace(loss_sum=jnp.zeros_like(state.loss_sum))
                if done in kept or done % config.save_every == 0 or stopping:
                    checkpoint.save(manager, done, state)
                if stopping:
                    manager.wait_until_finished()
                    raise KeyboardInterrupt(
                        f"training stopped after step {done} of {config.steps}, which "
                        "is saved; the same command continues from there"
                    )
    whole = jax.jit(
        lambda params: params, out_shardings=parallel.shardings(mesh, WHOLE)
    )
    return jax.device_get(whole(trained(state)))


def kept_steps(config: TrainConfig) -> list[int]:
    """The steps whose checkpoints stay, ascending; the last one is the end."""
    return sorted({max(1, round(f * config.steps)) for f in config.checkpoints})


def load_params(
    init: Callable,
    config: TrainConfig,
    directory: epath.PathLike,
    step: int | None = None,
):
    """The trained parameters of a step (the last one if None), on the host.

    Args:
      init: the model's initialisation, key -> params; only its shapes are used.
      config: the settings that it was trained with.
      directory: the run directory.
      step: one of the steps that training kept.

    Raises:
      FileNotFoundError: training has not come to that step.
      ValueError: the checkpoint is of another model, or damaged.
    """
    step = config.steps if step is None else step
    folder = epath.Path(directory) / "checkpoints"
    if step not in checkpoint.steps(folder):
        raise FileNotFoundError(
            f"there is no checkpoint of step {step} in {folder}; run `dtrak-jax train` "
            "with this config and workdir first."
        )
    # On the host, since no device need hold the optimiser's state again.
    state = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        jax.eval_shape(functools.partial(_first_state, init, config)),
    )
    with checkpoint.open_manager(folder, [step]) as manager:
        return trained(checkpoint.restore(manager, step, state))


def trained(state: TrainState):
    """The parameters that count as the model."""
    return state.ema if jax.tree.leaves(state.ema) else state.params


def _first_state(init: Callable, config: TrainConfig) -> TrainState:
    return init_state(init(stream(config.seed, "init")), config)


def _state_maker(
    init: Callable, config: TrainConfig, mesh: jax.sharding.Mesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """A jitted function that makes the first state, and where that is on the mesh."""
    first = functools.partial(_first_state, init, config)
    specs = state_specs(config, jax.eval_shape(first), mesh)
    return jax.jit(first, out_shardings=parallel.shardings(mesh, specs)), specs


def state_specs(
    config: TrainConfig, state: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where a state is on the mesh."""
    return fsdp.shard_specs(state, mesh.size) if config.fsdp else REPLICATED


def _compile(
    apply: Callable,
    schedule: Schedule,
    config: TrainConfig,
    flip: bool,
    mesh: jax.sharding.Mesh,
    specs: TrainState = REPLICATED,
) -> Callable:
    """`train_step` over the mesh, and whether any device's `asked` is true.

    The state's buffers are reused. What was asked travels with the step, since a second
    program with a collective may run beside it, in another order in every process.
    """

    def step(state, x, index, weights, asked, seed):
        state = train_step(
            state, x, index, weights, seed,
            apply=apply, schedule=schedule, config=config, flip=flip,
            specs=specs.params,
        )  # fmt: skip
        return state, jax.lax.pmax(asked[0], "data")

    each = P("data")
    return parallel.over_mesh(
        step, mesh, (specs, each, each, each, each, P()), (specs, P()), donate_argnums=0
    )


def _place(
    mesh: jax.sharding.Mesh,
    images: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
    asked: bool = False,
) -> list[jax.Array]:
    """(images[rows], rows, weights, asked) over the mesh, filled up to a multiple of it.

    A process reads the images of its own devices only; the filling has weight 0.
    """
    filling = (0, -len(rows) % mesh.size)
    rows = np.pad(rows.astype(np.int32), filling)
    weights = np.pad(weights, filling)
    shapes = (len(rows), *images.shape[1:]), rows.shape, weights.shape, (mesh.size,)
    readers = (
        lambda index: images[rows[index[0]]],
        rows.__getitem__,
        weights.__getitem__,
        lambda _: np.array([asked], np.int32),
    )
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    return [
        jax.make_array_from_callback(shape, sharding, reader)
        for shape, reader in zip(shapes, readers, strict=True)
    ]


class _Log:
    """metrics.jsonl: a line for every `log_every` steps, none lost and none twice."""

    def __init__(self, path: epath.Path, start: int, config: TrainConfig):
        self.path, self.every = path, config.log_every
        self.rate = jax.jit(learning_rate(config))
        self.step, self.time = start, time.time()
        # Steps after the checkpoint are done again, and their lines written again.
        before = files.read_json_lines(path) if path.exists() else []
        self.lines = [line for line in before if line["step"] <= start]

    def write(self, step: int, loss_sum: jax.Array) -> float:
        """Adds the line of `step`; returns the mean loss since the line before."""
        before = (step - 1) // self.every * self.every
        loss = float(loss_sum) / (step - before)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} between steps {before} and {step}; "
                "try a smaller train.learning_rate in a new workdir."
            )
        now = time.time()
        line = {
            "step": step,
            "loss": loss,
            "learning_rate": float(self.rate(step - 1)),
            "steps_per_second": (step - self.step) / (now - self.time),
        }
        self.step, self.time = step, now
        self.lines.append(line)
        if parallel.is_primary():
            files.write_json_lines(self.path, self.lines)
        return loss
