"""Per-example gradients of several measurements from one forward pass."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.config import DENSE
from dtrak_jax.features.convolutions import kernel_gradients_as_products
from dtrak_jax.features.projection import Projection, project_each
from dtrak_jax.features.task import Task
from dtrak_jax.layers import Fold, Sketch, Watch, watching
from dtrak_jax.models.linen import marking_layers
from dtrak_jax.parallel import P, over_mesh
from dtrak_jax.trees import named_leaves

Folds = dict[int, tuple[Fold, Fold]]
"""{leaf: (P_in, P_out)} of the kernels whose gradient G [window, C_in, C_out] is not
wanted, but P_in^T G P_out; see `factorized`."""


EXAMPLES = P(("data", "proj"))
"""Slots are spread over both axes, so that no gradient is computed twice."""


class Slots(NamedTuple):
    """The gradients to compute together, one a slot; S slots of R noised images.

    A slot's gradient is sum_r weight_r grad f(noised image r): one pair of weight 1
    where timesteps are kept apart, a share of all pairs where they are averaged.
    """

    x: np.ndarray
    """Images [S, 1, H, W, C], the same for all pairs, or [S, R, H, W, C]."""
    words: np.ndarray
    """Their ids, uint32 [S, 2]."""
    position: np.ndarray
    """Their positions in the data set, int32 [S]."""
    pair: np.ndarray | None
    """Indices into `Task.pairs`, int32 [S, R]."""
    weight: np.ndarray | None
    """float32 [S, R]."""
    cond: np.ndarray | None
    """What the images are conditioned on [S, ...]."""


def network_inputs(
    images: np.ndarray, cond: np.ndarray | None, count: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None]:
    """The shapes of (x, t, cond) for a batch of `count` of these images."""
    x = jax.ShapeDtypeStruct((count, *images.shape[-3:]), np.float32)
    t = jax.ShapeDtypeStruct((count,), np.int32)
    if cond is None:
        return x, t, None
    return x, t, jax.ShapeDtypeStruct((count, *cond.shape[1:]), cond.dtype)


def chosen_leaves(task: Task, params) -> list[int]:
    """Which leaves are differentiated: floating point, and found by the pattern.

    Raises:
      ValueError: the pattern finds none; lists some paths that there are.
    """
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


@functools.cache
def gradient_function(task: Task, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (params, Folds, Slots) -> gradients and losses.

    Slots are spread over the mesh.

    Returns:
      A function whose results are {measurement: gradient} and the mean squared error of
      every noised image [S, R]. A gradient is a list of parts float32 [S, p_i], one for
      each parameter, since joining them to [S, p] would take a copy of all.
    """

    def per_device(params, folds, slots):
        one_slot = functools.partial(_slot_gradients, task, params, folds)
        return jax.vmap(one_slot)(slots)

    return over_mesh(per_device, mesh, (P(), P(), EXAMPLES), EXAMPLES)


@functools.cache
def addition_function(mesh: jax.sharding.Mesh) -> Callable:
    """Compiles the sum of two parts of a gradient, each on the device that has it."""

    def per_device(total, more):
        return jax.tree.map(jnp.add, total, more)

    return over_mesh(per_device, mesh, (EXAMPLES, EXAMPLES), EXAMPLES)


@functools.cache
def projection_function(projection: Projection, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles {measurement: gradient} -> ({measurement: features}, squared norms).

    Features are [S, k], the squared norms of the gradients [S]. The columns of a dense
    projection are shared by the devices of "proj". All others take as long as adding up
    the gradient, less than sending it to another device, and stay on the device that
    has it.

    A program of its own: in one with the gradients XLA would not write those down
    before adding them up, and read the layers' products in the wrong order.
    """
    shared = projection.kind in DENSE and mesh.shape["proj"] > 1

    def squared_norms(parts):
        return sum(jnp.sum(part**2, axis=1) for part in parts)

    def per_device(gradients):
        axis = "proj" if shared else None
        projected = project_each(projection, list(gradients.values()), axis)
        features = dict(zip(gradients, projected, strict=True))
        return features, {name: squared_norms(g) for name, g in gradients.items()}

    features = P("data", "proj") if shared else EXAMPLES
    return over_mesh(per_device, mesh, (EXAMPLES,), (features, EXAMPLES))


def _slot_gradients(
    task: Task, params, folds: Folds, slot: Slots
) -> tuple[dict, jax.Array]:
    """{measurement: parts [p_i]} and errors [R] of one slot (no leading axis)."""
    copies = slot.pair.shape[0]
    shape = slot.x.shape[1:]
    x = jnp.broadcast_to(slot.x, (copies, *shape))
    cond = slot.cond
    if cond is not None:
        cond = jnp.broadcast_to(cond, (copies, *cond.shape))
    t = jnp.asarray(task.pairs, jnp.int32)[slot.pair, 0]
    eps = jax.vmap(lambda pair: task.eps(pair, slot.words, slot.position, shape))(
        slot.pair
    )
    x_t = task.schedule.add_noise(x, eps, t)
    target = task.schedule.target(x, eps, t)

    leaves, treedef = jax.tree.flatten(params)
    chosen = chosen_leaves(task, params)
    kernels = {id(leaves[i]): i for i in folds}

    def variable(i):
        if i not in folds:
            return leaves[i]
        fold_in, fold_out = folds[i]
        window = leaves[i].size // (len(fold_in.signs) * len(fold_out.signs))
        return jnp.zeros((window, fold_in.width, fold_out.width))

    def predict(differentiated):
        replaced = dict(zip(chosen, differentiated, strict=True))
        sketches = {i: Sketch(replaced.pop(i), *folds[i]) for i in folds}
        all_leaves = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
        with watching(Watch(kernels, sketches)), marking_layers():
            return task.apply(treedef.unflatten(all_leaves), x_t, t, cond)

    prediction, pull_back = jax.vjp(predict, [variable(i) for i in chosen])
    if copies == 1:
        # A sum over many noised images is fastest as the convolution that it is.
        pull_back = kernel_gradients_as_products(pull_back)
    weight = slot.weight.reshape((copies,) + (1,) * (prediction.ndim - 1))
    gradients = {}
    for name, measure in task.measurements.items():
        per_image = jax.vmap(
            jax.grad(lambda p, y, s, f=measure: f(p, y, s, task.schedule))
        )(prediction, target, t)
        (pulled,) = pull_back(weight * per_image)
        gradients[name] = [leaf.reshape(-1).astype(jnp.float32) for leaf in pulled]
    error = jnp.mean((prediction - target) ** 2, axis=tuple(range(1, prediction.ndim)))
    return gradients, error
