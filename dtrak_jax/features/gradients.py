"""Per-example gradients of several measurements from one forward pass."""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.digests import named_leaves
from dtrak_jax.features.convolutions import weight_gradients_as_products
from dtrak_jax.features.measurements import value_of
from dtrak_jax.features.microbatches import Microbatch
from dtrak_jax.features.projection import DENSE, Projection, project_all
from dtrak_jax.features.task import Task
from dtrak_jax.models.tags import ChannelSketch, Tags, WeightSketch, collecting
from dtrak_jax.network import Params, network_params
from dtrak_jax.parallel import P, sharded

MISMATCH = 0.03
"""The part of a gradient by which it may differ from what a tag says, by rounding."""

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


def microbatch_of(images, cond, size: int, copies: int = 1) -> Microbatch:
    """Returns the shapes of a microbatch of `size` items of these images, of which all
    copies are made on the devices."""
    shape = jax.ShapeDtypeStruct
    x, _, condition = network_inputs(images, cond, size)
    return Microbatch(
        x=shape((size, 1, *x.shape[1:]), jnp.float32),
        words=shape((size, 2), jnp.uint32),
        position=shape((size,), jnp.int32),
        pair=shape((size, copies), jnp.int32),
        weight=shape((size, copies), jnp.float32),
        cond=condition,
    )


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


def check_tags(task: Task, network: tuple, images, cond) -> None:
    """Raises a ValueError unless the weights that a network tags by `layer` have the
    gradients that the tags say, sum_positions a delta^T.

    They are compared for one image of noise, a random cotangent, and parameters
    (params, frozen) that are moved a little, so that none of them is 0.
    """
    params, frozen = network
    tags = tagged_layers(task, params, frozen, network_inputs(images, cond, 1))
    if not tags.by_hand:
        return
    rng = np.random.default_rng(0)

    def moved(leaf):
        size = 0.1 * max(np.abs(np.asarray(leaf, np.float32)).mean(), 0.1)
        return leaf + (size * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    params = jax.tree.map(
        lambda leaf: moved(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        params,
    )
    x, cotangent = rng.normal(size=(2, 1, *images.shape[-3:])).astype(np.float32)
    t = np.full(1, task.grid[len(task.grid) // 2], np.int32)
    given = x, t, jax.tree.map(lambda column: column[:1], cond)
    outputs = {i: [use.outputs for use in tags.uses[i]] for i in sorted(tags.by_hand)}
    outputs = jax.tree.map(
        lambda use: jax.ShapeDtypeStruct(use.shape, use.dtype), outputs
    )
    made = _tagged_gradients(task, outputs, params, frozen, given, cotangent)
    for i, (told, true) in jax.device_get(made).items():
        apart, size = np.linalg.norm(told - true), np.linalg.norm(true)
        if apart > MISMATCH * size:  # What is not finite tells nothing.
            raise ValueError(
                f"{list(named_leaves(params))[i]} is tagged by `dtrak_jax.layer`, but its "
                f"gradient is not the one that the tag says: they differ by "
                f"{apart / max(size, 1e-30):.0%}. Tag what the weight makes of exactly "
                "these inputs, before anything else is done with it, with its padding, "
                "strides and dilation."
            )


def _tagged_gradients(task: Task, outputs, params, frozen, inputs, cotangent) -> dict:
    """Returns {weight: its gradient as its tag says, and the true one} of those whose uses
    have outputs of these shapes."""

    @jax.jit
    def gradients(params, frozen, inputs, cotangent):
        how = task, params, frozen, inputs, outputs
        _, pull_back, patches = vjp_of_layers(*how, chosen_leaves(task, params))
        true, deltas = pull_back(cotangent)

        def told(i):
            flat = (delta.reshape(-1, delta.shape[-1]) for delta in deltas[i])
            pairs = zip(patches[i], flat, strict=True)
            return sum(jnp.einsum("pi,po->io", *p, precision="highest") for p in pairs)

        return {i: (told(i).reshape(true[i].shape), true[i]) for i in outputs}

    return gradients(params, frozen, inputs, cotangent)


def vjp_of_layers(task: Task, params, frozen, inputs, outputs, leaves) -> tuple:
    """Differentiates the prediction by some of the chosen leaves, which are named by their
    indices, and by the outputs of tagged layers, of shapes {weight: one of each use}.

    Returns the prediction; the function that makes of its cotangent {leaf: gradient} and
    {weight: the gradient of each output}; and {weight: the patches of each use}.
    """
    values = variables(task, params, {})
    chosen = dict(zip(chosen_leaves(task, params), values, strict=True))
    taps = jax.tree.map(lambda use: jnp.zeros(use.shape, use.dtype), outputs)

    def predict(differentiated, taps):
        tags = Tags({}, {}, {i: list(arrays) for i, arrays in taps.items()})
        values = (chosen | differentiated).values()
        prediction = predict_with(task, params, frozen, tags, inputs, values)
        return prediction, {i: [use.patches() for use in tags.uses[i]] for i in taps}

    differentiated = {i: chosen[i] for i in leaves}
    return jax.vjp(predict, differentiated, taps, has_aux=True)


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
    keys = jax.vmap(task.cotangent_key, (0, None))(item.pair, item.words)
    gradients = {}
    for name, measure in task.measurements.items():
        value = functools.partial(value_of, measure, schedule=task.schedule)
        cotangents = jax.vmap(jax.grad(value))(prediction, target, t, keys)
        (pulled,) = pull_back(weight * cotangents)
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
