"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) beside a frozen network.

A layer y = x W of the network becomes y = x W + s (x A) B: A [in, r] and B [r, out] are
trained, W is not, and s is a constant. The weights are never added up, except by `merge`.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dtrak_jax.checks import at_least, between, pattern, positive
from dtrak_jax.models import blocks
from dtrak_jax.models.tags import layer
from dtrak_jax.models.tensors import tensor_name
from dtrak_jax.network import Apply, Params, TrainApply
from dtrak_jax.rng import normal

Adapters = Mapping[str, Mapping[str, jax.Array]]
"""{path of a layer: {"down": A [in, r], "up": B [r, out]}}, float32.

A path is PyTorch's, such as "mid_block.attentions.0.to_q". With a leading axis of
members, [M, in, r] and [M, r, out], a batch is M groups of equal size, one a member.
"""

Scales = Mapping[str, float]
"""{path of a layer: s}; constants of the programs."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers are adapted and how; the defaults are those of the paper."""

    rank: int = 128
    """The rank r of every adapter."""
    alpha: float | None = None
    """The scale is alpha / rank, or 1 without alpha."""
    targets: str = r"\bto_(q|k|v|out\.0)$"
    """A regular expression, found in the path of every layer that is adapted."""
    dropout: float = 0.0
    """The share of an adapter's inputs that is dropped in training."""
    file: str = ""
    """A file or folder of adapters that are taken instead of trained, in the layout of
    diffusers, PEFT or kohya. It decides rank, alpha and targets, which must be left as
    they are."""
    leave_out_text_encoder: bool = False
    """Leave out a file's adapters of the text encoder, instead of refusing the file."""

    def __post_init__(self):
        defaults = {"rank": 128, "alpha": None, "targets": LoRAConfig.targets}
        given = {
            n: getattr(self, n) for n in defaults if getattr(self, n) != defaults[n]
        }
        if self.file and given:
            listed = ", ".join(
                f"lora.{name}={value!r}" for name, value in given.items()
            )
            raise ValueError(
                f"lora.file is {self.file!r}, which decides the rank, alpha and targets of "
                f"its adapters; leave out {listed}."
            )
        at_least("lora.rank", self.rank, 1)
        if self.alpha is not None:
            positive("lora.alpha", self.alpha)
        pattern("lora.targets", self.targets)
        between("lora.dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise ValueError("lora.dropout is 1; it must be a number below 1.")

    @property
    def scale(self) -> float:
        """The scale of every adapter."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def weight_shapes(base: Params) -> dict[str, tuple[int, ...]]:
    """Returns {path of a layer: shape of its weight}, of all layers of a network."""
    flat = flatten_dict(base)
    return {
        _layer(path): leaf.shape for path, leaf in flat.items() if path[-1] == "kernel"
    }


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns (in, out) of a matrix or of a convolution by one pixel, else None."""
    is_matrix = len(shape) == 2 or (len(shape) == 4 and shape[:2] == (1, 1))
    return tuple(shape[-2:]) if is_matrix else None


def targets(config: LoRAConfig, base: Params) -> dict[str, tuple[int, int]]:
    """Returns {path: (in, out)} of the layers that are to be adapted.

    The base is a network's parameters, or their shapes.

    Raises:
      ValueError: `targets` fits no layer, or one that is not a matrix product.
    """
    shapes = weight_shapes(base)
    chosen = {p: shapes[p] for p in sorted(shapes) if re.search(config.targets, p)}
    if not chosen:
        raise ValueError(
            f"lora.targets is {config.targets!r}, which fits no layer of the network. "
            f"It has {', '.join(sorted(shapes))}."
        )
    for path, shape in chosen.items():
        if matrix_shape(shape) is None:
            raise ValueError(
                f"lora.targets is {config.targets!r} and fits {path}, whose weight has "
                f"shape {shape}; adapters are for linear layers and convolutions by "
                "one pixel."
            )
    return {path: matrix_shape(shape) for path, shape in chosen.items()}


def init(config: LoRAConfig, base: Params, key: jax.Array) -> dict:
    """Returns new adapters: A ~ N(0, 1 / rank^2), B = 0, so that nothing changes yet."""
    sizes = targets(config, base)
    return draw({path: (i, config.rank, o) for path, (i, o) in sizes.items()}, key)


def draw(sizes: Mapping[str, tuple[int, int, int]], key: jax.Array) -> dict:
    """Returns new adapters of these sizes, {path: (in, rank, out)}, as `init` does."""
    draws = normal(key, (sum(i * rank for i, rank, _ in sizes.values()),))
    adapters, start = {}, 0
    for path, (inputs, rank, outputs) in sizes.items():
        down = draws[start : start + inputs * rank].reshape(inputs, rank) / rank
        adapters[path] = {"down": down, "up": jnp.zeros((rank, outputs))}
        start += inputs * rank
    return adapters


def scales_of(config: LoRAConfig, base: Params) -> dict[str, float]:
    """Returns the scales of the adapters that `init` makes."""
    return dict.fromkeys(targets(config, base), config.scale)


def apply_fn(base: Apply, scales: Scales) -> Apply:
    """Returns ((adapters, frozen), x, t, cond) -> prediction, of an adapted network.

    The base is the network, (frozen, x, t, cond) -> prediction, made of flax.linen.
    Equal arguments give the same function.

    Raises:
      ValueError: when it is called, as `adapting`.
    """
    return _apply_fn(base, tuple(sorted(scales.items())))


@functools.cache
def _apply_fn(base, scales):
    scales = dict(scales)

    def apply(params, x, t, cond):
        adapters, frozen = params
        with adapting(adapters, scales):
            return base(frozen, x, t, cond)

    return apply


def train_apply_fn(
    base: TrainApply, scales: Scales, dropout: float = 0.0
) -> TrainApply:
    """Returns ((adapters, frozen), x, t, cond, keys) -> prediction; see `apply_fn`."""
    return _train_apply_fn(base, tuple(sorted(scales.items())), dropout)


@functools.cache
def _train_apply_fn(base, scales, dropout):
    scales = dict(scales)

    def apply(params, x, t, cond, keys):
        adapters, frozen = params
        with adapting(adapters, scales, dropout, keys):
            return base(frozen, x, t, cond, keys)

    return apply


@contextlib.contextmanager
def adapting(
    adapters: Adapters,
    scales: Scales,
    dropout: float = 0.0,
    keys: jax.Array | None = None,
) -> Iterator[None]:
    """Adds the adapters to layers of flax.linen: Dense, and Conv by one pixel.

    As in PEFT, the layer's input is cast to float32, and the sum, made in float32, to
    the type of the layer's output. Both products are tagged, see `models.tags`, except
    those of several members.

    Args:
      adapters, scales: of the same layers.
      dropout: the share of the adapters' inputs that is dropped, if there are keys.
      keys: one random key for each example of the batch.

    Raises:
      ValueError: an adapter has no scale or no layer, the layer computes something
        else, or the batch is not made of as many groups as there are members.
    """
    if adapters.keys() != scales.keys():
        odd = sorted(adapters.keys() ^ scales.keys())
        raise ValueError(f"adapters and scales must have the same paths, unlike {odd}.")
    used = set()

    def add(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.method_name != "__call__" or type(context.module) not in LAYERS:
            return y
        path = _layer((*context.module.path, "kernel"))
        if path not in adapters:
            return y
        used.add(path)
        x = args[0] if args else kwargs["inputs"]
        _check_layer(path, context.module, x, y)
        x = blocks.dropout(x.astype(jnp.float32), dropout, keys, f"{path} adapter")
        return (y + scales[path] * _product(path, adapters[path], x)).astype(y.dtype)

    with nn.intercept_methods(add):
        yield
    if missing := sorted(adapters.keys() - used):
        raise ValueError(
            f"the network has no Dense and no Conv by one pixel at {', '.join(missing)}, "
            "for which there are adapters."
        )


LAYERS = (nn.Dense, nn.Conv)
"""The flax layers that can be adapted; their subclasses may do anything."""


def _check_layer(path, module, x, y):
    """Raises a ValueError unless the layer is a product of the last axis."""
    if isinstance(module, nn.Conv) and (
        math.prod(module.kernel_size) > 1
        or module.feature_group_count > 1
        or x.shape[:-1] != y.shape[:-1]
    ):
        raise ValueError(
            f"{path} is a convolution with window {module.kernel_size}, strides "
            f"{module.strides} and {module.feature_group_count} groups; only those by "
            "one pixel, of stride 1 and in one group can be adapted."
        )


def _product(path, adapter, x):
    """Returns (x A) B, where both are tagged; or for each member on its own group."""
    down, up = adapter["down"], adapter["up"]
    if down.ndim == 2:
        h = layer(down, x, x @ down)
        return layer(up, h, h @ up)
    members = len(down)
    if len(x) % members:
        raise ValueError(
            f"the input of {path} has {len(x)} rows; it must have as many for each of "
            f"{members} members."
        )
    groups = x.reshape(members, -1, x.shape[-1])
    return (groups @ down @ up).reshape(*x.shape[:-1], -1)


def merge(base: Params, adapters: Adapters, scales: Scales) -> Params:
    """Returns the network's parameters with W + s A B, for sampling.

    Gradients of such weights would have their size, and cost several times as much.
    """
    flat = flatten_dict(base)
    for path, weight in flat.items():
        if path[-1] == "kernel" and (name := _layer(path)) in adapters:
            adapter = adapters[name]
            change = scales[name] * (adapter["down"] @ adapter["up"])
            change = change.reshape(weight.shape)
            flat[path] = (weight + change).astype(weight.dtype)
    return unflatten_dict(flat)


def _layer(path: tuple[str, ...]) -> str:
    """Returns PyTorch's path of the layer that has this weight."""
    return tensor_name(path).rpartition(".")[0]
