"""Orbax checkpoints of a training run."""

from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies


def open_manager(
    directory: epath.PathLike, keep: Sequence[int]
) -> ocp.CheckpointManager:
    """A manager that keeps the steps in `keep` and otherwise only the latest one.

    A checkpoint appears by a rename once it is whole, so a killed run leaves the one
    before it.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(1), policies.CustomSteps(keep)]
        ),
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(epath.Path(directory).absolute(), options=options)


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
        saved = dict(_flatten(manager.item_metadata(step)))
        state = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:
        saved = locals().get("saved", {})
        for name, wanted in _flatten(abstract):
            found = saved.get(name)
            if found is None or tuple(found.shape) != tuple(wanted.shape):
                shape = "absent" if found is None else f"of shape {found.shape}"
                raise ValueError(
                    f"the checkpoint {folder} is of another model: {name} is {shape}, "
                    f"this run needs {wanted.shape}. Use the config it was trained "
                    "with, or another --workdir."
                ) from error
        raise ValueError(
            f"the checkpoint {folder} cannot be read and may be damaged; delete that "
            "folder and rerun to continue from the one before."
        ) from error
    return state


def _flatten(tree) -> list[tuple[str, object]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in leaves
    ]
