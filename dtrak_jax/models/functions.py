"""Networks as pure functions, which are all that the rest of the project sees of them."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dtrak_jax.checks import instance
from dtrak_jax.models.conditional_unet import UNet2DCondition
from dtrak_jax.models.config import ModelConfig
from dtrak_jax.models.unet import UNet2D
from dtrak_jax.network import Apply, Init, TrainApply
from dtrak_jax.rng import uniform

UNet = UNet2D | UNet2DCondition


def build(config: ModelConfig) -> UNet2D:
    """Returns the module of a configuration; equal ones give equal modules."""
    instance("config", config, ModelConfig)
    if config.folder:
        raise ValueError(
            f"model.folder is {config.folder!r}; build the model that `models.resolve` "
            "reads from it."
        )
    return UNet2D(config)


@functools.cache
def parameter_shapes(model: nn.Module) -> dict:
    """Returns a network's parameters as nested dicts of `jax.ShapeDtypeStruct`.

    A large network is traced for seconds, so equal ones share the result.
    """
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(model.init, key, *model.inputs())["params"]


@functools.partial(jax.jit, static_argnums=0)
def init(model: nn.Module, key: jax.Array) -> dict:
    """Returns random parameters, as nested dicts, by PyTorch's default initialisation.

    Weights and biases are U(-1/sqrt(fan_in), 1/sqrt(fan_in)), embeddings U(-1, 1); the
    scales of normalisations are 1 and their biases 0.
    """
    shapes = flatten_dict(parameter_shapes(model))
    # There is one draw for all: one for each parameter takes 6 times as long to
    # compile, most of the start of a small run.
    size = parameter_count(shapes)
    draws = uniform(key, (size,), -1, 1)
    params, start = {}, 0
    for path, leaf in shapes.items():
        weight = shapes.get((*path[:-1], "kernel"))
        embedding = path[-1].endswith("embedding")
        if weight is None and not embedding:
            value = jnp.full(leaf.shape, float(path[-1] == "scale"), leaf.dtype)
        else:
            fan_in = 1 if embedding else weight.size // weight.shape[-1]
            value = draws[start : start + leaf.size].reshape(leaf.shape)
            value /= math.sqrt(fan_in)
        params[path] = value
        start += leaf.size
    return unflatten_dict(params)


@functools.cache
def init_fn(model: nn.Module) -> Init:
    """Returns `init` of a model; equal models give the same function."""
    return functools.partial(init, model)


@functools.cache
def train_apply_fn(model: UNet) -> TrainApply:
    """Returns the model as a pure function (params, x, t, cond, keys) -> prediction.

    `params` are as `init` returns them; x, t and the prediction are as in the model,
    whose context is cond: None of a UNet2D. The dropout masks of an example are drawn
    from its random key in `keys` [B]. Equal models give the same function.
    """

    def apply(params, x, t, cond, keys):
        return model.apply({"params": params}, x, t, cond, keys)

    return apply


def apply_fn(model: UNet) -> Apply:
    """Returns the function of `train_apply_fn` without keys, which has no dropout."""
    instance("model", model, nn.Module)
    return _apply_fn(model)


@functools.cache
def _apply_fn(model: UNet) -> Apply:
    def apply(params, x, t, cond):
        return model.apply({"params": params}, x, t, cond)

    return apply


@functools.cache
def bottleneck_fn(model: UNet) -> Callable:
    """Returns a compiled function (params, x, t, cond=None) -> [B, channels].

    It computes the output of the module `mid_block`, averaged over its pixels, without
    dropout and the levels that come after it; its arguments are as of `apply_fn`.
    """

    def bottleneck(params, x, t, cond=None):
        _, state = model.apply(
            {"params": params},
            x,
            t,
            cond,
            capture_intermediates=lambda module, _: module.name == "mid_block",
            mutable=["intermediates"],
        )
        (h,) = state["intermediates"]["mid_block"]["__call__"]
        return h.mean(axis=(1, 2), dtype=jnp.float32)

    return jax.jit(bottleneck)


def parameter_count(params: object) -> int:
    """Returns the number of scalars in a pytree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
