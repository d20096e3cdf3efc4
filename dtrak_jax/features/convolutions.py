"""Gradients of convolutions' weights, one for each example, as matrix products.

`jax.vmap` makes of these a convolution with as many groups as examples, for which
compilers have no fast code, and which XLA partitions wrongly over devices.
"""

import itertools
import math
from collections.abc import Callable

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives


def weight_gradients_as_products(function: Callable) -> Callable:
    """Returns the function with convolutions of few outputs as matrix products.

    The gradient of a weight is such a convolution: of the layer's inputs by its output
    gradients, with as many outputs as the weight has entries in its window. It is found
    in the jaxpr, so that any network will do; loops and branches are left as they are.
    """

    return _rewritten(function, as_products=True)


def groups_for_vmap(function: Callable) -> Callable:
    """Returns the function with convolutions in groups that `jax.vmap` can batch.

    It refuses those that JAX's transposes make, since these name a sharding.
    """
    return _rewritten(function, as_products=False)


def _rewritten(function: Callable, as_products: bool) -> Callable:
    """Returns the function with some of its convolutions changed."""

    def rewritten(*arguments):
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        flat = jax.tree.leaves(arguments)
        results = _evaluate(traced, flat, as_products)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return rewritten


def _evaluate(traced: core.ClosedJaxpr, arguments: list, as_products: bool) -> list:
    """Returns the results of a traced function for arrays or tracers."""
    jaxpr = traced.jaxpr
    values = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        results = _apply(equation, inputs, as_products)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: core.JaxprEqn, arguments: list, as_products: bool) -> list:
    """Returns the results of one operation."""
    primitive, params = equation.primitive, equation.params
    if primitive is primitives.jit_p:
        return _evaluate(params["jaxpr"], arguments, as_products)
    if primitive is primitives.conv_general_dilated_p:
        (result,), shape = equation.outvars, arguments[1].shape
        if as_products and _is_weight_gradient(shape, result.aval.shape, params):
            return [_product(*arguments, result.aval.shape, params)]
        if not as_products and _groups(params) > 1 and "out_sharding" in params:
            params = params | {"out_sharding": None}
    results = primitive.bind(*arguments, **primitive.get_bind_params(params))
    return results if primitive.multiple_results else [results]


def _groups(params: dict) -> int:
    """Returns the number of groups of a convolution."""
    return params["feature_group_count"] * params["batch_group_count"]


def _is_weight_gradient(window: tuple, outputs: tuple, params: dict) -> bool:
    """Returns True if there are no more outputs than entries in the window."""
    numbers = params["dimension_numbers"]
    positions = math.prod(outputs[axis] for axis in numbers.out_spec[2:])
    entries = math.prod(window[axis] for axis in numbers.rhs_spec[2:])
    return _groups(params) == 1 and positions <= entries


def _product(lhs, rhs, shape: tuple[int, ...], params: dict) -> jax.Array:
    """Returns `lax.conv_general_dilated` as one matrix product."""
    numbers = params["dimension_numbers"]
    batch, feature, *space = numbers.lhs_spec
    _, in_features, *window = numbers.rhs_spec
    outputs = [shape[axis] for axis in numbers.out_spec[2:]]

    config = [(0, 0, 0)] * lhs.ndim
    for axis, pair, step in zip(space, params["padding"], params["lhs_dilation"]):
        config[axis] = (*pair, step - 1)
    padded = lax.pad(lhs, lax.full((), 0, lhs.dtype), config)

    def patch(position):
        start, stop, steps = [0] * lhs.ndim, list(padded.shape), [1] * lhs.ndim
        for j, axis in enumerate(space):
            start[axis] = position[j] * params["window_strides"][j]
            steps[axis] = params["rhs_dilation"][j]
            reach = (rhs.shape[window[j]] - 1) * steps[axis] + 1
            stop[axis] = start[axis] + reach
        return lax.slice(padded, start, stop, steps)

    positions = itertools.product(*map(range, outputs))
    patches = lax.concatenate([patch(position) for position in positions], batch)
    summed = ((in_features, *window), (feature, *space))
    product = lax.dot_general(
        rhs,
        patches,
        (summed, ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    product = product.reshape(-1, *outputs, lhs.shape[batch])
    order = [product.ndim - 1, 0, *range(1, product.ndim - 1)]
    return product.transpose(
        [order[numbers.out_spec.index(a)] for a in range(lhs.ndim)]
    )
