"""Gradients sketched layer by layer, so that those of kernels are never formed.

The gradient G [window, C_in, C_out] of a layer's kernel becomes P_in^T G P_out, which
takes one pass back to the activations and no pass to the kernels (LoGra, Choe et al.
2024, arXiv 2405.13954, section 3.2). All other parameters keep their exact gradients.
What comes out, the short gradient, is then sketched to k dimensions like any gradient.

P_in and P_out fold the channels with random signs, E[P P^T] = I, so inner products are
right in expectation. A layer's two folds err by about 1/sqrt(k_in) + 1/sqrt(k_out), and
not by 1/sqrt(k_in k_out) as one projection to that length would. So the sketches of the
kernels are together `TIMES` as long as the features; where channels are few, or k is
large, they lose nothing.
"""

import bisect
import functools
import math

import jax
import numpy as np

from dtrak_jax.features.gradients import Folds, chosen_leaves
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.task import Task
from dtrak_jax.layers import Fold, Size, Watch, watching
from dtrak_jax.models.linen import marking_layers
from dtrak_jax.streams import stream
from dtrak_jax.trees import named_leaves

TIMES = 8
"""How much longer than the features the sketches of all kernels are, at most."""


def channel_folds(task: Task, params, projection: Projection, inputs: tuple) -> Folds:
    """P_in and P_out of every layer; none for other kinds of projection.

    Args:
      task: whose parameters are differentiated.
      params: the network's parameters.
      projection: its seed and dimensions.
      inputs: shapes of (x, t, cond).

    Raises:
      ValueError: no layer is known whose kernel is differentiated.
    """
    if projection.kind != "factorized":
        return {}
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    sizes = _layer_sizes(task, treedef, shapes, inputs)
    if not sizes:
        raise ValueError(
            "projection 'factorized' found no layer among the parameters chosen. It "
            "knows the Dense, DenseGeneral and Conv of flax.linen, and what the network "
            "marks by `dtrak_jax.layer`; outside of jax.jit, scan and checkpoint. Mark "
            "the layers, or take projection 'sketch'."
        )
    channels = _channels(sizes, TIMES * projection.dim)
    paths = list(named_leaves(params))

    def fold(index: int, side: str, c: int, k: int) -> Fold:
        key = stream(projection.seed, f"{paths[index]} {side}")
        return Fold(np.asarray(jax.random.rademacher(key, (c,), np.float32)), k)

    return {
        i: (fold(i, "in", c_in, k_in), fold(i, "out", c_out, k_out))
        for i, (k_in, k_out) in channels.items()
        for _, c_in, c_out in [sizes[i]]
    }


@functools.cache
def _layer_sizes(task: Task, treedef, leaves: tuple, inputs: tuple) -> dict[int, Size]:
    """{leaf: size} of the layers that the network has.

    Raises:
      ValueError: the network also uses a layer's kernel where nothing marks it; that
        part of its gradient would be lost.
    """
    params = treedef.unflatten(leaves)
    chosen = chosen_leaves(task, params)
    watch = Watch({}, {})

    def predict(leaves, x, t, cond):
        watch.kernels.update({id(leaves[i]): i for i in chosen})
        with watching(watch), marking_layers():
            return task.apply(treedef.unflatten(leaves), x, t, cond)

    program = jax.make_jaxpr(predict)(list(leaves), *inputs).jaxpr
    for i in sorted(watch.found):
        leaf = program.invars[i]
        uses = sum(leaf is used for e in program.eqns for used in e.invars)
        if uses != watch.marks[i]:
            raise ValueError(
                f"projection 'factorized' finds {list(named_leaves(params))[i]} marked "
                f"as the kernel of {watch.marks[i]} layers; the network uses it "
                f"{uses} times. Mark every use, or take projection 'sketch'."
            )
    return dict(sorted(watch.found.items()))


def _channels(sizes: dict[int, Size], length: int) -> dict[int, tuple[int, int]]:
    """(k_in, k_out) of every layer, such that the sketches have that length or less.

    All layers get the same number of entries, as far as they have so many: then small
    kernels, which may weigh much (that of the last layer has a third of the squared
    gradient in a UNet of digits), lose nothing.
    """

    def fitting(entries: int) -> dict[int, tuple[int, int]]:
        return {i: _split(size, entries) for i, size in sizes.items()}

    def total(channels: dict[int, tuple[int, int]]) -> int:
        return sum(sizes[i][0] * k_in * k_out for i, (k_in, k_out) in channels.items())

    most = max(map(math.prod, sizes.values()))
    above = bisect.bisect_right(
        range(most + 1), length, key=lambda e: total(fitting(e))
    )
    return fitting(above - 1)


def _split(size: Size, entries: int) -> tuple[int, int]:
    """The most channels, min(c, C_in) and min(c, C_out), that make so few entries."""
    window, c_in, c_out = size
    cut = range(1, max(c_in, c_out) + 1)
    c = bisect.bisect_right(
        cut, entries, key=lambda c: window * min(c, c_in) * min(c, c_out)
    )
    return min(max(c, 1), c_in), min(max(c, 1), c_out)
