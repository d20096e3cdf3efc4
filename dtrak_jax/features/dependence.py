"""The checks of a network: its output, and the parameters that have a part in it."""

import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

from dtrak_jax.digests import named_leaves
from dtrak_jax.features.gradients import (
    chosen_leaves,
    network_inputs,
    network_params,
)
from dtrak_jax.features.task import Task
from dtrak_jax.network import Params, check_prediction


def check_network(task: Task, params: Params, frozen, images, cond) -> None:
    """Raises a ValueError if parameters or the network's output cannot be right."""
    for name, tree in (("params", params), ("frozen", frozen)):
        for path, leaf in named_leaves(tree).items():
            if not np.isfinite(np.asarray(leaf, np.float32)).all():
                raise ValueError(f"{name}: {path} has entries that are not finite.")
    x, t, condition = network_inputs(images, cond, 2)
    network = network_params(params, frozen)
    traced = jax.make_jaxpr(task.network, return_shape=True)
    try:
        program, prediction = traced(network, x, t, condition)
    except Exception as error:
        raise ValueError(
            f"the network does not take images of shape {images.shape[-3:]} with these "
            f"parameters: {error}"
        ) from error
    remedy = " If it is a mean and a variance, Task(variance='ignore') takes the mean."
    check_prediction(prediction, x, remedy)
    check_dependence(task, params, program.jaxpr)


def check_dependence(task: Task, params: Params, program: Jaxpr) -> None:
    """Raises a ValueError if no parameter has a part in the prediction.

    Warns of those that have none, if they are a part of them only. The first inputs of
    the program, whose only output is the prediction, are the leaves of `params`.
    """
    paths, chosen = list(named_leaves(params)), chosen_leaves(task, params)
    used = differentiable_inputs(program, [True])
    unused = [paths[i] or "params" for i in chosen if not used[i]]
    names = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
    if len(unused) == len(chosen):
        raise ValueError(
            "the network's prediction does not depend on any of the parameters that are "
            f"differentiated, {names}: every gradient would be 0. Does apply use its "
            "argument params, and not parameters that it was made with?"
        )
    if unused:
        warnings.warn(
            f"the network's prediction does not depend on {len(unused)} of {len(chosen)} "
            f"parameters, {names}; their gradients are 0.",
            stacklevel=4,
        )


def differentiable_inputs(program: Jaxpr, outputs: Sequence[bool]) -> list[bool]:
    """Returns which inputs of a program the marked outputs can have a derivative by.

    An input that is not used, or by way of whole numbers or `stop_gradient` alone, has
    none. Loops, conditions and functions with derivatives of their own count as using
    all that they are given.
    """
    needed = _variables(program.outvars, outputs)
    for equation in reversed(program.eqns):
        marked = [variable in needed for variable in equation.outvars]
        if not any(marked) or equation.primitive.name == "stop_gradient":
            continue
        used = [True] * len(equation.invars)
        if equation.primitive.name in ("jit", "pjit"):
            used = differentiable_inputs(equation.params["jaxpr"].jaxpr, marked)
        needed |= _variables(equation.invars, used)
    return [variable in needed for variable in program.invars]


def _variables(values: Sequence, marked: Sequence[bool]) -> set:
    """Returns the marked variables of floating point."""
    return {
        value
        for value, mark in zip(values, marked, strict=True)
        if mark
        and not isinstance(value, Literal)
        and jax.numpy.issubdtype(value.aval.dtype, jax.numpy.inexact)
    }
