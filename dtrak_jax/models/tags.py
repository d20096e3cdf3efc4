"""Tags that tell which operations of a network are layers, and with which weight.

The gradient of a layer's weight is G = sum_positions a delta^T: a is the layer's input
(of a convolution a patch of it), and delta the gradient with respect to its output.
With a and delta on fewer channels the same sum gives P_in^T G P_out, and G is never
formed: `features.factorized`. A network tags its layers by `layer`; those of flax.linen
are tagged by `collecting`, and the network stays as it is.
"""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding
from jax import lax

Size = tuple[int, int, int]
"""The size of a weight: entries of its window (1 for a matrix product), C_in, C_out."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelSketch:
    """A linear map of C channels to k: channel c, times a sign, is added to c mod k.

    With random signs E[P P^T] = I; with k = C inner products are exact.
    """

    signs: jax.Array  # [C]
    width: int = dataclasses.field(metadata={"static": True})  # k

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., C] to [..., k], float32."""
        channels, k = len(self.signs), self.width
        x = x.astype(jnp.float32) * self.signs.reshape((1,) * (x.ndim - 1) + (-1,))
        rows = -(-channels // k)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows * k - channels)])
        return x.reshape(*x.shape[:-1], rows, k).sum(axis=-2)


class WeightSketch(NamedTuple):
    """The sketch P_in^T G P_out of one weight's gradient that is to be made.

    It is the gradient with respect to `into`, zeros [window, k_in, k_out].
    """

    into: jax.Array
    inputs: ChannelSketch
    outputs: ChannelSketch


@dataclasses.dataclass(frozen=True)
class Tags:
    """The weights that `layer` looks for, and those that it has met, by index."""

    weights: dict[int, int]  # {id of an array: index of the weight}
    sketches: dict[int, WeightSketch]  # those whose gradient is to be sketched
    taps: dict[int, list[jax.Array]] = dataclasses.field(default_factory=dict)
    """Arrays that are added to the outputs of each use of a weight: the gradient with
    respect to zeros is delta."""
    sizes: dict[int, Size] = dataclasses.field(default_factory=dict)
    uses: dict[int, list["Use"]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    by_hand: set[int] = dataclasses.field(default_factory=set)
    """The weights that the network tagged itself, which may be wrong."""


_current = contextvars.ContextVar("tags", default=None)


@contextlib.contextmanager
def collecting(tags: Tags) -> Iterator[None]:
    """Makes `layer` look for the weights of `tags`, and tags the layers of flax.linen.

    These are Dense, DenseGeneral and Conv. Layers that compute something else with their
    weight are not tagged: those with groups, a mask, batched weights, padding other than
    by zeros, or a product of the user's; nor are subclasses, which may do anything.
    """
    token = _current.set(tags)
    try:
        with nn.intercept_methods(_tag_flax_layer):
            yield
    finally:
        _current.reset(token)


def layer(
    weight: jax.Array,
    inputs: jax.Array,
    outputs: jax.Array,
    *,
    padding: str | int | Sequence[int | tuple[int, int]] | None = None,
    strides: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    input_dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """Tags `outputs` as those of a layer, `inputs` times `weight`, and returns them.

        y = dtrak.layer(w, x, x @ w)
        y = dtrak.layer(w, x, convolve(x, w), padding="SAME")

    `Projection("factorized")` needs the tags of a network that is not made of flax
    layers; they change nothing otherwise. The network must go on with what is returned,
    and tag each use of the weight. Inside `jax.jit`, `jax.checkpoint` or `lax.scan` a
    weight is not recognised, and its gradient is formed as usual.

    Args:
      weight: [d_in, d_out], or [*window, C_in, C_out] of a convolution without groups;
        a leaf of the parameters as it came, not cast, reshaped or sliced.
      inputs: [..., d_in], or [..., *space, C_in].
      outputs: [..., d_out], or [..., *space', C_out]; with or without a bias.
      padding: None for a matrix product; for a convolution "SAME", "VALID", or an
        integer or a pair for each axis.
      strides, dilation: of the window; for each axis, or the same for all.
      input_dilation: of the inputs.

    Raises:
      ValueError: the shapes do not belong together; or, from what takes the tags, the
        outputs are no product of these inputs and the weight.
    """
    if tags := _current.get():
        tags.by_hand.update({tags.weights.get(id(weight))} - {None})
    windows = padding, strides, dilation, input_dilation
    return _tagged(weight, inputs, outputs, *windows)


def _tagged(
    weight,
    inputs,
    outputs,
    padding=None,
    strides=1,
    dilation=1,
    input_dilation=1,
) -> jax.Array:
    """Returns the outputs of a layer, tagged; see `layer`."""
    tags = _current.get()
    index = tags.weights.get(id(weight)) if tags else None
    if index is None:
        return outputs
    window = () if padding is None else weight.shape[:-2]
    lead = inputs.ndim - 1 - len(window)
    space = inputs.shape[lead:-1]
    windows = _Windows.of(window, space, padding, strides, dilation, input_dilation)
    size = math.prod(window), inputs.shape[-1], outputs.shape[-1]
    positions = *inputs.shape[:lead], *windows.space
    if math.prod(size) != weight.size or outputs.shape[:-1] != positions:
        raise ValueError(
            f"the layer with a weight of shape {weight.shape} is tagged to make outputs "
            f"{outputs.shape} of inputs {inputs.shape} with padding={padding!r}, "
            f"strides={strides!r}, dilation={dilation!r}, "
            f"input_dilation={input_dilation!r}; these do not belong together."
        )
    tags.sizes[index] = size
    flat = inputs.reshape(-1, *inputs.shape[lead:])
    tags.uses[index].append(Use(windows, flat, outputs))
    if index in tags.taps:
        return outputs + tags.taps[index][len(tags.uses[index]) - 1]
    if index not in tags.sketches:
        return outputs
    sketch = tags.sketches[index]
    small = sketch.inputs(lax.stop_gradient(inputs))
    small = small.reshape(-1, *small.shape[lead:])
    return _sketched(windows, outputs, small, sketch.outputs, sketch.into)


class _Windows(NamedTuple):
    """The places of a convolution's windows; all fields are () for a matrix product."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int, int], ...]  # (before, after, between) of `lax.pad`
    space: tuple[int, ...]  # the spatial shape of the outputs

    @classmethod
    def of(cls, window, space, padding, strides, dilation, input_dilation):
        """Returns the windows on inputs of a spatial shape; see `layer`."""

        def for_each_axis(value):
            return (value,) * len(window) if isinstance(value, int) else tuple(value)

        strides, dilation = for_each_axis(strides), for_each_axis(dilation)
        between = for_each_axis(input_dilation)
        spread = [(n - 1) * step + 1 for n, step in zip(space, between)]
        reach = [(n - 1) * step + 1 for n, step in zip(window, dilation)]
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(spread, reach, strides, padding)
        padding = for_each_axis(padding or 0)
        pairs = [(p, p) if isinstance(p, int) else p for p in padding]
        pads = tuple((*pair, step - 1) for pair, step in zip(pairs, between))
        room = [n + sum(pair) - w for n, pair, w in zip(spread, pairs, reach)]
        outputs = tuple(n // stride + 1 for n, stride in zip(room, strides))
        return cls(window, strides, dilation, pads, outputs)

    def patches(self, x: jax.Array) -> jax.Array:
        """Maps [B, *space, C] to [B * outputs, window, C]."""
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *self.pads, (0, 0, 0)])

        def entry(offset):
            start = [o * step for o, step in zip(offset, self.dilation)]
            spans = zip(start, self.space, self.strides)
            stop = [s + (n - 1) * stride + 1 for s, n, stride in spans]
            stop = x.shape[0], *stop, x.shape[-1]
            inputs = lax.slice(x, (0, *start, 0), stop, (1, *self.strides, 1))
            return inputs.reshape(-1, x.shape[-1])

        offsets = itertools.product(*map(range, self.window))
        return jnp.stack([entry(offset) for offset in offsets], axis=1)


class Use(NamedTuple):
    """A use of a weight: the inputs [B, *space, C_in] and the outputs [..., C_out]."""

    windows: _Windows
    inputs: jax.Array
    outputs: jax.Array

    def patches(self) -> jax.Array:
        """Returns a of every position of the outputs, float32 [positions, window C_in]."""
        patches = self.windows.patches(self.inputs.astype(jnp.float32))
        return patches.reshape(len(patches), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sketched(windows: _Windows, outputs, small, output_sketch, into):
    """Returns the outputs; the gradient with respect to `into` is the sketch of G."""
    return outputs


def _forward(windows, outputs, small, output_sketch, into):
    return outputs, (small, output_sketch)


def _backward(windows, saved, gradient):
    small, output_sketch = saved
    delta = output_sketch(gradient.reshape(-1, gradient.shape[-1]))
    sketch = jnp.einsum("nwi,no->wio", windows.patches(small), delta)
    return gradient, None, None, sketch


_sketched.defvjp(_forward, _backward)


def _tag_flax_layer(call, args, kwargs, context):
    outputs = call(*args, **kwargs)
    tag = FLAX_LAYERS.get(type(context.module))
    if tag is None or context.method_name != "__call__":
        return outputs
    weight = nn.meta.unbox(context.module.get_variable("params", "kernel"))
    inputs = args[0] if args else kwargs["inputs"]
    return tag(context.module, weight, inputs, outputs)


def _dense(module, weight, inputs, outputs):
    """Tags a Dense, and a DenseGeneral as a product of flattened axes."""
    axes = getattr(module, "axis", -1)
    axes = (axes,) if isinstance(axes, int) else axes
    first = inputs.ndim - len(axes)
    in_order = [axis % inputs.ndim for axis in axes] == list(range(first, inputs.ndim))
    batched = getattr(module, "batch_dims", ())
    if module.dot_general or module.dot_general_cls or batched or not in_order:
        return outputs
    flat = (array.reshape(*inputs.shape[:first], -1) for array in (inputs, outputs))
    return _tagged(weight, *flat).reshape(outputs.shape)


def _conv(module, weight, inputs, outputs):
    padding = canonicalize_padding(module.padding, weight.ndim - 2)
    zeros = not isinstance(padding, str) or padding in ("SAME", "VALID")
    grouped = module.feature_group_count != 1 or module.mask is not None
    product = module.conv_general_dilated or module.conv_general_dilated_cls
    if product or grouped or not zeros:
        return outputs
    steps = module.strides, module.kernel_dilation, module.input_dilation
    return _tagged(weight, inputs, outputs, padding, *(step or 1 for step in steps))


FLAX_LAYERS = {nn.Dense: _dense, nn.DenseGeneral: _dense, nn.Conv: _conv}
"""The flax layers that are tagged, and how."""
