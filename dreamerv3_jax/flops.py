"""Counts the floating-point operations of a function: a multiply-add is two, scans are unrolled."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval


class Product(NamedTuple):
    """A matrix product or convolution of a function."""

    flops: int
    bytes: int  # of both operands and the result
    times: int  # how often it runs


def count(function: Callable, *arguments: Any) -> int:
    """Operations of all matrix products and convolutions whose results are used.

    Everything elementwise is left out.

    Args:
      function: to be traced.
      arguments: arrays, or `jax.ShapeDtypeStruct`s of their shapes.

    Raises:
      ValueError: products in a loop of unknown length, or in a branch.
    """
    return sum(product.flops * product.times for product in products(function, *arguments))


def products(function: Callable, *arguments: Any) -> list[Product]:
    """All matrix products and convolutions whose results are used, for arguments as of `count`."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(_products(used))


def _products(jaxpr: core.Jaxpr) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            yield Product(_product(equation), _bytes(equation), 1)
        elif equation.primitive.name == 'conv_general_dilated':
            yield Product(_convolution(equation), _bytes(equation), 1)
        else:
            inner = [list(_products(jaxpr)) for jaxpr in _inner(equation.params.values())]
            if any(inner) and equation.primitive.name in ('while', 'cond'):
                raise ValueError(f'How often the products in a {equation.primitive.name} run?')
            length = equation.params.get('length', 1)
            for found in inner:
                for product in found:
                    yield product._replace(times=product.times * length)


def _inner(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _arrays(equation: core.JaxprEqn) -> list[Any]:
    """Shapes and types of both operands and the result."""
    return [variable.aval for variable in (*equation.invars, *equation.outvars)]


def _bytes(equation: core.JaxprEqn) -> int:
    return sum(array.size * array.dtype.itemsize for array in _arrays(equation))


def _product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params['dimension_numbers']
    left, _, result = _arrays(equation)
    return 2 * math.prod(left.shape[axis] for axis in contracted) * result.size


def _convolution(equation: core.JaxprEqn) -> int:
    _, kernel, result = _arrays(equation)
    features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
    return 2 * result.size * kernel.size // features
