"""Per-example gradients of several measurements from one forward pass."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtrak_jax.digests import named_leaves
from dtrak_jax.features.convolutions import weight_gradients_as_products
from dtrak_jax.features.microbatches import Microbatch
from dtrak_jax.features.projection import DENSE, Projection, project_all
from dtrak_jax.features.task import Task
from dtrak_jax.models.tags import ChannelSketch, Tags, WeightSketch, collecting
from dtrak_jax.network import Params, network_params
from dtrak_jax.parallel import P, sharded

Sketches = dict[int, tuple[ChannelSketch, ChannelSketch]]
"""{leaf: (P_in, P_out)} of the weights whose gradient G [window, C_in, C_out] is not
formed, but P_in^T G P_out; see `factorized`."""

EXAMPLES = P(("data", "proj"))
"""Microbatches are spread over both axes, so that no gradient is computed twice."""


def network_inputs(images, cond, count: int) -> tuple:
    """Returns the shapes of (x, t, cond) for a batch of `count` of these images."""
    shape = jax.ShapeDtypeStruct
    rows = jax.tree.map(lambda leaf: shape((count, *leaf.shape[1:]), leaf.dtype), cond)
    x = shape((count, *images.shape[-3:]), jnp.float32)
    return x, shape((count,), jnp.int32), rows


def chosen_leaves(task: Task, params: Params) -> list[int]:
    """Returns the indices of the leaves of floating point that the task's pattern finds."""
    leaves = named_leaves(params)
    chosen = [
        i
        for i, (path, leaf) in enumerate(leaves.items())
        if jnp.issubdtype(leaf.dtype, jnp.floating) and re.search(task.parameters, path)
    ]
    if not chosen:
        raise ValueError(
            f"parameters is {task.parameters!r}, which finds none of the "
            f"{len(leaves)} parameters, such as {', '.join(list(leaves)[:5])}."
        )
    return chosen


def variables(task: Task, params: Params, sketches: Sketches) -> list[jax.Array]:
    """Returns what is differentiated: the chosen leaves of the parameters.

    A weight that is sketched has zeros in its place, whose gradient is the sketch.
    """
    leaves = dict(enumerate(jax.tree.leaves(params)))
    for i, (inputs, outputs) in sketches.items():
        window = leaves[i].size // (len(inputs.signs) * len(outputs.signs))
        leaves[i] = jnp.zeros((window, inputs.width, outputs.width))
    return [leaves[i] for i in chosen_leaves(task, params)]


@functools.cache
def gradient_function(task: Task, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (params, frozen, Sketches, Microbatch) -> gradients and losses.

    The results are {measurement: gradient}, and the mean squared error of every noised
    image [S, R]. A gradient is a list of parts [S, p_i], one for each variable: joined to
    [S, p] they would be there twice.
    """

    def gradients(params, frozen, sketches, microbatch):
        gradient = functools.partial(_gradient, task, params, frozen, sketches)
        return jax.vmap(gradient)(microbatch)

    return sharded(gradients, mesh, (P(), P(), P(), EXAMPLES), EXAMPLES)


@functools.cache
def addition_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles the sum of two parts of a gradient, each on the device that has it."""

    def add_gradients(total, part):
        return jax.tree.map(jnp.add, total, part)

    return sharded(add_gradients, mesh, (EXAMPLES, EXAMPLES), EXAMPLES)


@functools.cache
def projection_function(projection: Projection, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles {measurement: gradient} -> ({measurement: features}, squared norms).

    Features are [S, k], the squared norms of the gradients [S]. The devices of "proj"
    share the columns of a dense projection; all others take less time than sending.

    This is a program of its own: in one with the gradients XLA would not write those
    down before adding them up, and read the layers' products in the wrong order.
    """
    axis = "proj" if projection.kind in DENSE and mesh.shape["proj"] > 1 else None

    def squared_norms(parts):
        return sum(jnp.sum(part**2, axis=1) for part in parts)

    def project(gradients):
        features = project_all(projection, gradients, axis)
        return features, {name: squared_norms(g) for name, g in gradients.items()}

    features = P("data", "proj") if axis else EXAMPLES
    return sharded(project, mesh, (EXAMPLES,), (features, EXAMPLES))


def _gradient(
    task: Task, params, frozen, sketches: Sketches, item: Microbatch
) -> tuple[dict, jax.Array]:
    """Returns {measurement: parts [p_i]} and errors [R] of one item of a microbatch."""
    copies, shape = len(item.pair), item.x.shape[1:]
    x = jnp.broadcast_to(item.x, (copies, *shape))
    cond = jax.tree.map(lambda c: jnp.broadcast_to(c, (copies, *c.shape)), item.cond)
    t = jnp.asarray(task.pairs, jnp.int32)[item.pair, 0]
    eps = jax.vmap(lambda pair: task.eps(pair, item.words, item.position, shape))(
        item.pair
    )
    x_t = task.schedule.add_noise(x, eps, t)
    target = task.schedule.target(x, eps, t)

    predict = functools.partial(
        _predict, task, params, frozen, sketches, (x_t, t, cond)
    )
    prediction, pull_back = jax.vjp(predict, variables(task, params, sketches))
    if copies == 1:
        # A sum over many noised images is fastest as the convolution that it is.
        pull_back = weight_gradients_as_products(pull_back)
    weight = item.weight.reshape((copies,) + (1,) * (prediction.ndim - 1))
    gradients = {}
    for name, measure in task.measurements.items():
        per_image = jax.vmap(jax.grad(measure), (0, 0, 0, None))
        (pulled,) = pull_back(weight * per_image(prediction, target, t, task.schedule))
        gradients[name] = [leaf.reshape(-1).astype(jnp.float32) for leaf in pulled]
    error = jnp.mean((prediction - target) ** 2, axis=tuple(range(1, prediction.ndim)))
    return gradients, error


def _predict(task: Task, params, frozen, sketches: Sketches, inputs, values):
    """Returns the prediction where the variables have these values."""
    leaves, treedef = jax.tree.flatten(params)
    weights = {id(leaves[i]): i for i in sketches}
    replaced = dict(zip(chosen_leaves(task, params), values, strict=True))
    sketched = {i: WeightSketch(replaced.pop(i), *sketches[i]) for i in sketches}
    leaves = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
    with collecting(Tags(weights, sketched)):
        joined = network_params(treedef.unflatten(leaves), frozen)
        # Measurements of a network of half precision are made in float32.
        return task.network(joined, *inputs).astype(jnp.float32)
