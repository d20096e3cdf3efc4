"""The parameters that have a part in a network's output, read off its program."""

from collections.abc import Sequence

import jax
from jax.extend.core import Jaxpr, Literal


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
