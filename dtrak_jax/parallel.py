"""Devices and processes.

Mesh axes "member" (models of an ensemble), "data" (examples) and "proj" (columns of a
projection), and `shard_map` over them: all are split by hand, since XLA's automatic
partitioning of a vmapped convolution's gradient gives silently wrong values.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

P = jax.P
WHOLE = P()
"""Of an array that every device has all of."""

TIMEOUT = 30
"""Seconds after which a process that is silent counts as dead, and ends the others.

A thread that needs no Python sends a sign of life every 15 s or less, whatever the
process compiles, computes or reads; so this is how long a host may stand still. JAX's
own 100 s would be that much more of a pod that is paid for and waits.
"""


def start() -> None:
    """Joins the other processes of a multi-process run; call before any device use.

    Finds its peers by itself on Cloud TPU, Slurm and Kubernetes. Elsewhere set
    JAX_COORDINATOR_ADDRESS, and JAX_NUM_PROCESSES and JAX_PROCESS_ID, which are read
    here.

    From here on the processes share one fate. Where one dies, all others end with an
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
    jax.distributed.initialize(
        **given,
        heartbeat_timeout_seconds=TIMEOUT,
        # At its end a process waits for all others, which come after the same barrier.
        shutdown_timeout_seconds=TIMEOUT,
    )


def abandon(code: int) -> NoReturn:
    """Exits with an error that the other processes do not have.

    Without the wait for the others that JAX puts at the end of a process: they wait
    for this one, and must see that it is gone.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_primary() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process has come here; `name` must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(answer: bool) -> bool:
    """The primary's answer, in every process; returns once all have asked.

    For what decides which way all of them go, such as whether a file is there: it may
    have come between two looks, or not be seen by every host yet.
    """
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def share(count: int) -> slice:
    """Which of `count` rows are this process's part; see `gather`."""
    size = -(-count // jax.process_count())
    start = min(jax.process_index() * size, count)
    return slice(start, min(start + size, count))


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """All `count` rows, in order, in every process, which each have their `share`."""
    size = -(-count // jax.process_count())
    filled = np.zeros((size, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return multihost_utils.process_allgather(filled, tiled=True)[:count]


def mesh(
    devices: Sequence[jax.Device], members: int = 1, proj: int = 1
) -> jax.sharding.Mesh:
    """A mesh with the axes "member" and "proj", of these sizes, and "data" between them.

    Auto mode, so that `shard_map` places its arguments itself; nothing is computed
    outside of it.
    """
    auto = (jax.sharding.AxisType.Auto,) * 3
    shape = (members, len(devices) // (members * proj), proj)
    return jax.make_mesh(shape, ("member", "data", "proj"), auto, devices=devices)


def shardings(mesh: jax.sharding.Mesh, specs):
    """How arrays that are split by these specs lie on the mesh."""
    return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)


def place(tree, mesh: jax.sharding.Mesh, spec: jax.P = WHOLE):
    """Puts every array on the mesh: whole on all devices, or split by `spec`."""
    return jax.device_put(tree, shardings(mesh, spec))


def over_mesh(
    function: Callable, mesh: jax.sharding.Mesh, in_specs, out_specs, **jit_options
) -> Callable:
    """Compiles `function` to run on every device of the mesh, with its own shard.

    Unchecked: checked mode would add up over the devices the gradients of parameters
    that are the same on all of them. Sums over devices are written out instead.

    Where XLA has no program for these devices, every one runs its own; they then can
    exchange nothing.
    """
    if not _compiles(mesh):
        return _OneByOne(function, mesh, in_specs, out_specs, **jit_options)
    return _joint(function, mesh, in_specs, out_specs, **jit_options)


def _joint(function, mesh, in_specs, out_specs, **jit_options) -> Callable:
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped, **jit_options)


@functools.cache
def _compiles(mesh: jax.sharding.Mesh) -> bool:
    """Whether XLA has programs for these devices, found out with one.

    On a slice of more than 16 chips of TPU v5e a program runs on all of them or on one
    ("limited ICI routing"), and not on those of one host.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "tpu":
        return True
    program = _joint(lambda x: x + 1, mesh, P(mesh.axis_names), P(mesh.axis_names))
    try:
        program.lower(jax.ShapeDtypeStruct((mesh.size,), np.float32)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "should include all slice devices" in str(error):
            return False
        raise
    return True


class _OneByOne:
    """What `over_mesh` returns, as a program for each device, with arrays on all."""

    def __init__(self, function, mesh, in_specs, out_specs, **jit_options):
        if mesh.shape["proj"] > 1:
            raise ValueError(
                f"proj_devices is {mesh.shape['proj']}; it must be 1 on this slice, "
                "where XLA has no programs for the devices of one host together."
            )
        self.given, self.made = shardings(mesh, (in_specs, out_specs))
        # To know shapes nothing is compiled.
        self.eval_shape = _joint(function, mesh, in_specs, out_specs).eval_shape
        # Without the axes that are split, to use which for a sum is an error.
        axes = tuple(axis for axis, size in mesh.shape.items() if size == 1)
        auto = (jax.sharding.AxisType.Auto,) * len(axes)
        self.programs = {
            device: _joint(
                function,
                jax.make_mesh((1,) * len(axes), axes, auto, devices=[device]),
                P(),
                P(),
                **jit_options,
            )
            for device in mesh.devices.flat
        }

    def __call__(self, *arguments):
        leaves, structure = jax.tree.flatten(jax.device_put(arguments, self.given))
        shards = [
            {s.device: s.data for s in leaf.addressable_shards} for leaf in leaves
        ]
        results = [
            program(*structure.unflatten([shard[device] for shard in shards]))
            for device, program in self.programs.items()
        ]
        return jax.tree.map(
            _assembled, jax.tree.broadcast(self.made, results[0]), *results
        )

    def trace(self, *arguments) -> jax.stages.Traced:
        """Of the first device's program."""
        shapes = jax.tree.map(
            lambda sharding, argument: jax.ShapeDtypeStruct(
                sharding.shard_shape(argument.shape), argument.dtype
            ),
            jax.tree.broadcast(self.given, arguments),
            arguments,
        )
        return next(iter(self.programs.values())).trace(*shapes)


def _assembled(sharding: jax.NamedSharding, *shards: jax.Array) -> jax.Array:
    """One array of what every device has of it."""
    split = [axes or () for axes in sharding.spec]
    split += [()] * (shards[0].ndim - len(split))
    shape = tuple(
        size * math.prod(sharding.mesh.shape[axis] for axis in np.atleast_1d(axes))
        for size, axes in zip(shards[0].shape, split, strict=True)
    )
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def pad(array: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last row until there are `count` rows."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])
