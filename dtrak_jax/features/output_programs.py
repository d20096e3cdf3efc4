"""The programs that make Gauss-Newton matrices of the output, see `output_curvature`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.features import gradients
from dtrak_jax.features.convolutions import weight_gradients_as_products
from dtrak_jax.features.factorized import channel_sketches
from dtrak_jax.features.gradients import (
    EXAMPLES,
    Sketches,
    network_inputs,
    noised,
    predict_with,
    variables,
)
from dtrak_jax.features.microbatches import Layout, Microbatch
from dtrak_jax.features.passes import HIGHEST, cotangent
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.task import Task
from dtrak_jax.models.tags import Tags, WeightSketch
from dtrak_jax.network import Params
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.switches import standard


class OutputPrograms(NamedTuple):
    """The programs of one round, of `layout.size` noised images."""

    layout: Layout
    sketches: Sketches  # an argument of the gradients
    cotangents: int  # of an image and pair in all
    width: int  # those of a round
    gradients: Program
    """(params, frozen, Sketches, numbers [width], Microbatch) -> parts [S width, p_i]."""
    project: Program
    add: Program  # (total [devices, k, k], features [S width, k]) -> total

    @property
    def blocks(self) -> int:
        """The rounds that all cotangents of an image take."""
        return -(-self.cotangents // self.width)


@standard()
def output_programs(
    task: Task,
    params: Params,
    frozen: Params | None,
    images,
    projection: Projection,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *,
    cond: object,
    cotangents: int,
) -> OutputPrograms:
    """Returns what `gauss_newton` runs on an `example_mesh`; shapes will do for arrays."""
    shape = jax.ShapeDtypeStruct
    task = dataclasses.replace(task, measurement="loss", per_timestep=True)
    count = cotangents or math.prod(images.shape[-3:])
    width = min(count, batch_size)
    p = sum(leaf.size for leaf in variables(task, params, {}))
    layout = Layout.of(task, projection, p, max(1, batch_size // width), mesh.size)
    sketches = channel_sketches(
        task, params, frozen, projection, network_inputs(images, cond, 1)
    )
    network = jax.tree.map(
        lambda leaf: shape(leaf.shape, leaf.dtype), (params, frozen, sketches)
    )
    microbatch = gradients.microbatch_of(images, cond, layout.size)
    rows, k = layout.size * width, layout.dim
    sizes = [leaf.size for leaf in variables(task, params, sketches)]
    parts = {"output": [shape((rows, size), np.float32) for size in sizes]}
    features = shape((rows, k), np.float32)
    pulled = gradients_function(task, count, not cotangents, mesh)
    numbers = shape((width,), np.int32)
    return OutputPrograms(
        layout,
        sketches,
        count,
        width,
        Program(pulled, (*network, numbers, microbatch), mesh),
        Program(gradients.projection_function(projection, mesh, ()), (parts,), mesh),
        Program(
            add_function(mesh), (shape((mesh.size, k, k), np.float32), features), mesh
        ),
    )


@functools.cache
def gradients_function(
    task: Task, count: int, exact: bool, mesh: jax.sharding.Mesh
) -> Callable:
    """Compiles the gradients of some of `count` cotangents, see `OutputPrograms`.

    Numbers from `count` on fill up a round, and give 0.
    """

    def gradients(params, frozen, sketches, numbers, microbatch):
        def of_image(item: Microbatch) -> list[jax.Array]:
            inputs, _ = noised(task, item)
            weights = {i: WeightSketch(None, *pair) for i, pair in sketches.items()}
            predict = functools.partial(
                predict_with, task, params, frozen, Tags({}, weights), inputs
            )
            prediction, pull_back = jax.vjp(predict, variables(task, params, sketches))
            pull_back = weight_gradients_as_products(pull_back)

            def of_cotangent(number: jax.Array) -> list[jax.Array]:
                c = cotangent(task, item.pair[0], item.words, number, prediction, exact)
                (pulled,) = pull_back(item.weight[0] * (number < count) * c)
                return [leaf.reshape(-1).astype(jnp.float32) for leaf in pulled]

            return jax.vmap(of_cotangent)(numbers)

        parts = jax.vmap(of_image)(microbatch)
        return [part.reshape(-1, part.shape[-1]) for part in parts]

    in_specs = (P(), P(), P(), P(), EXAMPLES)
    return sharded(gradients, mesh, in_specs, EXAMPLES)


@functools.cache
def add_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles the sum of a device's matrix and that of further features."""

    def add(total, features):
        return total + jnp.matmul(features.T, features, precision=HIGHEST)[None]

    return sharded(add, mesh, (EXAMPLES, EXAMPLES), EXAMPLES, donate_argnums=0)
