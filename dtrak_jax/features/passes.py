"""The passes that EK-FAC takes over cotangents of the network's output, see `curvature`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.features.convolutions import weight_gradients_as_products
from dtrak_jax.features.gradients import (
    EXAMPLES,
    chosen_leaves,
    microbatch_of,
    network_inputs,
    noised,
    tagged_layers,
    variables,
    vjp_of_layers,
)
from dtrak_jax.features.measurements import random_cotangent
from dtrak_jax.features.microbatches import Layout, Microbatch
from dtrak_jax.features.task import Task
from dtrak_jax.network import Params
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.rng import fold_in

HIGHEST = jax.lax.Precision.HIGHEST


class Draws(NamedTuple):
    """The cotangents that the passes take: what their programs are made for."""

    task: Task
    outputs: tuple[tuple[int, tuple[jax.ShapeDtypeStruct, ...]], ...]
    """The shapes of the outputs of each use of each tagged weight, by its index."""
    cotangents: int  # for each noised image
    exact: bool  # whether they are the unit vectors of the prediction's entries

    @classmethod
    def of(
        cls, task: Task, network: tuple, images, cond: object, cotangents: int
    ) -> "Draws":
        """Returns the draws of a network (params, frozen); shapes will do."""
        task = dataclasses.replace(task, measurement="loss", per_timestep=True)
        uses = tagged_layers(task, *network, network_inputs(images, cond, 1)).uses
        outputs = {
            i: tuple(
                jax.ShapeDtypeStruct(u.outputs.shape, u.outputs.dtype) for u in used
            )
            for i, used in sorted(uses.items())
        }
        count = cotangents or math.prod(images.shape[-3:])
        return cls(task, tuple(outputs.items()), count, not cotangents)

    @property
    def pairs(self) -> int:
        """The cotangents of an image."""
        return len(self.task.pairs) * self.cotangents

    def sides(self, params: Params) -> dict[int, tuple[int, int]]:
        """Returns the numbers of rows of A and of B of each tagged weight."""
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        channels = {i: uses[0].shape[-1] for i, uses in self.outputs}
        return {i: (sizes[i] // c_out, c_out) for i, c_out in channels.items()}

    def entries(self, params: Params) -> int:
        """Returns the numbers of all eigenvectors and eigenvalues."""
        squares = (side**2 for sides in self.sides(params).values() for side in sides)
        leaves = variables(self.task, params, {})
        return sum(squares) + sum(leaf.size for leaf in leaves)

    def positions(self, leaf: int) -> int:
        """Returns the positions of one noised image that use a weight."""
        return sum(math.prod(use.shape[:-1]) for use in dict(self.outputs)[leaf])


class Passes(NamedTuple):
    """The two programs, of `layout.size` cotangents each."""

    layout: Layout
    factors: Program
    """(params, frozen, Microbatch) -> {leaf: (sum of a a^T, sum of b b^T)}, each with a
    leading axis of devices."""
    eigenvalues: Program
    """(params, frozen, {leaf: eigenvectors of A and of B}, Microbatch) -> the sum of
    (q^T G r)^2 of every leaf, or of squares of its gradient, with that axis."""


def pass_programs(
    draws: Draws,
    network: tuple,
    images,
    cond: object,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> Passes:
    """Returns what `ekfac` runs on an `example_mesh`; shapes will do for all arrays."""
    shape = jax.ShapeDtypeStruct
    params, frozen = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), network)
    size = batch_size * mesh.size
    length = sum(leaf.size for leaf in variables(draws.task, params, {}))
    layout = Layout(draws.pairs, True, size, 1, length)
    microbatch = microbatch_of(images, cond, size)
    bases = {
        i: tuple(shape((side, side), np.float32) for side in sides)
        for i, sides in draws.sides(params).items()
    }
    first, second = factors_function(draws, mesh), eigenvalues_function(draws, mesh)
    return Passes(
        layout,
        Program(first, (params, frozen, microbatch), mesh),
        Program(second, (params, frozen, bases, microbatch), mesh),
    )


@functools.cache
def factors_function(draws: Draws, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles the first pass, see `Passes`."""

    def factors(params, frozen, microbatch):
        draw = functools.partial(_draw, draws, params, frozen)
        layers, _ = jax.vmap(draw)(microbatch)

        def products(side: list) -> jax.Array:
            weight = microbatch.weight[:, :1, None]
            how = {"precision": HIGHEST}
            total = sum(jnp.einsum("smi,smj->ij", weight * c, c, **how) for c in side)
            return total[None]

        return {i: tuple(map(products, zip(*uses))) for i, uses in layers.items()}

    return sharded(factors, mesh, (P(), P(), EXAMPLES), EXAMPLES)


@functools.cache
def eigenvalues_function(draws: Draws, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles the second pass, see `Passes`."""

    def eigenvalues(params, frozen, bases, microbatch):
        draw = functools.partial(_draw, draws, params, frozen)
        layers, gradients = jax.vmap(draw)(microbatch)
        product = functools.partial(jnp.einsum, precision=HIGHEST)
        for i, uses in layers.items():
            whole = sum(product("smi,smo->sio", a, b) for a, b in uses)
            gradients[i] = product("ia,sio,ob->sab", bases[i][0], whole, bases[i][1])
        weight = microbatch.weight[:, 0]
        return {
            i: jnp.tensordot(weight, g**2, 1, precision=HIGHEST)[None]
            for i, g in gradients.items()
        }

    in_specs = (P(), P(), P(), EXAMPLES)
    return sharded(eigenvalues, mesh, in_specs, EXAMPLES)


def _draw(draws: Draws, params, frozen, item: Microbatch) -> tuple[dict, dict]:
    """Returns {weight: [(a, b) of each use]} and {other leaf: gradient} of one cotangent.

    They are [positions, channels] and [size].
    """
    task, (pair,) = draws.task, item.pair // draws.cotangents
    number = item.pair[0] % draws.cotangents
    inputs, _ = noised(task, item._replace(pair=pair[None]))
    outputs = dict(draws.outputs)
    others = [i for i in chosen_leaves(task, params) if i not in outputs]
    how = task, params, frozen, inputs, outputs, others
    prediction, pull_back, patches = vjp_of_layers(*how)
    c = cotangent(task, pair, item.words, number, prediction, draws.exact)
    # A gradient of a layer that is not tagged may be a convolution.
    pull_back = weight_gradients_as_products(pull_back)
    gradients, deltas = pull_back(c)

    def flat(delta: jax.Array) -> jax.Array:
        return delta.reshape(-1, delta.shape[-1]).astype(jnp.float32)

    layers = {i: list(zip(patches[i], map(flat, deltas[i]))) for i in outputs}
    return layers, {i: g.reshape(-1).astype(jnp.float32) for i, g in gradients.items()}


def cotangent(
    task: Task,
    pair: jax.Array,
    words: jax.Array,
    number: jax.Array,
    prediction: jax.Array,
    exact: bool,
) -> jax.Array:
    """Returns cotangent c of a prediction of D entries, such that E c c^T = (2/D) I.

    It is eta sqrt(2/D), eta ~ N(0, I) by the task's seed, the pair, the image's words and
    the number; or, exactly, sqrt(2) times the unit vector of the number.
    """
    if exact:
        c = math.sqrt(2) * jax.nn.one_hot(number, prediction.size)
        return c.reshape(prediction.shape)
    key = fold_in(task.cotangent_key(pair, words), number)
    return random_cotangent(key, prediction)
