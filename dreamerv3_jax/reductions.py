"""Maxima and sums in an order in which CPUs are quick; other platforms take them as XLA does.

XLA on CPUs compares and adds numbers of one row one by one. Here 16 that lie side by side, which
fill a register, are taken at once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dreamerv3_jax.types import Array

_REGISTER = 16


def max_of_rows(x: Array) -> Array:
    """Maximum over the last axis, [..., n] -> [...]; it has no gradient."""

    def by_registers(x: Array) -> Array:
        parts = _registers(x)
        if parts[-1].shape != parts[0].shape:
            parts[-1] = x[..., -_REGISTER:]  # some numbers twice
        return jnp.max(_fold(jnp.maximum, parts), -1)

    return _reduce(by_registers, lambda x: jnp.max(x, -1), jax.lax.stop_gradient(x))


def log_sum_exp(x: Array) -> Array:
    """Logarithm of the sum of the exponentials over the last axis, finite [..., n] -> [...]."""
    most = max_of_rows(x)
    return most + jnp.log(jnp.sum(jnp.exp(x - most[..., None]), -1))


@jax.custom_jvp
def sum_of_rows(x: Array) -> Array:
    """Sum over the last axis, [..., n] -> [...]."""

    def by_registers(x: Array) -> Array:
        *parts, last = _registers(x)
        if not parts or last.shape == parts[0].shape:
            return jnp.sum(_fold(jnp.add, [*parts, last]), -1)
        return jnp.sum(_fold(jnp.add, parts), -1) + jnp.sum(last, -1)

    return _reduce(by_registers, lambda x: jnp.sum(x, -1), x)


@sum_of_rows.defjvp
def _sum_of_rows_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return sum_of_rows(*primals), jnp.sum(*tangents, -1)


def _reduce(on_cpu: Callable[[Array], Array], elsewhere: Callable, x: Array) -> Array:
    return jax.lax.platform_dependent(x, cpu=on_cpu, default=elsewhere)


def _registers(x: Array) -> list[Array]:
    return [x[..., at : at + _REGISTER] for at in range(0, x.shape[-1], _REGISTER)]


def _fold(function: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    first, *rest = parts
    for part in rest:
        first = function(first, part)
    return first
