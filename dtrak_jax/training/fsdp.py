"""Fully sharded data parallelism: every device keeps a part of each large array.

ZeRO stage 3 (Rajbhandari et al. 2019, arXiv 1910.02054). Parameters, their averages and
the optimiser's moments are spread over the "data" axis. A step gathers the whole
parameters, adds the gradients up straight into parts, and updates the parts.

`specs` below are a tree of PartitionSpecs like the parameters, or one for all of them;
all but `shard_specs` run under `shard_map`.
"""

import jax
import jax.numpy as jnp

from dtrak_jax.parallel import WHOLE, P


def shard_specs(tree, devices: int):
    """How the leaves of `tree` are spread over the "data" axis of so many devices.

    Each along the largest dimension that `devices` divides. One without such a
    dimension stays whole, as vectors (biases, scales) do: they are not worth a
    message.
    """

    def spec(leaf) -> P:
        fitting = [i for i, size in enumerate(leaf.shape) if size % devices == 0]
        if leaf.ndim < 2 or not fitting:
            return WHOLE
        axis = max(fitting, key=lambda i: leaf.shape[i])
        return P(*[None] * axis, "data")

    return jax.tree.map(spec, tree)


def gather(parts, specs):
    """The whole arrays, on every device."""

    def whole(part, spec):
        if not spec:
            return part
        return jax.lax.all_gather(part, "data", axis=len(spec) - 1, tiled=True)

    return jax.tree.map(whole, parts, jax.tree.broadcast(specs, parts))


def scatter_sum(arrays, specs):
    """Whole arrays, added up over the devices; of the sum each device gets its part."""

    def part(array, spec):
        if not spec:
            return jax.lax.psum(array, "data")
        return jax.lax.psum_scatter(
            array, "data", scatter_dimension=len(spec) - 1, tiled=True
        )

    return jax.tree.map(part, arrays, jax.tree.broadcast(specs, arrays))


def global_norm(parts, specs) -> jax.Array:
    """The Euclidean norm of all entries of the whole arrays."""
    squares = jax.tree.map(lambda part: jnp.sum(jnp.square(part)), parts)
    specs = jax.tree.leaves(jax.tree.broadcast(specs, parts))
    pairs = list(zip(jax.tree.leaves(squares), specs, strict=True))
    split = sum(square for square, spec in pairs if spec)
    whole = sum(square for square, spec in pairs if not spec)
    return jnp.sqrt(jax.lax.psum(split, "data") + whole)
