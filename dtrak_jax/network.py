"""A network as the project sees it: pure functions and a pytree of parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any
"""The parameters of a network: a pytree of arrays."""

Init = Callable[[jax.Array], Params]
"""The initialisation of a network: key -> params."""

Apply = Callable[[Params, jax.Array, jax.Array, Any], jax.Array]
"""A network without dropout: (params, x [B, H, W, C], t [B], cond) -> prediction.

`cond` is None, or a pytree of arrays with a row for each of the B examples.
"""

TrainApply = Callable[[Params, jax.Array, jax.Array, Any, jax.Array], jax.Array]
"""A network in training mode: (params, x, t, cond, keys [B]) -> prediction.

`keys` holds one random key for each example, for its dropout.
"""


def network_params(params: Params, frozen: Params | None) -> Params:
    """Returns what a network is called with: params, or (params, frozen)."""
    return params if frozen is None else (params, frozen)


@functools.cache
def mean_of(apply: Callable) -> Callable:
    """Returns a network without the variance that it predicts beside the mean, if it does.

    Its prediction has the channels of x; of twice as many the first half is the mean
    (Nichol and Dhariwal 2021, arXiv 2102.09672). It is an `Apply` or a `TrainApply`.
    """

    def mean_apply(params, x, *others):
        prediction, channels = apply(params, x, *others), x.shape[-1]
        is_double = prediction.shape[-1] == 2 * channels
        return prediction[..., :channels] if is_double else prediction

    return mean_apply


def check_prediction(prediction: Any, x: jax.Array, double: str = "") -> None:
    """Raises a ValueError unless a prediction is of real numbers in the images' shape.

    Arithmetic would accept some others, such as one channel for three. `double` is what
    the error adds where there are twice the channels.
    """
    if not jnp.issubdtype(getattr(prediction, "dtype", jnp.floating), jnp.floating):
        raise ValueError(
            f"the network predicts {prediction.dtype}; a prediction must be of real "
            "numbers, float32, bfloat16 or float16."
        )
    shape = getattr(prediction, "shape", type(prediction).__name__)
    if shape != x.shape:
        is_double = shape == (*x.shape[:-1], 2 * x.shape[-1])
        raise ValueError(
            f"the network maps images {x.shape} to {shape}; a prediction must have the "
            f"shape of the images.{double if is_double else ''}"
        )


Example = tuple[Any, Any]
"""An example as it is kept, and its condition: both pytrees of arrays, or None."""

View = Callable[[jax.Array, Example, Params], Example]
"""(key, example, frozen) -> x [H, W, C] and the condition of one step of training."""


class Shapes(NamedTuple):
    """The `jax.ShapeDtypeStruct` of what a network is given, of one example."""

    x: jax.ShapeDtypeStruct
    """[1, H, W, C]"""
    cond: Any
    """The conditions, with a leading axis of 1."""
    frozen: Params
    """The frozen parameters, or None."""
    example: Any
    """An example as training keeps it, with a leading axis of 1."""


def rows_of(tree, count: int):
    """Returns the shapes of so many rows in place of the first axis."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), tree
    )


class Network(NamedTuple):
    """The functions that are trained and differentiated, and the shape of their input."""

    init: Init
    apply: Apply
    train_apply: TrainApply
    shape: tuple[int, int, int]
    """The shape (H, W, C) of x."""
    view: View | None
    """None if every step of training sees an example as it is kept."""
    settings: str
    """All that decides these functions, as text."""
