"""Orbax checkpoints of a training run."""

from collections.abc import Sequence

import jax
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
    if alone:
        me = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(
            primary_host=me,
            active_processes={me},
            barrier_sync_key_prefix=f"process{me}",
        )
    options = ocp.CheckpointManagerOptions(
        multiprocessing_options=processes,
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(1), policies.CustomSteps(keep)]
        ),
        cleanup_tmp_directories=True,
        create=False,
    )
    return ocp.CheckpointManager(
        directory,
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def steps(directory: epath.PathLike) -> list[int]:
    """The steps of the whole checkpoints in a directory."""
    return ocp.path.step.checkpoint_steps(files.at(directory))


def save(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Starts saving; the state's buffers may be reused when this returns."""
    manager.save(step, args=ocp.args.StandardSave(state))


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
        return manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:
        raise _damaged(folder) from error


def _damaged(folder: str) -> ValueError:
    return ValueError(
        f"the checkpoint {folder} cannot be read and may be damaged; delete that "
        "folder and rerun to continue from the one before."
    )
