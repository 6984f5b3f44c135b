"""Computes what a step of a loop has in common with all others once, before the loop."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal, Var


def hoist(step: Callable, *examples: Any) -> Callable:
    """Returns the function without what depends on none of its arguments, which is computed here.

    XLA on CPUs would cut and transpose kernels again at every step of a scan.

    Args:
      step: maps trees of arrays to a tree of arrays; parameters are in its closure.
      examples: trees of arrays with the shapes and types of its arguments.
    """
    closed, shape = jax.make_jaxpr(step, return_shape=True)(*examples)
    jaxpr, tree = closed.jaxpr, jax.tree.structure(shape)
    known: set[Var] = set(jaxpr.constvars)
    before: list[JaxprEqn] = []
    after: list[JaxprEqn] = []
    for equation in jaxpr.eqns:
        if all(isinstance(x, Literal) or x in known for x in equation.invars):
            before.append(equation)
            known |= set(equation.outvars)
        else:
            after.append(equation)
    used = [x for equation in after for x in equation.invars] + jaxpr.outvars
    kept = list(dict.fromkeys(x for x in used if not isinstance(x, Literal) and x in known))
    first = jaxpr.replace(eqns=before, invars=[], outvars=kept)
    constants = jax.core.eval_jaxpr(first, closed.consts)
    rest = jaxpr.replace(eqns=after, constvars=kept)

    def rest_of_step(*arguments: Any) -> Any:
        results = jax.core.eval_jaxpr(rest, constants, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(tree, results)

    return rest_of_step
