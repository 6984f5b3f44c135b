"""Percentile normalisation of returns (paper, "Actor learning", eq. 7)."""

import math

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax.types import Array, ReturnPercentiles


def init_return_percentiles() -> ReturnPercentiles:
    """Moving averages start at 0 and are not debiased."""
    return ReturnPercentiles(jnp.zeros(()), jnp.zeros(()))


def update_return_percentiles(
    state: ReturnPercentiles,
    returns: Array,
    *,
    low_percentile: float,
    high_percentile: float,
    rate: float,
) -> ReturnPercentiles:
    """Moves both averages towards the percentiles of `returns` of any shape (the global batch)."""
    low, high = (percentile(returns, percent) for percent in (low_percentile, high_percentile))
    return ReturnPercentiles(
        state.low + rate * (low - state.low), state.high + rate * (high - state.high)
    )


def percentile(x: Array, percent: float) -> Array:
    """What `jnp.percentile` returns for x of any shape without NaN, from a partial sort.

    Only the numbers beyond the percentile are put in order.
    """
    if percent > 50:
        return -percentile(-x, 100 - percent)
    position = percent / 100 * (x.size - 1)
    index = math.floor(position)
    last = min(index + 1, x.size - 1)
    smallest = -jax.lax.top_k(-x.ravel(), last + 1)[0]
    return smallest[index] + (position - index) * (smallest[last] - smallest[index])


def return_scale(state: ReturnPercentiles, *, limit: float) -> Array:
    """Divisor of advantages, `max(limit, high - low)`, [] float32: small returns stay small."""
    chex.assert_rank(state, 0)
    return jnp.maximum(limit, state.high - state.low)
