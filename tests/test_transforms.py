"""Symlog and two-hot coding: by hand, at their limits, and there and back."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from dreamerv3_jax.transforms import symexp, symlog, two_hot, two_hot_bins, two_hot_mean

BINS = two_hot_bins(255)
SMALL = np.array([-1.0, -4.0, 1.0, 4.0, 0.0], np.float32)  # the order of `two_hot_bins`
TOP = np.expm1(20.0)  # 485,165,194

numbers = st.floats(-1e8, 1e8, width=32)
encode = jax.jit(functools.partial(two_hot, bins=BINS))
decode = jax.jit(functools.partial(two_hot_mean, bins=BINS))


def test_symlog_by_hand():
    # ln(1 + (e - 1)) = 1, and the sign is kept: -ln(1 + (e^2 - 1)) = -2.
    x = jnp.array([0.0, np.e - 1, -(np.e**2 - 1)])
    np.testing.assert_allclose(symlog(x), [0, 1, -2], rtol=1e-6)
    np.testing.assert_allclose(symexp(jnp.array([0.0, 1, -2])), x, rtol=1e-6)


def test_symlog_limits():
    # The identity close to 0, a logarithm far from it.
    np.testing.assert_allclose(symlog(jnp.array([1e-6, -1e-6])), [1e-6, -1e-6], rtol=1e-5)
    np.testing.assert_allclose(symlog(jnp.array([1e30])), [30 * np.log(10)], rtol=1e-6)
    assert symlog(jnp.inf) == jnp.inf


@given(numbers)
def test_symexp_inverts_symlog(x):
    np.testing.assert_allclose(symexp(symlog(jnp.float32(x))), x, rtol=1e-5, atol=1e-37)
    assert symlog(jnp.float32(-x)) == -symlog(jnp.float32(x))


def test_bins_by_hand():
    # Three bins lie at symexp(-20), symexp(20), 0; five add symexp(-10) and symexp(10) = 22,025.
    np.testing.assert_allclose(two_hot_bins(3), [-TOP, TOP, 0], rtol=1e-6)
    low = np.expm1(10.0)
    np.testing.assert_allclose(two_hot_bins(5), [-low, -TOP, low, TOP, 0], rtol=1e-6)


def test_bins_are_symexp_of_equal_steps_and_exactly_symmetric():
    assert BINS.dtype == np.float32 and BINS.shape == (255,)
    np.testing.assert_allclose(
        np.sort(BINS), symexp(jnp.linspace(-20.0, 20.0, 255)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(np.sort(BINS), -np.sort(BINS)[::-1])
    np.testing.assert_array_equal(BINS[:127], -BINS[127:254])
    assert BINS[254] == 0 and np.sum(BINS == 0) == 1


@pytest.mark.parametrize('count', [-1, 0, 1, 2, 254])
def test_bins_need_a_middle(count):
    with pytest.raises(ValueError, match='odd'):
        two_hot_bins(count)


@pytest.mark.parametrize(
    ('value', 'weights'),
    [
        (0.0, [0, 0, 0, 0, 1]),
        (1.0, [0, 0, 1, 0, 0]),
        (0.25, [0, 0, 0.25, 0, 0.75]),  # a quarter of the way from 0 to 1
        (2.5, [0, 0, 0.5, 0.5, 0]),  # half of the way from 1 to 4, measured without squashing
        (-3.25, [0.25, 0.75, 0, 0, 0]),
        (4.0, [0, 0, 0, 1, 0]),
        (4.5, [0, 0, 0, 1, 0]),  # beyond the last bin
        (1e30, [0, 0, 0, 1, 0]),
        (np.inf, [0, 0, 0, 1, 0]),
        (-4.5, [0, 1, 0, 0, 0]),
        (-1e30, [0, 1, 0, 0, 0]),
        (-np.inf, [0, 1, 0, 0, 0]),
    ],
)
def test_two_hot_by_hand(value, weights):
    np.testing.assert_allclose(two_hot(jnp.float32(value), SMALL), weights, atol=1e-7)


@given(st.one_of(numbers, st.floats(-5, 5, width=32)))
def test_two_hot_weighs_the_two_neighbours(value):
    weights = np.asarray(encode(jnp.float32(value)), np.float64)
    assert weights.shape == (255,) and weights.min() >= 0
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-5)
    order = np.sort(BINS)
    above = np.searchsorted(order, np.float32(value))
    neighbours = order[max(above - 1, 0) : above + 1]
    assert set(BINS[weights > 0]) <= set(neighbours)
    # Linear in the value itself: the weighted mean of the bins is the value.
    np.testing.assert_allclose(weights @ BINS.astype(np.float64), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('value', [TOP * 1.0001, 1e9, 3e38, np.inf])
def test_values_beyond_the_bins_go_to_the_end_bins(value):
    top = np.argmax(BINS)
    for sign, end in ((1, top), (-1, np.argmin(BINS))):
        weights = np.asarray(encode(jnp.float32(sign * value)))
        assert weights[end] == 1 and weights.sum() == 1


def test_large_values_are_not_clipped_early():
    # Half of the last bin's value lies between two bins far out, not at an end.
    weights = np.asarray(encode(jnp.float32(TOP / 2)), np.float64)
    np.testing.assert_allclose(weights @ BINS.astype(np.float64), TOP / 2, rtol=1e-5)
    assert weights[np.argmax(BINS)] == 0


@pytest.mark.parametrize('shape', [(), (7,), (15, 3, 2)])
@pytest.mark.parametrize('count', [41, 255])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_equal_logits_decode_to_exactly_zero(shape, count, dtype):
    bins = two_hot_bins(count)
    mean = jax.jit(lambda logits: two_hot_mean(logits, bins))
    for logit in (0.0, -3.7, 1e4):
        result = mean(jnp.full((*shape, count), logit, dtype))
        assert result.dtype == jnp.float32 and not np.any(result)


def test_mean_by_hand():
    # Weights 1, 2, 3, 4, 6 of 16 on -1, -4, 1, 4, 0: (-1 - 8 + 3 + 16) / 16 = 0.625.
    logits = jnp.log(jnp.array([1.0, 2, 3, 4, 6])) + 5  # a shift changes nothing
    np.testing.assert_allclose(two_hot_mean(logits, SMALL), 0.625, rtol=1e-6)


def test_bins_in_another_order_are_refused():
    with pytest.raises(ValueError, match='order of two_hot_bins'):
        two_hot_mean(jnp.zeros(5), np.sort(SMALL))


def test_mean_of_certainty_is_the_bin():
    logits = jnp.where(jnp.eye(255) > 0, 0.0, -jnp.inf)
    np.testing.assert_allclose(decode(logits), BINS, rtol=1e-6)


@given(st.one_of(numbers, st.floats(-5, 5, width=32)))
def test_mean_inverts_two_hot(value):
    weights = encode(jnp.float32(value))
    logits = jnp.where(weights > 0, jnp.log(jnp.maximum(weights, 1e-30)), -jnp.inf)
    np.testing.assert_allclose(decode(logits), value, rtol=1e-4, atol=1e-6)


def test_mean_of_the_mirror_image_is_the_negative():
    logits = np.random.default_rng(0).standard_normal((8, 255)).astype(np.float32)
    mirror = np.concatenate([logits[:, 127:254], logits[:, :127], logits[:, 254:]], -1)
    np.testing.assert_allclose(decode(jnp.asarray(mirror)), -decode(jnp.asarray(logits)), rtol=1e-5)


def test_mean_wants_one_logit_per_bin():
    with pytest.raises(AssertionError):
        two_hot_mean(jnp.zeros((2, 254)), BINS)
