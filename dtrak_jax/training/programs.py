"""The compiled programs of training, for running and for planning alike.

The main model trains on one mesh of all processes' devices: `jax.jit` with shardings,
the batch split over them, and XLA adds the gradients up. Retrained members train on the
devices of their own process under `shard_map`, each on one device as if alone: a
convolution that is vmapped over members would be partitioned wrongly.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import parallel
from dtrak_jax.network import Shapes, rows_of
from dtrak_jax.parallel import REPLICATED, P, Program
from dtrak_jax.training.step import Batch, Recipe, abstract_state, train_step


def shard_specs(tree, devices: int):
    """Returns how the leaves of `tree` are spread over "data" of so many devices.

    This is ZeRO stage 3 (Rajbhandari et al. 2019, arXiv 1910.02054) by annotations
    alone: XLA gathers parameters where they are used, and adds gradients up. A leaf is
    split along its largest dimension that `devices` divides. A leaf without one is
    replicated, as vectors (biases, scales) are: they are not worth a message.
    """

    def spec(leaf) -> P:
        fitting = [i for i, size in enumerate(leaf.shape) if size % devices == 0]
        if leaf.ndim < 2 or not fitting:
            return REPLICATED
        axis = max(fitting, key=lambda i: leaf.shape[i])
        return P(*[None] * axis, "data")

    return jax.tree.map(spec, tree)


def state_shardings(recipe: Recipe, mesh: jax.sharding.Mesh):
    """Returns how a state lies on the mesh: replicated, or spread by `train.fsdp`."""
    specs = REPLICATED
    if recipe.config.fsdp:
        specs = shard_specs(abstract_state(recipe.init, recipe.config), mesh.size)
    return parallel.shardings(mesh, specs)


@functools.cache
def step_function(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the jitted step of the main model.

    It maps (state, batch, seed, frozen, asked) to the next state, in the buffers of the
    one before, and to the largest of `asked`, int [devices]: whether any process is to
    stop. That travels with the step, since a second program with a collective might
    run beside it, in another order in every process.
    """

    def main_step(state, batch, seed, frozen, asked):
        return train_step(recipe, state, batch, seed, frozen), jnp.max(asked)

    state = state_shardings(recipe, mesh)
    spread, replicated = parallel.shardings(mesh, (P("data"), REPLICATED))
    return jax.jit(
        main_step,
        in_shardings=(state, spread, replicated, replicated, spread),
        out_shardings=(state, replicated),
        donate_argnums=0,
    )


@functools.cache
def member_step_function(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the jitted step of members, as many on each device of the mesh.

    It maps (states, batches, seeds [M], frozen) to the next states, in the buffers of
    those before. All arrays but the frozen ones have a leading axis of members.
    """

    def member_step(states, batches, seeds, frozen):
        def step(state, batch, seed):
            return train_step(recipe, state, batch, seed, frozen)

        if len(seeds) > 1:
            return jax.vmap(step)(states, batches, seeds)
        # A convolution that is vmapped over its weights is slower than one alone.
        inputs = jax.tree.map(lambda leaf: leaf[0], (states, batches, seeds))
        return jax.tree.map(lambda leaf: leaf[None], step(*inputs))

    in_specs = (P("member"), P("member"), P("member"), REPLICATED)
    return parallel.sharded(member_step, mesh, in_specs, P("member"), donate_argnums=0)


def planned_step(
    recipe: Recipe, shapes: Shapes, devices: Sequence[jax.Device]
) -> Program:
    """Returns the step of the main model, which `train` calls `config.steps` times."""
    mesh, size = parallel.mesh(devices), recipe.config.batch_size
    arguments = _arguments(recipe, shapes, size + -size % len(devices))
    asked = jax.ShapeDtypeStruct((len(devices),), np.int32)
    return Program(
        step_function(recipe, mesh), (*arguments, shapes.frozen, asked), mesh
    )


def planned_member_step(
    recipe: Recipe, shapes: Shapes, devices: Sequence[jax.Device], per_device: int
) -> Program:
    """Returns the step of a group of members, as many on each of a process's devices.

    `train_members` calls it `config.steps` times for each of the process's groups.
    """
    mesh = parallel.mesh(devices, len(devices))
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (len(devices) * per_device, *leaf.shape), leaf.dtype
        ),
        _arguments(recipe, shapes, recipe.config.batch_size),
    )
    return Program(member_step_function(recipe, mesh), (*stacked, shapes.frozen), mesh)


def _arguments(recipe: Recipe, shapes: Shapes, size: int) -> tuple:
    """Returns the shapes of a state, a batch and a seed."""
    shape = jax.ShapeDtypeStruct
    batch = Batch(
        x=rows_of(shapes.example, size),
        index=shape((size,), np.int32),
        weights=shape((size,), np.float32),
        cond=rows_of(shapes.cond, size),
    )
    state = abstract_state(recipe.init, recipe.config)
    return state, batch, shape((), np.uint32)
