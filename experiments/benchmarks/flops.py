"""Counts the floating-point operations of a function: a multiply-add is two, scans are unrolled."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function: Callable, *arguments: Any) -> int:
    """Operations of all matrix products and convolutions whose results are used.

    Everything elementwise is left out.

    Args:
      function: to be traced.
      arguments: arrays, or `jax.ShapeDtypeStruct`s of their shapes.

    Raises:
      ValueError: products in a loop of unknown length, or in a branch.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            total += _product(equation)
        elif equation.primitive.name == 'conv_general_dilated':
            total += _convolution(equation)
        else:
            counts = list(map(_count, _inner(equation.params.values())))
            inside = sum(counts)
            if equation.primitive.name == 'cond' and len(set(counts)) == 1:
                inside = counts[0]  # the same whichever branch runs
            elif inside and equation.primitive.name in ('while', 'cond'):
                raise ValueError(f'How often the products in a {equation.primitive.name} run?')
            total += inside * equation.params.get('length', 1)
    return total


def _inner(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params['dimension_numbers']
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * equation.outvars[0].aval.size


def _convolution(equation: core.JaxprEqn) -> int:
    kernel = equation.invars[1].aval
    features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * kernel.size // features
