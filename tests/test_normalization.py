"""Percentile normalisation of returns."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from dreamerv3_jax.normalization import (
    init_return_percentiles,
    percentile,
    return_scale,
    update_return_percentiles,
)
from dreamerv3_jax.types import ReturnPercentiles


def updated(state, returns, rate=0.01, low=5.0, high=95.0):
    returns = jnp.asarray(returns, jnp.float32)
    return update_return_percentiles(
        state, returns, low_percentile=low, high_percentile=high, rate=rate
    )


def scale_of(low, high, limit=1.0):
    return return_scale(ReturnPercentiles(jnp.float32(low), jnp.float32(high)), limit=limit)


def test_start():
    state = init_return_percentiles()
    assert (float(state.low), float(state.high)) == (0, 0)
    assert state.low.dtype == state.high.dtype == jnp.float32


def test_update_by_hand():
    # Of 0, 1, ..., 100 the 5th percentile is 5 and the 95th is 95. From 0 a hundredth of the way,
    # without debiasing: 0.05 and 0.95. Again: 0.99 * 0.05 + 0.01 * 5 = 0.0995, 0.99 * 0.95 + 0.01 *
    # 95 = 1.8905.
    returns = np.random.default_rng(0).permutation(np.arange(101.0))
    state = updated(init_return_percentiles(), returns)
    np.testing.assert_allclose(state, [0.05, 0.95], rtol=1e-5)
    state = updated(state, returns)
    np.testing.assert_allclose(state, [0.0995, 1.8905], rtol=1e-5)


def test_update_limits():
    state = ReturnPercentiles(jnp.float32(-3), jnp.float32(7))
    np.testing.assert_array_equal(updated(state, [1.0, 2.0], rate=0.0), [-3, 7])
    np.testing.assert_allclose(updated(state, np.full((4, 5), 2.0), rate=1.0), [2, 2])
    np.testing.assert_allclose(updated(state, [1.0, 2.0], rate=1.0, low=0.0, high=100.0), [1, 2])


@pytest.mark.parametrize('percent', [0, 5, 37.5, 50, 95, 100])
@pytest.mark.parametrize('count', [1, 2, 3, 100, 101])
def test_percentile(percent, count):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(count), jnp.float32)
    np.testing.assert_allclose(percentile(x, percent), np.percentile(x, percent), rtol=1e-5)
    np.testing.assert_allclose(percentile(x, percent), jnp.percentile(x, percent), rtol=1e-5)


def test_percentile_by_hand():
    # Of 4 numbers the 50th is in the middle of the second and the third.
    assert percentile(jnp.array([[8.0, 1.0], [2.0, 4.0]]), 50) == 3
    assert percentile(jnp.array([7.0, 7.0, 7.0]), 95) == 7


def test_update_converges_to_the_percentiles():
    state = init_return_percentiles()
    for _ in range(100):
        state = updated(state, np.arange(101.0), rate=0.1)
    np.testing.assert_allclose(state, [5, 95], rtol=1e-3)


@given(st.integers(0, 1000), st.floats(-50, 50), st.floats(0.1, 10))
def test_percentiles_move_and_scale_with_the_returns(seed, shift, factor):
    returns = np.random.default_rng(seed).standard_normal((6, 7)).astype(np.float32)
    plain = updated(init_return_percentiles(), returns)
    moved = updated(init_return_percentiles(), returns * factor + shift)
    expected = [factor * x + 0.01 * shift for x in plain]
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-5)
    # The whole batch counts, whatever its shape.
    np.testing.assert_allclose(updated(init_return_percentiles(), returns.reshape(-1)), plain)


@pytest.mark.parametrize(
    ('low', 'high', 'scale'),
    [(-2, 5, 7), (0, 0, 1), (0.1, 0.9, 1), (3, 3.5, 1), (-1e4, 1e4, 2e4)],
)
def test_scale_by_hand(low, high, scale):
    np.testing.assert_allclose(scale_of(low, high), scale, rtol=1e-6)


def test_scale_keeps_to_its_limit():
    assert scale_of(0, 0.5, limit=0.1) == 0.5
    assert scale_of(0, 0.05, limit=0.1) == np.float32(0.1)
