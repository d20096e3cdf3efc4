"""Gradients sketched layer by layer, so that those of weights are never formed.

The gradient G [window, C_in, C_out] of a layer's weight becomes P_in^T G P_out, which
takes one pass back to the activations and no pass to the weights (LoGra, Choe et al.
2024, arXiv 2405.13954, section 3.2). All other parameters keep their exact gradients.
The result, the short gradient, is then sketched to k dimensions like any gradient.

P_in and P_out add up channels with random signs, E[P P^T] = I, so inner products are
right in expectation. A layer's two sketches err by about 1/sqrt(k_in) + 1/sqrt(k_out),
where one projection to that length would by 1/sqrt(k_in k_out). So the sketches of the
weights are together `TIMES` as long as the features; with few channels they lose nothing.
"""

import bisect
import math

import numpy as np

from dtrak_jax.digests import named_leaves
from dtrak_jax.features.gradients import Sketches, tagged_layers
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.task import Task
from dtrak_jax.models.tags import ChannelSketch, Size
from dtrak_jax.network import Params
from dtrak_jax.rng import bernoulli, stream

TIMES = 8
"""The sketches of all weights are at most so many times as long as the features."""


def channel_sketches(
    task: Task,
    params: Params,
    frozen: Params | None,
    projection: Projection,
    inputs: tuple,
) -> Sketches:
    """Returns P_in and P_out of every layer; none for other kinds of projection.

    Shapes will do for parameters; the inputs are the shapes of (x, t, cond).
    """
    if projection.kind != "factorized":
        return {}
    sizes = tagged_layers(task, params, frozen, inputs).sizes
    if not sizes:
        raise ValueError(
            "projection 'factorized' found no layer among the parameters chosen. It "
            "knows the Dense, DenseGeneral and Conv of flax.linen, and what the network "
            "tags by `dtrak_jax.layer`; outside of jax.jit, scan and checkpoint. Tag "
            "the layers, or take projection 'sketch'."
        )
    channels = channels_of(sizes, TIMES * projection.dim)
    paths = list(named_leaves(params))

    def sketch(index: int, side: str, c: int, k: int) -> ChannelSketch:
        key = stream(projection.seed, f"{paths[index]} {side}")
        signs = 2 * bernoulli(key, 0.5, (c,)).astype(np.float32) - 1
        return ChannelSketch(np.asarray(signs), k)

    return {
        i: (sketch(i, "in", c_in, k_in), sketch(i, "out", c_out, k_out))
        for i, (k_in, k_out) in channels.items()
        for _, c_in, c_out in [sizes[i]]
    }


def channels_of(sizes: dict[int, Size], length: int) -> dict[int, tuple[int, int]]:
    """Returns (k_in, k_out) of every layer, such that the sketches fit in `length`.

    All layers get as many entries as the others, or all that they have: small weights
    may matter much. In a UNet of digits the last has a third of the squared gradient.
    """

    def fitting(entries: int) -> dict[int, tuple[int, int]]:
        return {i: _split(size, entries) for i, size in sizes.items()}

    def total(channels: dict[int, tuple[int, int]]) -> int:
        return sum(sizes[i][0] * k_in * k_out for i, (k_in, k_out) in channels.items())

    most = max(map(math.prod, sizes.values()))
    entries = range(most + 1)
    above = bisect.bisect_right(entries, length, key=lambda e: total(fitting(e)))
    return fitting(above - 1)


def _split(size: Size, entries: int) -> tuple[int, int]:
    """Returns the most channels, min(c, C_in) and min(c, C_out), in so few entries."""
    window, c_in, c_out = size
    cuts = range(1, max(c_in, c_out) + 1)
    c = bisect.bisect_right(
        cuts, entries, key=lambda c: window * min(c, c_in) * min(c, c_out)
    )
    return min(max(c, 1), c_in), min(max(c, 1), c_out)
