"""Per-example gradients of several measurements from one forward pass."""

import dataclasses
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

LayerGroups = tuple[tuple[str, tuple[int, ...]], ...]
"""The name of each group of parameters, and its positions among the chosen leaves."""

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


def tagged_layers(
    task: Task, params: Params, frozen: Params | None, inputs: tuple
) -> Tags:
    """Returns the layers of the chosen leaves that the network tags, by index, sorted.

    Shapes will do for parameters; the inputs are the shapes of (x, t, cond). Sizes and
    shapes are meant to be read, since arrays are those of a trace that is over.

    Raises:
      ValueError: a weight of which only some uses are tagged.
    """
    leaves, treedef = jax.tree.flatten(params)
    tags = Tags({}, {})

    def predict(leaves, frozen, x, t, cond):
        tags.weights.update({id(leaves[i]): i for i in chosen_leaves(task, params)})
        with collecting(tags):
            joined = network_params(treedef.unflatten(leaves), frozen)
            return task.network(joined, x, t, cond)

    program = jax.make_jaxpr(predict)(leaves, frozen, *inputs).jaxpr
    for i in sorted(tags.sizes):
        leaf, tagged = program.invars[i], len(tags.uses[i])
        uses = sum(leaf is used for e in program.eqns for used in e.invars)
        if uses != tagged:  # a part of its gradient would be lost
            raise ValueError(
                f"{list(named_leaves(params))[i]} is tagged as the weight of {tagged} "
                f"layers; the network uses it {uses} times. Tag every use, or take "
                "projection 'sketch' and a method other than 'ekfac'."
            )
    sizes = dict(sorted(tags.sizes.items()))
    return dataclasses.replace(tags, sizes=sizes)


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


def feature_names(task: Task, groups: LayerGroups) -> list[str]:
    """Returns the names of the features of a gradient: the measurements, or
    MEASUREMENT/GROUP of each group."""
    measurements = task.measurements
    if not groups:
        return list(measurements)
    return [f"{name}/{group}" for name in measurements for group, _ in groups]


@functools.cache
def projection_function(
    projection: Projection, mesh: jax.sharding.Mesh, groups: LayerGroups = ()
) -> Callable:
    """Compiles {measurement: gradient} -> ({measurement: features}, squared norms).

    Features are [S, k], the squared norms of the gradients [S]. The devices of "proj"
    share the columns of a dense projection; all others take less time than sending.
    With groups they are those of each group's part of the gradient, see `feature_names`.

    This is a program of its own: in one with the gradients XLA would not write those
    down before adding them up, and read the layers' products in the wrong order.
    """
    axis = "proj" if projection.kind in DENSE and mesh.shape["proj"] > 1 else None

    def squared_norms(parts):
        return sum(jnp.sum(part**2, axis=1) for part in parts)

    def project(gradients):
        features = project_all(projection, gradients, axis)
        return features, {name: squared_norms(g) for name, g in gradients.items()}

    def project_groups(gradients):
        features, norms = {}, {}
        for group, members in groups:
            made = project_all(projection, gradients, axis, members)
            for name, parts in gradients.items():
                features[f"{name}/{group}"] = made[name]
                own = [parts[i] for i in members]
                norms[f"{name}/{group}"] = squared_norms(own)
        return features, norms

    features = P("data", "proj") if axis else EXAMPLES
    function = project_groups if groups else project
    return sharded(function, mesh, (EXAMPLES,), (features, EXAMPLES))


def _gradient(
    task: Task, params, frozen, sketches: Sketches, item: Microbatch
) -> tuple[dict, jax.Array]:
    """Returns {measurement: parts [p_i]} and errors [R] of one item of a microbatch."""
    copies, (inputs, target) = len(item.pair), noised(task, item)
    t = inputs[1]
    weights = {i: WeightSketch(None, *pair) for i, pair in sketches.items()}
    predict = functools.partial(
        predict_with, task, params, frozen, Tags({}, weights), inputs
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


def noised(task: Task, item: Microbatch) -> tuple[tuple, jax.Array]:
    """Returns the network's inputs (x_t, t, cond) and its targets at an item's R pairs."""
    copies, shape = len(item.pair), item.x.shape[1:]
    x = jnp.broadcast_to(item.x, (copies, *shape))
    cond = jax.tree.map(lambda c: jnp.broadcast_to(c, (copies, *c.shape)), item.cond)
    t = jnp.asarray(task.pairs, jnp.int32)[item.pair, 0]
    eps = jax.vmap(lambda pair: task.eps(pair, item.words, item.position, shape))(
        item.pair
    )
    inputs = task.schedule.add_noise(x, eps, t), t, cond
    return inputs, task.schedule.target(x, eps, t)


def predict_with(task: Task, params, frozen, tags: Tags, inputs, values) -> jax.Array:
    """Returns the prediction where the chosen leaves have these values.

    The values of weights that `tags` has sketches of are what these go into. The layers of
    weights with sketches or taps are added to `tags`.
    """
    leaves, treedef = jax.tree.flatten(params)
    replaced = dict(zip(chosen_leaves(task, params), values, strict=True))
    for i, sketch in tags.sketches.items():
        tags.sketches[i] = sketch._replace(into=replaced.pop(i))
    leaves = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
    tags.weights.update({id(leaves[i]): i for i in (*tags.sketches, *tags.taps)})
    with collecting(tags):
        joined = network_params(treedef.unflatten(leaves), frozen)
        # Measurements of a network of half precision are made in float32.
        return task.network(joined, *inputs).astype(jnp.float32)
