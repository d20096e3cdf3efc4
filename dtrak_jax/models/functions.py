"""The UNet as pure functions, which is how the rest of the project sees a model."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dtrak_jax.config import ModelConfig
from dtrak_jax.models.unet import UNet2D


def build(config: ModelConfig) -> UNet2D:
    """The module of a configuration. Equal configurations give equal modules."""
    return UNet2D(config)


def parameter_shapes(model: UNet2D) -> dict:
    """The parameters as nested dicts of `jax.ShapeDtypeStruct`; allocates nothing."""
    size, channels = model.config.sample_size, model.config.in_channels
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(model.init, key, x, t)["params"]


@functools.partial(jax.jit, static_argnums=0)
def init(model: UNet2D, key: jax.Array) -> dict:
    """Random parameters, as nested dicts, by PyTorch's default initialisation.

    Kernels and biases are U(-1/sqrt(fan_in), 1/sqrt(fan_in)); of normalisations the
    scales are 1 and the biases 0.
    """
    shapes = flatten_dict(parameter_shapes(model))
    # One draw for all: with one for each parameter this takes 6 times as long to
    # compile, most of the start of a small run.
    size = parameter_count(shapes)
    draws = jax.random.uniform(key, (size,), minval=-1, maxval=1)
    params, start = {}, 0
    for path, leaf in shapes.items():
        stop = start + leaf.size
        kernel = shapes.get((*path[:-1], "kernel"))
        if kernel is None:
            value = jnp.full(leaf.shape, float(path[-1] == "scale"), leaf.dtype)
        else:
            fan_in = kernel.size // kernel.shape[-1]
            value = draws[start:stop].reshape(leaf.shape) / math.sqrt(fan_in)
        params[path], start = value, stop
    return unflatten_dict(params)


@functools.cache
def init_fn(model: UNet2D) -> Callable:
    """`init` of one model: key -> params. Equal models give the same function."""
    return functools.partial(init, model)


@functools.cache
def apply_fn(model: UNet2D) -> Callable:
    """The model as a pure function `apply(params, x, t, cond) -> prediction`, without
    dropout.

    `params` are what `init` returns; x, t and the prediction are as in `UNet2D`; cond
    must be None, else a ValueError. Equal models give the same function.
    """

    def apply(params, x, t, cond):
        refuse(cond)
        return model.apply({"params": params}, x, t)

    return apply


@functools.cache
def train_apply_fn(model: UNet2D) -> Callable:
    """The same with dropout: `apply(params, x, t, cond, key) -> prediction`."""

    def apply(params, x, t, cond, key):
        refuse(cond)
        return model.apply({"params": params}, x, t, True, rngs={"dropout": key})

    return apply


@functools.cache
def bottleneck_fn(model: UNet2D) -> Callable:
    """What the lowest level makes of images: `f(params, x, t) -> [B, channels]`.

    The output of the module `mid_block`, averaged over its pixels, without dropout; x
    and t are as in `UNet2D`. Compiled; what comes after that level is not computed.
    """

    def is_mid(module, _):
        return module.name == "mid_block"

    def bottleneck(params, x, t):
        _, state = model.apply(
            {"params": params},
            x,
            t,
            capture_intermediates=is_mid,
            mutable=["intermediates"],
        )
        (h,) = state["intermediates"]["mid_block"]["__call__"]
        return h.mean(axis=(1, 2))

    return jax.jit(bottleneck)


def refuse(cond: object) -> None:
    """Raises a ValueError unless `cond` is None."""
    if cond is not None:
        raise ValueError("cond is given, but a UNet2D takes no condition: pass None.")


def parameter_count(params: object) -> int:
    """Number of scalars in a pytree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
