"""A network as the project sees it: pure functions and a pytree of parameters."""

from collections.abc import Callable
from typing import Any

import jax

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
