"""Every example's own kernel gradients, as matrix products.

`jax.vmap` makes of the gradients of convolution kernels, one for each example, a grouped
convolution with as many groups as examples. Compilers have no fast code for those, and
XLA partitions them wrongly over devices.
"""

import itertools
import math
from collections.abc import Callable

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives


def kernel_gradients_as_products(function: Callable) -> Callable:
    """The same function, with convolutions of few outputs written as matrix products.

    The gradient of a kernel is such a convolution: of the layer's inputs by its output
    gradients, with as many outputs as the kernel has entries in its window. As a sum
    over positions of patches of the inputs times output gradients it is one product of
    matrices, and a batch of them under `jax.vmap`.

    Found by reading what JAX makes of the function, so that any network will do. The
    bodies of loops and branches are left as they are.
    """

    def rewritten(*arguments):
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        flat = jax.tree.leaves(arguments)
        results = _evaluate(traced, flat)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return rewritten


def _evaluate(traced: core.ClosedJaxpr, arguments: list) -> list:
    """Runs a traced function on arrays or tracers."""
    jaxpr, values = traced.jaxpr, {}

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, traced.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        results = _apply(equation, given)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: core.JaxprEqn, given: list) -> list:
    """The results of one operation."""
    primitive, params = equation.primitive, equation.params
    if primitive is primitives.jit_p:
        return _evaluate(params["jaxpr"], given)
    if primitive is primitives.conv_general_dilated_p:
        (result,) = equation.outvars
        if _is_kernel_gradient(*given, result.aval.shape, params):
            return [_product(*given, result.aval.shape, params)]
    results = primitive.bind(*given, **primitive.get_bind_params(params))
    return results if primitive.multiple_results else [results]


def _is_kernel_gradient(lhs, rhs, shape: tuple[int, ...], params: dict) -> bool:
    """Whether there are no more outputs than entries in the window."""
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"] * params["batch_group_count"]
    outputs = math.prod(shape[axis] for axis in numbers.out_spec[2:])
    window = math.prod(rhs.shape[axis] for axis in numbers.rhs_spec[2:])
    return groups == 1 and outputs <= window


def _product(lhs, rhs, shape: tuple[int, ...], params: dict) -> jax.Array:
    """`lax.conv_general_dilated` as one matrix product."""
    numbers = params["dimension_numbers"]
    batch, feature, *space = numbers.lhs_spec
    _, in_features, *window = numbers.rhs_spec
    outputs = [shape[axis] for axis in numbers.out_spec[2:]]

    config = [(0, 0, 0)] * lhs.ndim
    for axis, pair, step in zip(space, params["padding"], params["lhs_dilation"]):
        config[axis] = (*pair, step - 1)
    padded = lax.pad(lhs, lax.full((), 0, lhs.dtype), config)

    def patch(position):
        """What one output sees, [..., B, ...]."""
        start, stop = [0] * lhs.ndim, list(padded.shape)
        steps = [1] * lhs.ndim
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
