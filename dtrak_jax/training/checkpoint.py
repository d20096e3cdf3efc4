"""Orbax checkpoints of a training run."""

from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dtrak_jax import files
from dtrak_jax.digests import named_leaves


def open_manager(
    directory: epath.PathLike, keep: Sequence[int], *, alone: bool = False
) -> ocp.CheckpointManager:
    """Returns a manager that keeps the steps in `keep`, and else only the latest one.

    One that is `alone` is used by this process, whatever the other processes do.

    A checkpoint counts once it is whole (on a local disk by a rename, on gs:// by a
    file that says so), so a killed run leaves the one before it.
    """
    directory = files.at(directory)
    if not files.is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)
    processes = ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler()
    if alone:
        me = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(
            primary_host=me,
            active_processes={me},
            barrier_sync_key_prefix=f"process{me}",
        )
        arrays = ocp.type_handlers.ArrayHandler(
            primary_host=me, replica_id=0, use_replica_parallel=False
        )
        handler = ocp.PyTreeCheckpointHandler(
            multiprocessing_options=processes,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
            ),
        )
    options = ocp.CheckpointManagerOptions(
        multiprocessing_options=processes,
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(1), policies.CustomSteps(keep)]
        ),
        cleanup_tmp_directories=True,
        create=False,
        # The signals of asynchronous saves have names that all processes share: those
        # of managers that are `alone` would be taken for each other's. And where
        # another process waits, a save that fails, as on a full disk, would have it
        # wait for ever.
        enable_async_checkpointing=not alone and jax.process_count() == 1,
    )
    return ocp.CheckpointManager(directory, options=options, item_handlers=handler)


def steps(directory: epath.PathLike) -> list[int]:
    """Returns the steps of the whole checkpoints in a directory."""
    return ocp.path.step.checkpoint_steps(files.at(directory))


def latest_step(directory: epath.PathLike) -> int:
    """Returns the step of the newest checkpoint in a directory; 0 if there is none."""
    return max(steps(directory), default=0)


def save(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Starts saving; the state's buffers may be reused when this returns."""
    manager.save(step, args=ocp.args.PyTreeSave(state))


def save_alone(directory: epath.PathLike, step: int, state) -> None:
    """Saves a state that is on the host, whatever the other processes do.

    With several processes Orbax writes arrays on the host in process 0 only, and refuses
    arrays that are on one process's devices only. So another process's device is named
    as the holder of a second copy, which nobody reads.
    """
    elsewhere = [d for d in jax.devices() if d.process_index != jax.process_index()]
    holders = np.array([*jax.local_devices()[:1], *elsewhere[:1]])
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(holders, "copy"), jax.P())

    def put(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

    with open_manager(directory, [], alone=True) as manager:
        save(manager, step, jax.tree.map(put, state))


def load(directory: epath.PathLike, step: int, shapes, *, alone: bool = False):
    """Returns the state saved at `step` in NumPy arrays; raises as `restore` does."""
    arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    with open_manager(directory, [step], alone=alone) as manager:
        return restore(manager, step, arrays)


def restore(manager: ocp.CheckpointManager, step: int, abstract):
    """Returns the state saved at `step`, shaped and placed as `abstract` says.

    Raises:
      ValueError: the checkpoint is of another model or optimiser (names the first
        array that differs), or damaged.
    """
    folder, differing = f"{manager.directory}/{step}", []
    try:
        saved = named_leaves(manager.item_metadata(step).tree)
        for name, leaf in named_leaves(abstract).items():
            shape = tuple(saved[name].shape) if name in saved else None
            if shape != leaf.shape:
                differing.append((name, shape, leaf.shape))
        if not differing:
            places = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(abstract, restore_args=places)
            return manager.restore(step, args=args)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {folder} cannot be read and may be damaged; delete that "
            "folder and rerun to continue from the one before."
        ) from error
    name, shape, expected = differing[0]
    is_saved = "absent" if shape is None else f"of shape {shape}"
    raise ValueError(
        f"the checkpoint {folder} is of another model: {name} is {is_saved}, this run "
        f"needs {expected}. Use the config it was trained with, or another --workdir."
    )
