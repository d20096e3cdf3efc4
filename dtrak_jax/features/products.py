"""Products of the Gauss-Newton matrix of a batch of images with vectors.

G = mean of J^T (2/D) J over the noised images of the batch, J the derivative by the
parameters of the prediction of D entries: the matrix that `curvature` approximates.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax.features.convolutions import groups_for_vmap
from dtrak_jax.features.gradients import (
    EXAMPLES,
    addition_function,
    microbatch_of,
    noised,
    predict_with,
    variables,
)
from dtrak_jax.features.microbatches import Layout, microbatches
from dtrak_jax.features.store import chunks_of
from dtrak_jax.features.task import Task
from dtrak_jax.models.tags import Tags
from dtrak_jax.parallel import P, Program, sharded


def product_program(
    task: Task,
    network: tuple,
    images,
    cond: object,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    most: int,
) -> tuple[Layout, Program]:
    """Returns the program of `products_function`, and the layout of its microbatches.

    Each device has at most `most` vectors at a time, and the square root of the batch size
    if that is less: so many times the noised images of a microbatch are at most
    `batch_size`, and what a device keeps of the network is no more than of as many images.
    Shapes will do for (params, frozen), images and conditions.
    """
    network = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), network)
    sizes = [leaf.size for leaf in variables(task, network[0], {})]
    vectors = min(math.isqrt(batch_size), most)
    layout = Layout(len(task.pairs), True, batch_size // vectors, 1, sum(sizes))
    shape = (vectors * mesh.size,)
    parts = [jax.ShapeDtypeStruct((*shape, size), jnp.float32) for size in sizes]
    arguments = *network, parts, microbatch_of(images, cond, layout.size)
    return layout, Program(products_function(task, mesh), arguments, mesh)


@functools.cache
def products_function(task: Task, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles (params, frozen, vectors, Microbatch) -> sum of weight J^T (2/D) J v.

    Vectors are parts [S, p_i], as are the results. Devices share out the vectors, and all
    have the same microbatch, with one copy of each image.

    The network is linearized once for all vectors. Only what depends on these is batched,
    so that a convolution stays an ordinary one, of more images or of more channels.
    """

    def products(params, frozen, vectors, microbatch):
        inputs, _ = jax.vmap(functools.partial(noised, task))(microbatch)
        inputs = jax.tree.map(lambda column: column[:, 0], inputs)
        leaves = variables(task, params, {})

        def predict(leaves):
            return predict_with(task, params, frozen, Tags({}, {}), inputs, leaves)

        _, push = jax.linearize(predict, leaves)
        prediction, pull_back = jax.vjp(predict, leaves)
        pull_back = groups_for_vmap(pull_back)
        weight = 2 / prediction[0].size * microbatch.weight
        weight = weight.reshape((-1,) + (1,) * (prediction.ndim - 1))

        def product(parts):
            pairs = zip(parts, leaves, strict=True)
            tangents = [v.reshape(leaf.shape).astype(leaf.dtype) for v, leaf in pairs]
            (pulled,) = pull_back(weight * push(tangents))
            return [leaf.reshape(-1).astype(jnp.float32) for leaf in pulled]

        return jax.vmap(product)(vectors)

    return sharded(products, mesh, (P(), P(), EXAMPLES, P()), EXAMPLES)


def batch_of(
    count: int, n: int, pairs: int, pair: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images [count] and the pairs [count, 1] of so many noised images, out of
    those of n images at all pairs, or at one; 0 stands for all.

    They are spread over all images as evenly as can be, and in turn over the pairs.
    """
    most = n if pair is not None else n * pairs
    count = min(count or most, most)
    number = np.arange(count)
    of_pair = number % pairs if pair is None else np.full(count, pair)
    return number * n // count, of_pair[:, None]


def mean_products(
    layout: Layout,
    program: Program,
    network: tuple,
    vectors: list,
    examples: tuple,
    batch: tuple[np.ndarray, np.ndarray],
    advance: Callable[[int], object],
) -> list[jax.Array]:
    """Returns G v, parts [S, p_i], G of a batch of these examples, see `batch_of`.

    `advance` is told the number of noised images that are done.
    """
    add, total = addition_function(program.mesh), None
    for cut in chunks_of(len(batch[0]), layout.size):
        rows, pairs = (column[cut] for column in batch)
        chosen = jax.tree.map(lambda column, r=rows: column[r], examples)
        ((microbatch,),) = microbatches(layout, chosen, pairs)
        # What fills up the last microbatch counts as nothing.
        real = np.arange(layout.size)[:, None] < len(rows)
        weight = real.astype(np.float32) / len(batch[0])
        part = program.function(*network, vectors, microbatch._replace(weight=weight))
        # Two microbatches under way keep the devices busy; more would take memory.
        jax.block_until_ready(total)
        total = part if total is None else add(total, part)
        advance(len(rows))
    return total
