"""Weights of layers, learnt without labels.

A score is an inner product of gradients, over all parameters alike. With a weight w_m >= 0
for each group m of layers, on the query's side alone, it is

  tau_w(q, n) = sum_j g_j(q)^T Diag(w) (Phi_j^T Phi_j + lambda_j I)^-1 phi_j(n)
              = sum_m w_m c_m(q, n),

with c_m(q, n) the score of the query's features of group m, all other entries 0. So
features of training images and kernels stay as they are, and weighted scores are those of
the query features sum_m w_m phi_m(q). Weights are positive and have the mean 1, so that
equal weights change nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore as ts

from dtrak_jax import files, host
from dtrak_jax.attribution.damping import DEFAULT_DAMPING, Damping
from dtrak_jax.attribution.influence import influence
from dtrak_jax.attribution.inputs import (
    Array,
    as_features,
    by_pair,
    check_features,
    joined,
)
from dtrak_jax.attribution.kernel import Kernels
from dtrak_jax.checks import at_least, between, instance
from dtrak_jax.features.store import Features
from dtrak_jax.switches import standard

TOP, RIDGE = 10, 0.03
"""The strongest training images of a query that weights are to set apart, and the
penalty of weights that differ, unless others are given."""

STEPS, RATE = 200, 0.05
"""Adam's steps and learning rate, from equal weights."""


class LayerWeights(NamedTuple):
    """The weights of groups of layers, and query features with these weights."""

    names: tuple[str, ...]
    weights: np.ndarray
    """w, float64 [M], of mean 1."""
    shares: np.ndarray
    """Each group's part of the weighted scores, float64 [M]: the mean over queries of
    w_m <c_m(q, .), tau_w(q, .)> / ||tau_w(q, .)||^2. They add up to 1; one below 0 is of
    a group that pulls against the others."""
    query: Array
    """sum_m w_m phi_m(q), to be given to `attribute` as queries."""

    def __repr__(self) -> str:
        rows = zip(self.names, self.weights, self.shares, strict=True)
        parts = [f"{name} {weight:.2f} ({share:.0%})" for name, weight, share in rows]
        return f"LayerWeights({', '.join(parts)})"


@standard()
def layer_weights(
    train: Array | Kernels,
    by_layer: Mapping[str, Array],
    *,
    damping: float | Damping = DEFAULT_DAMPING,
    top: int = TOP,
    ridge: float = RIDGE,
) -> LayerWeights:
    """Fits weights of layers to the queries, without labels; see the module for tau_w.

    They lower, by Adam from equal weights, the mean over queries q of

      -(mean of the `top` highest tau_w(q, .)) / ||tau_w(q, .)||_2 + ridge mean_m w_m^2,

    the highest chosen anew in each step: those layers count more in whose scores some
    training images stand out from all others (arXiv 2506.05647; softmax weights).
    Contributions c_m are made once, [M, queries, n] in memory.

    Args:
      train: features of the training set, of whole gradients, or their `Kernels`.
      by_layer: {group: features of the queries}, of `featurize(..., layers=...)` with
        the same task, parameters and projection. All groups must be there, as plain
        arrays are taken to be.
      damping: as of `attribute`.
      top: k, of the training images.
      ridge: a larger one keeps weights closer to each other.

    Returns:
      Weights, shares and weighted query features. With several processes all must call
      it together.

    Raises:
      ValueError: features that do not belong together, a group is missing, or wrong
        settings.
      MemoryError: contributions do not fit this host.
    """
    instance("by_layer", by_layer, Mapping)
    kernels, names = Kernels.of(train), tuple(by_layer)
    n = kernels.train.shape[-2]
    top = at_least("top", top, 1, n)
    ridge = between("ridge", ridge, 0)
    contributions = _contributions(kernels, by_layer, Damping.of(damping))
    # Sizes do not matter to the objective, and float32 has no room for all of them.
    contributions /= np.abs(contributions).max() or 1
    weights = _fitted(contributions.astype(np.float32), top, ridge)
    total = np.einsum("m,mqn->qn", weights, contributions)
    products = weights[:, None] * np.einsum("mqn,qn->mq", contributions, total)
    squares = np.sum(total**2, axis=1)
    parts = products[:, squares > 0] / squares[squares > 0]
    shares = parts.mean(axis=1) if parts.size else np.full(len(names), np.nan)
    return LayerWeights(names, weights, shares, _weighted(by_layer, weights))


def _weighted(by_layer: Mapping[str, Array], weights: np.ndarray) -> Array:
    """Returns query features sum_m w_m phi_m(q), which `attribute` takes as queries.

    Of `Features` they are in memory, and their fingerprint has the weights. The squared
    norms are those of weighted gradients, sum_m w_m^2 |g_m|^2.
    """
    sets = _checked(by_layer)
    rows = zip(*map(by_pair, sets), strict=True)
    pairs = [sum(w * phi for w, phi in zip(weights, row, strict=True)) for row in rows]
    phi = np.array(pairs if len(sets[0].shape) == 3 else pairs[0], np.float32)
    if not all(isinstance(features, Features) for features in sets):
        return phi
    first = sets[0]
    measured, _, _ = first.measurement.rpartition("/")
    # What follows the measurement's program is of the group.
    program, *_ = first.fingerprint["measurements"][first.measurement]
    made = first.fingerprint | {"measurements": {measured: program}}
    made["layer_weights"] = dict(zip(by_layer, map(float, weights), strict=True))
    del made["groups"]
    norms = sum(w**2 * f.squared_norms for w, f in zip(weights, sets, strict=True))
    return dataclasses.replace(
        first,
        measurement=measured,
        phi=ts.array(phi),
        squared_norms=norms.astype(np.float32),
        fingerprint=made,
        folder=None,
    )


def _checked(by_layer: Mapping[str, Array]) -> list[Array]:
    """Returns the features of all groups, of one shape.

    Raises:
      ValueError: there are no groups, or their features are of different tasks, examples
        or shapes; or, of `Features`, not those of every group.
    """
    instance("by_layer", by_layer, Mapping)
    if not by_layer:
        raise ValueError("by_layer is {}; it must have one group of layers or more.")
    sets = list(map(as_features, by_layer.values()))
    if len({f.shape for f in sets}) != 1:
        shapes = {name: np.shape(f) for name, f in by_layer.items()}
        raise ValueError(
            f"by_layer has shapes {shapes}; all must have one and the same."
        )
    if not all(isinstance(features, Features) for features in sets):
        return sets
    made_with = [f.fingerprint | {"measurements": None} for f in sets]
    parts = [f.measurement.rpartition("/") for f in sets]
    measured, given = {kind for kind, *_ in parts}, [group for *_, group in parts]
    if "" in measured or len(measured) > 1:
        names = ", ".join(repr(f.measurement) for f in sets)
        raise ValueError(
            f"by_layer has features of {names}; they must be those of one measurement "
            "that featurize(..., layers=...) returns."
        )
    for name, made in zip(by_layer, made_with, strict=True):
        if differing := files.differences(made_with[0], made):
            raise ValueError(
                f"by_layer[{name!r}] (here) and the first (there) do not belong "
                f"together: {differing[0]}."
            )
    groups = made_with[0]["groups"]
    if sorted(given) != sorted(groups):
        raise ValueError(
            f"by_layer has features of the groups {', '.join(given)}; they must be those "
            f"of each group once, {', '.join(groups)}: all parameters have a part."
        )
    for name, group in zip(by_layer, given, strict=True):
        if name in groups and name != group:
            raise ValueError(
                f"by_layer[{name!r}] has features of the group {group!r}; give each group "
                "under its own name."
            )
    return sets


def _contributions(
    kernels: Kernels, by_layer: Mapping[str, Array], damping: Damping
) -> np.ndarray:
    """Returns c_m(q, n) of every group, float64 [M, q, n]."""
    whole = _weighted(by_layer, np.ones(len(by_layer)))
    check_features(kernels.train, whole)
    m, q, n = len(by_layer), whole.shape[-2], kernels.train.shape[-2]
    what = f"scores of {m} groups of layers for {q} queries and {n} training images"
    host.check_fits(what, contribution_bytes(m, q, n))
    stacked = joined([np.asarray(features) for features in by_layer.values()])
    return influence(kernels, stacked, damping).reshape(m, q, n)


def contribution_bytes(groups: int, queries: int, n: int) -> int:
    """Returns the bytes that weights of layers take: contributions in float64, as a sum and
    as those of the next pair, and in float32 for the fit, twice."""
    return 24 * groups * queries * n


def _fitted(contributions: np.ndarray, top: int, ridge: float) -> np.ndarray:
    """Returns the weights of contributions [M, q, n], float64 [M]."""
    logits, step = jnp.zeros(len(contributions)), _step_function(top)
    state = optax.adam(RATE).init(logits)
    contributions, ridge = jnp.asarray(contributions), jnp.float32(ridge)
    for _ in range(STEPS):
        logits, state = step(logits, state, contributions, ridge)
    return np.asarray(_weights(logits), np.float64)


def _weights(logits: jax.Array) -> jax.Array:
    """Returns softmax(logits) times their number, so that the mean is 1."""
    return jax.nn.softmax(logits) * len(logits)


@functools.cache
def _step_function(top: int) -> Callable:
    """Compiles a step of Adam on the objective of `layer_weights`."""

    def objective(logits, contributions, ridge):
        weights = _weights(logits)
        total = jnp.einsum("m,mqn->qn", weights, contributions, precision="highest")
        highest = jax.lax.top_k(total, top)[0].mean(axis=1)
        # A query without any score has no part in it.
        squares = jnp.sum(total**2, axis=1)
        sizes = jnp.sqrt(jnp.where(squares > 0, squares, jnp.inf))
        return ridge * jnp.mean(weights**2) - jnp.mean(highest / sizes)

    @jax.jit
    def step(logits, state, contributions, ridge):
        gradient = jax.grad(objective)(logits, contributions, ridge)
        updates, state = optax.adam(RATE).update(gradient, state)
        return optax.apply_updates(logits, updates), state

    return step
