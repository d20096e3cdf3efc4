"""The training loop: AdamW on the denoising loss, resumable at any step."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from dtrak_jax.parallel import P
from dtrak_jax.streams import fold_in, stream
from dtrak_jax.training import checkpoint
from dtrak_jax.training.batches import batch


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


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW on every parameter."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        ),
    )


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
) -> TrainState:
    """One step on this device's share of the batch; runs under `shard_map`.

    Timestep, noise and flip of an example are functions of (seed, step, index).

    Args:
      state: the same on all devices.
      x: images [b, H, W, C].
      index: positions of the images in the training set [b].
      weights: 1, or 0 for the filling of a short batch [b].
      seed: `config.seed`, or that of this member of an ensemble.
      apply: the network in training mode, (params, x, t, cond, key) -> prediction.
      schedule: the noise schedule.
      config: the optimiser's settings; not its seed.
      flip: whether to mirror half of the images.
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

    value, grads = jax.lax.psum(jax.value_and_grad(loss)(state.params), "data")
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
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
      images: training images [n, H, W, C] in [-1, 1].
      config: steps, batch size, optimiser, checkpoints, seed.
      directory: run directory; gets `checkpoints/` and `metrics.jsonl`.
      flip: whether to mirror half of the images.

    Returns:
      Parameters on the host (averaged ones if `config.ema_decay`).

    Raises:
      FloatingPointError: the loss is no longer finite.
      KeyboardInterrupt: on SIGINT or SIGTERM, after saving the state.
      ValueError: a checkpoint in the directory is of another model.
    """
    directory = epath.Path(directory)
    mesh = parallel.mesh(jax.devices())
    step_function = _compile(apply, schedule, config, flip, mesh)
    make_state = _state_maker(init, config, mesh)
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
        with tqdm(
            total=config.steps, initial=start, desc="train", unit="step", disable=None
        ) as bar:
            for step in range(start, config.steps):
                rows, weights = batch(len(images), config.batch_size, config.seed, step)
                arrays = (images[rows], rows.astype(np.int32), weights)
                arrays = _place(mesh, *arrays)
                state = step_function(state, *arrays, np.uint32(config.seed))
                done = step + 1
                bar.update()
                if done % config.log_every == 0 or done == config.steps:
                    bar.set_postfix(loss=f"{log.write(done, state.loss_sum):.4f}")
                    state = state._replace(loss_sum=jnp.zeros_like(state.loss_sum))
                if done in kept or done % config.save_every == 0 or stop.is_set():
                    checkpoint.save(manager, done, state)
                if stop.is_set() and done < config.steps:
                    manager.wait_until_finished()
                    raise KeyboardInterrupt(
                        f"training stopped after step {done} of {config.steps}, which "
                        "is saved; the same command continues from there"
                    )
    return jax.device_get(trained(state))


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
    mesh = parallel.mesh(jax.local_devices()[:1])
    abstract = jax.eval_shape(_state_maker(init, config, mesh))
    with checkpoint.open_manager(folder, [step]) as manager:
        return jax.device_get(trained(checkpoint.restore(manager, step, abstract)))


def trained(state: TrainState):
    """The parameters that count as the model."""
    return state.ema if jax.tree.leaves(state.ema) else state.params


def _state_maker(
    init: Callable, config: TrainConfig, mesh: jax.sharding.Mesh
) -> Callable[[], TrainState]:
    """A jitted function that makes the first state, the same on all devices."""
    return jax.jit(
        lambda: init_state(init(stream(config.seed, "init")), config),
        out_shardings=jax.sharding.NamedSharding(mesh, P()),
    )


def _compile(
    apply: Callable,
    schedule: Schedule,
    config: TrainConfig,
    flip: bool,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """`train_step` over the mesh; the state's buffers are reused."""

    def step(*arrays):
        return train_step(
            *arrays, apply=apply, schedule=schedule, config=config, flip=flip
        )

    specs = (P(), P("data"), P("data"), P("data"), P())
    return parallel.over_mesh(step, mesh, specs, P(), donate_argnums=0)


def _place(mesh: jax.sharding.Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """The batch, filled up with zeros to a multiple of the mesh and spread over it."""
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    placed = []
    for array in arrays:
        filling = [(0, -len(array) % mesh.size)] + [(0, 0)] * (array.ndim - 1)
        full = np.pad(array, filling)
        placed.append(
            jax.make_array_from_callback(full.shape, sharding, full.__getitem__)
        )
    return placed


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


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM, so that no step is cut in two.

    A second one acts as if this were not here.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for s, handler in before.items():
            signal.signal(s, handler)

    def request(*_) -> None:
        stop.set()
        restore()

    for s in before:
        signal.signal(s, request)
    try:
        yield stop
    finally:
        restore()
