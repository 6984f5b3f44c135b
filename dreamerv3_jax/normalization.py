"""Percentile normalisation of returns (paper, "Actor learning", eq. 7)."""

import chex
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
    percentiles = jnp.percentile(returns, jnp.array([low_percentile, high_percentile]))
    return ReturnPercentiles(
        state.low + rate * (percentiles[0] - state.low),
        state.high + rate * (percentiles[1] - state.high),
    )


def return_scale(state: ReturnPercentiles, *, limit: float) -> Array:
    """Divisor of advantages, `max(limit, high - low)`, [] float32: small returns stay small."""
    chex.assert_rank(state, 0)
    return jnp.maximum(limit, state.high - state.low)
