"""Layers whose kernel gradients are sketched as they are made.

The gradient of a layer's kernel is G = sum_positions a delta^T: a the layer's input, of
a convolution a patch of it, and delta the gradient with respect to its output. With a
and delta on fewer channels the same sum gives P_in^T G P_out, without ever forming G:
`features.factorized`. A network says by `layer` what its layers are; those of flax are
found by `models.linen`.
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

import jax
import jax.numpy as jnp
from jax import lax

Size = tuple[int, int, int]
"""Of a kernel: entries of its window (1 of a matrix product), C_in and C_out."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["signs"], meta_fields=["width"]
)
@dataclasses.dataclass(frozen=True)
class Fold:
    """A linear map of C channels to k: channel c, times a sign, is added to c mod k.

    With random signs E[P P^T] = I; with k = C inner products are exact.
    """

    signs: jax.Array
    """[C]."""
    width: int
    """k."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., k], float32."""
        channels, k = len(self.signs), self.width
        x = x.astype(jnp.float32) * self.signs.reshape((1,) * (x.ndim - 1) + (-1,))
        rows = -(-channels // k)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows * k - channels)])
        return x.reshape(*x.shape[:-1], rows, k).sum(axis=-2)


class Sketch(NamedTuple):
    """How the gradient of one kernel is to be sketched."""

    into: jax.Array
    """Zeros [window, k_in, k_out]; the gradient with respect to them is the sketch."""
    fold_in: Fold
    """Of the C_in channels."""
    fold_out: Fold
    """Of the C_out channels."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """What `layer` looks for, and what it found.

    Attributes:
      kernels: {id of an array: index of the kernel}.
      sketches: {index: sketch}, of some kernels or of none.
      found: {index: size} of the kernels that were met.
      marks: {index: number of layers} with that kernel.
    """

    kernels: dict[int, int]
    sketches: dict[int, Sketch]
    found: dict[int, Size] = dataclasses.field(default_factory=dict)
    marks: collections.Counter = dataclasses.field(default_factory=collections.Counter)


_watch = contextvars.ContextVar("watch", default=None)


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Has `layer` look for some kernels."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def layer(
    kernel: jax.Array,
    inputs: jax.Array,
    outputs: jax.Array,
    *,
    padding: str | int | Sequence[int | tuple[int, int]] | None = None,
    strides: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    input_dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """Says that outputs are inputs times kernel, and returns the outputs.

        y = dtrak.layer(w, x, x @ w)
        y = dtrak.layer(w, x, convolve(x, w), padding="SAME")

    What `Projection("factorized")` needs to know of a network that is not made of flax
    layers; without any effect otherwise. Go on with what it returns. Each use of the
    kernel must be marked. Inside `jax.jit`, `jax.checkpoint` or `lax.scan` a kernel is
    not recognised, and its gradient is formed as usual.

    Args:
      kernel: [d_in, d_out], or [*window, C_in, C_out] of a convolution without groups;
        a leaf of the parameters as it came, not cast, reshaped or sliced.
      inputs: [..., d_in], or [..., *space, C_in].
      outputs: [..., d_out], or [..., *space', C_out]; with or without a bias.
      padding: None for a matrix product; of a convolution "SAME", "VALID", or for each
        axis an integer or a pair.
      strides: of the window; for each axis, or the same for all.
      dilation: of the window.
      input_dilation: of the inputs.

    Raises:
      ValueError: these shapes do not belong together.
    """
    watch = _watch.get()
    index = watch.kernels.get(id(kernel)) if watch else None
    if index is None:
        return outputs
    window = () if padding is None else kernel.shape[:-2]
    steps = _Steps.of(window, inputs, padding, strides, dilation, input_dilation)
    size = math.prod(window), inputs.shape[-1], outputs.shape[-1]
    positions = *inputs.shape[: inputs.ndim - len(window) - 1], *steps.space
    if math.prod(size) != kernel.size or outputs.shape[:-1] != positions:
        raise ValueError(
            f"the layer with a kernel of shape {kernel.shape} is marked to make outputs "
            f"{outputs.shape} of inputs {inputs.shape} with padding={padding!r}, "
            f"strides={strides!r}, dilation={dilation!r}, "
            f"input_dilation={input_dilation!r}; these do not belong together."
        )
    watch.found[index] = size
    watch.marks[index] += 1
    if index not in watch.sketches:
        return outputs
    into, fold_in, fold_out = watch.sketches[index]
    small = fold_in(lax.stop_gradient(inputs))
    small = small.reshape(-1, *small.shape[small.ndim - len(window) - 1 :])
    return _sketched(steps, outputs, small, fold_out, into)


class _Steps(NamedTuple):
    """Where the windows of a convolution lie; nothing but () for a matrix product."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int, int], ...]
    """(before, after, between), as `lax.pad` takes them."""
    space: tuple[int, ...]
    """Of the outputs."""

    @classmethod
    def of(cls, window, inputs, padding, strides, dilation, input_dilation):
        axes = len(window)
        space = inputs.shape[inputs.ndim - 1 - axes : -1]

        def each(value):
            return (value,) * axes if isinstance(value, int) else tuple(value)

        strides, dilation, between = map(each, (strides, dilation, input_dilation))
        spread = [(n - 1) * step + 1 for n, step in zip(space, between)]
        reach = [(n - 1) * step + 1 for n, step in zip(window, dilation)]
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(spread, reach, strides, padding)
        pairs = [(p, p) if isinstance(p, int) else p for p in each(padding or 0)]
        return cls(
            window,
            strides,
            dilation,
            tuple((*pair, step - 1) for pair, step in zip(pairs, between)),
            tuple(
                (n + sum(pair) - w) // stride + 1
                for n, pair, w, stride in zip(spread, pairs, reach, strides)
            ),
        )

    def patches(self, x: jax.Array) -> jax.Array:
        """[B, *space, C] -> [B * outputs, window, C]."""
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *self.pads, (0, 0, 0)])

        def entry(offset):
            start = [o * step for o, step in zip(offset, self.dilation)]
            spans = zip(start, self.space, self.strides)
            stop = [s + (n - 1) * stride + 1 for s, n, stride in spans]
            return lax.slice(
                x,
                (0, *start, 0),
                (x.shape[0], *stop, x.shape[-1]),
                (1, *self.strides, 1),
            ).reshape(-1, x.shape[-1])

        offsets = itertools.product(*map(range, self.window))
        return jnp.stack([entry(offset) for offset in offsets], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sketched(steps: _Steps, outputs, small, fold_out, into):
    """The outputs; has the sketch of G as its gradient with respect to `into`."""
    return outputs


def _forward(steps, outputs, small, fold_out, into):
    return outputs, (small, fold_out)


def _backward(steps, saved, gradient):
    small, fold_out = saved
    delta = fold_out(gradient.reshape(-1, gradient.shape[-1]))
    sketch = jnp.einsum("nwi,no->wio", steps.patches(small), delta)
    return gradient, None, None, sketch


_sketched.defvjp(_forward, _backward)
