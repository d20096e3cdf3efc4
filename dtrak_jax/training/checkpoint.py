"""Orbax checkpoints of a training run."""

from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dtrak_jax import files
from dtrak_jax.trees import named_leaves


def open_manager(
    directory: epath.PathLike, keep: Sequence[int], *, alone: bool = False
) -> ocp.CheckpointManager:
    """A manager that keeps the steps in `keep` and otherwise only the latest one.

    `alone`: only this process uses it, whatever the others do.

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
        # of managers that are `alone` would be taken for each other's.
        enable_async_checkpointing=not alone,
    )
    return ocp.CheckpointManager(
        directory,
        options=options,
        item_handlers=handler,
    )


def steps(directory: epath.PathLike) -> list[int]:
    """The steps of the whole checkpoints in a directory."""
    return ocp.path.step.checkpoint_steps(files.at(directory))


def save(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Starts saving; the state's buffers may be reused when this returns."""
    manager.save(step, args=ocp.args.PyTreeSave(state))


def save_alone(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Saves a state that is on the host, with a manager that was opened `alone`.

    With several processes Orbax writes what is on the host in process 0 only, and
    refuses arrays that are on one process's devices only. So another process's device
    is named as the holder of a second copy, which nobody reads.
    """
    others = [d for d in jax.devices() if d.process_index != jax.process_index()]
    holders = np.array([*jax.local_devices()[:1], *others[:1]])
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(holders, "copy"), jax.P())

    def place(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

    save(manager, step, jax.tree.map(place, state))


def restore(manager: ocp.CheckpointManager, step: int, abstract):
    """The state saved at `step`, shaped and placed as `abstract` says.

    Raises:
      ValueError: the checkpoint is of another model or optimiser (names the first
        array that differs), or damaged.
    """
    folder = f"{manager.directory}/{step}"
    try:
        saved = named_leaves(manager.item_metadata(step).tree)
    except Exception as error:
        raise _damaged(folder) from error
    for name, wanted in named_leaves(abstract).items():
        found = tuple(saved[name].shape) if name in saved else None
        if found != wanted.shape:
            shape = "absent" if found is None else f"of shape {found}"
            raise ValueError(
                f"the checkpoint {folder} is of another model: {name} is {shape}, "
                f"this run needs {wanted.shape}. Use the config it was trained with, "
                "or another --workdir."
            )
    try:
        where = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=where)
        return manager.restore(step, args=args)
    except Exception as error:
        raise _damaged(folder) from error


def _damaged(folder: str) -> ValueError:
    return ValueError(
        f"the checkpoint {folder} cannot be read and may be damaged; delete that "
        "folder and rerun to continue from the one before."
    )
