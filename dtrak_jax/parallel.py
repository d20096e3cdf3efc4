"""Devices and processes.

A mesh has the axes "member" (models of an ensemble), "data" (examples) and "proj"
(columns of a projection). Whatever is vmapped over members or examples runs under
`shard_map`, since XLA's automatic partitioning of a vmapped convolution's gradient
gives silently wrong values; ordinary data-parallel training does not need it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

P = jax.P
REPLICATED = P()
"""The spec of an array that every device holds whole."""

TIMEOUT = 30
"""Seconds of silence after which a process counts as dead and the others end.

A thread that needs no Python sends a heartbeat every 15 s or less, whatever the process
compiles, computes or reads, so a host may stand still for this long. JAX's own default
of 100 s would be that much more of a pod that is paid for and waits.
"""


class Program(NamedTuple):
    """A compiled function on a mesh, and the arguments that it is called with."""

    function: Callable  # that `jax.jit` made
    arguments: tuple  # pytrees of `jax.ShapeDtypeStruct`
    mesh: jax.sharding.Mesh


def start() -> None:
    """Joins the other processes of a multi-process run, before any device is used.

    A process finds its peers by itself on Cloud TPU, Slurm and Kubernetes. Elsewhere
    JAX_COORDINATOR_ADDRESS must be set, and JAX_NUM_PROCESSES and JAX_PROCESS_ID, which
    are read here; DTRAK_HEARTBEAT sets another `TIMEOUT` in seconds.

    From here on the processes share one fate. When one dies, all others end with an
    error: at once if it was process 0, and otherwise within `TIMEOUT` seconds, or sooner
    if they wait for it in a collective. Either that fails, or JAX's runtime says
    "Terminating process because the JAX distributed service detected fatal errors" and
    aborts, which no handler can prevent. The same command continues from what was
    written.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    # JAX's own handler would take SIGTERM from all stages; see `training.stop`.
    jax.config.update("jax_enable_preemption_service", False)
    given = {k: int(os.environ[v]) for k, v in names.items() if v in os.environ}
    timeout = int(os.environ.get("DTRAK_HEARTBEAT", TIMEOUT))
    jax.distributed.initialize(
        **given,
        heartbeat_timeout_seconds=timeout,
        # A process that ends waits for all others, which reach the same barrier.
        shutdown_timeout_seconds=timeout,
    )


def abandon(code: int) -> NoReturn:
    """Exits with an error that only this process has.

    JAX makes a process wait for the others when it ends. This exit does not: the others
    wait for this process, and must see that it is gone.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_main_process() -> bool:
    """Returns whether this process writes the files that are written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has reached it; `name` must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(answer: bool) -> bool:
    """Returns the main process's answer in every process, once all have asked.

    Whatever decides which way all processes go is agreed on, such as whether a file
    exists: it may appear between two looks, or not be visible on every host yet.
    """
    return bool(of_main_process(np.asarray(answer)))


def of_main_process(array: np.ndarray) -> np.ndarray:
    """Returns the main process's array in every process: hosts may round differently, and
    must not go different ways."""
    return multihost_utils.broadcast_one_to_all(array)


def share(count: int) -> slice:
    """Returns the rows out of `count` that this process computes; see `gather`."""
    size = -(-count // jax.process_count())
    start = min(jax.process_index() * size, count)
    return slice(start, min(start + size, count))


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns all `count` rows in order in every process, each of which gives its `share`."""
    size = -(-count // jax.process_count())
    filled = np.zeros((size, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return multihost_utils.process_allgather(filled, tiled=True)[:count]


def mesh(
    devices: Sequence[jax.Device], members: int = 1, proj: int = 1
) -> jax.sharding.Mesh:
    """Returns a mesh of `members` x rest x `proj` devices, axes member, data, proj.

    Its axes are in Auto mode, so that `shard_map` moves its arguments itself and
    ordinary training is partitioned by XLA.
    """
    auto = (jax.sharding.AxisType.Auto,) * 3
    shape = (members, len(devices) // (members * proj), proj)
    return jax.make_mesh(shape, ("member", "data", "proj"), auto, devices=devices)


def shardings(mesh: jax.sharding.Mesh, specs):
    """Returns the `NamedSharding` of every `PartitionSpec` of a pytree."""
    return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)


def put(tree, mesh: jax.sharding.Mesh, spec: jax.P = REPLICATED):
    """Puts every array on the mesh, replicated on all devices or sharded by `spec`."""
    return jax.device_put(tree, shardings(mesh, spec))


def sharded(
    function: Callable, mesh: jax.sharding.Mesh, in_specs, out_specs, **jit_options
) -> Callable:
    """Compiles `function` to run on every device of the mesh with its own shard.

    The shard_map is unchecked: in checked mode gradients of replicated parameters would
    be summed over the devices. Sums over devices are written out instead.
    """
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped, **jit_options)


def pad(array: np.ndarray, count: int) -> np.ndarray:
    """Returns the array with its last row repeated until there are `count` rows."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def of_process(items: Sequence) -> Sequence:
    """Returns this process's part of what processes share out item by item."""
    return items[jax.process_index() :: jax.process_count()]


def groups(items: Sequence, per_device: int = 1) -> list[Sequence]:
    """Cuts items into groups of `per_device` for each of this process's devices.

    What is left over is spread evenly over the devices, and then over some of them.
    """
    width, start, cut = len(jax.local_devices()), 0, []
    while start < len(items):
        left = len(items) - start
        size = min(width * per_device, left - left % width or left)
        cut.append(items[start : start + size])
        start += size
    return cut
