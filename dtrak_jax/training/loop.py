"""The loop that trains the main model on all devices, resumable at any step."""

import functools

import jax
import numpy as np
from etils import epath

from dtrak_jax import parallel
from dtrak_jax.network import Init, Params
from dtrak_jax.parallel import P
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard
from dtrak_jax.training import checkpoint, programs
from dtrak_jax.training.config import TrainConfig, kept_steps, saved_steps
from dtrak_jax.training.metrics import Metrics
from dtrak_jax.training.step import (
    Batch,
    Recipe,
    abstract_state,
    batch,
    first_state,
    trained,
)
from dtrak_jax.training.stop import stop_requests


@standard()
def train(
    recipe: Recipe,
    images: np.ndarray,
    directory: epath.PathLike,
    *,
    cond=None,
    frozen: Params | None = None,
    description: str = "train",
) -> Params:
    """Trains to the end, or continues to it, and returns the trained parameters.

    Args:
      recipe: the network, the noise schedule and the settings.
      images: training images [n, H, W, C] in [-1, 1]; may be mapped from a file. Or
        what the recipe's view takes, a pytree of arrays of n rows.
      directory: run directory; gets `checkpoints/` and `metrics.jsonl`.
      cond: a pytree of arrays of n rows, which the network is conditioned on.
      frozen: parameters beside the trained ones, in no checkpoint. If given, the
        network is called with the pair (params, frozen) in place of params.
      description: the progress bar's.

    Returns:
      Parameters on the host (averaged ones if `config.ema_decay`).

    Raises:
      FloatingPointError: the loss is no longer finite.
      KeyboardInterrupt: on SIGINT or SIGTERM to any process, after saving the state.
      ValueError: a checkpoint in the directory is of another model.
    """
    config, directory = recipe.config, epath.Path(directory)
    mesh = parallel.mesh(jax.devices())
    step_fn, frozen = programs.step_function(recipe, mesh), parallel.put(frozen, mesh)
    seed, saved, asked = np.uint32(config.seed), saved_steps(config), False
    count = len(jax.tree.leaves(images)[0])
    make_state = jax.jit(
        functools.partial(first_state, recipe.init, config, seed),
        out_shardings=programs.state_shardings(recipe, mesh),
    )
    folder = directory / "checkpoints"
    with (
        checkpoint.open_manager(folder, kept_steps(config)) as manager,
        stop_requests() as stop,
    ):
        start = manager.latest_step() or 0
        if start:
            state = checkpoint.restore(manager, start, jax.eval_shape(make_state))
        else:
            state = make_state()
        metrics = Metrics(directory / "metrics.jsonl", start, config)
        with progress(
            total=config.steps, initial=start, desc=description, unit="step"
        ) as bar:
            for step in range(start, config.steps):
                rows, weights = batch(count, config.batch_size, config.seed, step)
                examples = put_batch(mesh, (images, cond), rows, weights)
                flags = spread(mesh, np.full(mesh.size, stop.is_set(), np.int32))
                asked_before = asked
                state, asked = step_fn(state, examples, seed, frozen, flags)
                done = step + 1
                # Processes must stop at the same step: each goes by the answer of the
                # step before, which is the same in all, and waits for none that runs.
                stopping = bool(asked if done == config.steps else asked_before)
                bar.update()
                if done % config.log_every == 0 or done == config.steps:
                    bar.set_postfix(loss=f"{metrics.write(done, state.loss_sum):.4f}")
                if done in saved or stopping:
                    metrics.flush()
                    checkpoint.save(manager, done, state)
                if stopping:
                    manager.wait_until_finished()
                    raise KeyboardInterrupt(
                        f"training stopped after step {done} of {config.steps}, which "
                        "is saved; the same command continues from there"
                    )
    whole = parallel.shardings(mesh, parallel.REPLICATED)
    return jax.device_get(jax.jit(trained, out_shardings=whole)(state))


def load_params(
    init: Init, config: TrainConfig, directory: epath.PathLike, step: int | None = None
) -> Params:
    """Returns the trained parameters of a kept step, or the last, on the host.

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
    return trained(checkpoint.load(folder, step, abstract_state(init, config)))


def put_batch(
    mesh: jax.sharding.Mesh, examples: tuple, rows: np.ndarray, weights: np.ndarray
) -> Batch:
    """Returns these rows of (images, cond) over the mesh, filled up to a multiple of it.

    A process reads the images of its own devices only; the filling has weight 0.
    """
    filling = (0, -len(rows) % mesh.size)
    rows, weights = np.pad(rows.astype(np.int32), filling), np.pad(weights, filling)
    x, cond = jax.tree.map(lambda leaf: spread(mesh, leaf, rows), examples)
    return Batch(x, spread(mesh, rows), spread(mesh, weights), cond)


def spread(mesh: jax.sharding.Mesh, array, rows: np.ndarray | None = None):
    """Returns these rows of an array (or all) over the data axis of the mesh."""
    rows = np.arange(len(array)) if rows is None else rows
    return jax.make_array_from_callback(
        (len(rows), *array.shape[1:]),
        jax.NamedSharding(mesh, P("data")),
        lambda index: array[rows[index[0]]],
    )
