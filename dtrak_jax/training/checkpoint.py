"""Orbax checkpoints of a training run."""

from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dtrak_jax.trees import named_leaves


def open_manager(
    directory: epath.PathLike, keep: Sequence[int], *, alone: bool = False
) -> ocp.CheckpointManager:
    """A manager that keeps the steps in `keep` and otherwise only the latest one.

    `alone`: only this process uses it, whatever the others do.

    A checkpoint appears by a rename once it is whole, so a killed run leaves the one
    before it.
    """
    directory = epath.Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    processes = ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler()
    if alone and jax.process_count() > 1:
        me = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(
            primary_host=me,
            active_processes={me},
            barrier_sync_key_prefix=f"process{me}",
        )
        arrays = ocp.type_handlers.ArrayHandler(
            primary_host=me, use_replica_parallel=False
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


def save(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Starts saving; the state's buffers may be reused when this returns.

    What `alone` managers save are NumPy arrays.
    """
    if jax.process_count() > 1:
        state = jax.tree.map(_shared, state)
    manager.save(step, args=ocp.args.PyTreeSave(state))


def _shared(leaf):
    """A NumPy array as one of which this process has the first copy, another the second.

    Of several processes Orbax has only process 0 write a NumPy array, and none an array
    that is on its own devices alone; of copies, it has the first one written.
    """
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    me, here = jax.process_index(), jax.local_devices()[0]
    elsewhere = next(d for d in jax.devices() if d.process_index != me)
    both = jax.sharding.Mesh([here, elsewhere], "copy")
    sharding = jax.sharding.NamedSharding(both, jax.P())
    mine = jax.device_put(leaf, here)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [mine])


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
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return manager.restore(step, args=ocp.args.PyTreeRestore(abstract, how))
    except Exception as error:
        raise _damaged(folder) from error


def _damaged(folder: str) -> ValueError:
    return ValueError(
        f"the checkpoint {folder} cannot be read and may be damaged; delete that "
        "folder and rerun to continue from the one before."
    )
