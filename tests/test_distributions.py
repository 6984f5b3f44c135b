"""Categorical and normal distributions: by hand, at their limits, and their laws."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given

from dreamerv3_jax import distributions

logits_of_four = hnp.arrays(np.float32, (3, 4), elements=st.floats(-50, 50, width=32))
LOG = np.log


def test_unimix_by_hand():
    # Softmax of (0, ln 3) is (0.25, 0.75); 0.99 * 0.25 + 0.005 = 0.2525, 0.99 * 0.75 + 0.005 =
    # 0.7475.
    log_probs = distributions.unimix(jnp.array([0.0, LOG(3.0)]), 0.01)
    np.testing.assert_allclose(jnp.exp(log_probs), [0.2525, 0.7475], rtol=1e-6)


def test_unimix_of_certainty_leaves_one_percent():
    log_probs = distributions.unimix(jnp.array([0.0, 1e6, 0.0, 0.0]), 0.01)
    np.testing.assert_allclose(jnp.exp(log_probs), [0.0025, 0.9925, 0.0025, 0.0025], rtol=1e-5)


def test_unimix_of_nothing_is_the_softmax():
    logits = jnp.array([-1e6, 0.0, 2.0])
    np.testing.assert_allclose(distributions.unimix(logits, 0.0), jax.nn.log_softmax(logits))


@given(logits_of_four, st.floats(0, 1))
def test_unimix_is_normalised_and_bounded(logits, share):
    log_probs = distributions.unimix(jnp.asarray(logits), share)
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-5)
    assert np.all(jnp.exp(log_probs) >= share / 4 * (1 - 1e-5))
    np.testing.assert_allclose(
        jnp.exp(distributions.unimix(jnp.asarray(logits) + 7, share)), jnp.exp(log_probs), atol=1e-5
    )


def test_unimix_is_float32():
    log_probs = distributions.unimix(jnp.array([0.0, LOG(3.0)], jnp.bfloat16), 0.01)
    assert log_probs.dtype == jnp.float32


def test_categorical_sample_inverts_the_cumulative_distribution():
    # Probabilities 0.2, 0, 0.5, 0.3: class 0 below 0.2, class 2 below 0.7, class 3 above; class 1
    # never.
    log_probs = jnp.log(jnp.array([0.2, 0.0, 0.5, 0.3]))
    uniform = jnp.array([0.0, 0.1, 0.199, 0.201, 0.4, 0.699, 0.701, 0.9999])
    index = distributions.categorical_sample(uniform, jnp.broadcast_to(log_probs, (8, 4)))
    assert index.tolist() == [0, 0, 0, 2, 2, 2, 3, 3] and index.dtype == jnp.int32


@pytest.mark.parametrize('classes', [1, 2, 5])
def test_categorical_sample_of_certainty(classes):
    log_probs = jnp.where(jnp.eye(classes) > 0, 0.0, -jnp.inf)
    index = distributions.categorical_sample(jnp.linspace(0, 0.9999, classes), log_probs)
    assert index.tolist() == list(range(classes))


def test_categorical_sample_frequencies():
    probs = np.array([0.05, 0.6, 0.35])
    log_probs = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (10_000, 3))
    uniform = jax.random.uniform(jax.random.key(0), (10_000,))
    index = distributions.categorical_sample(uniform, log_probs)
    counts = np.bincount(index, minlength=3)
    # Within five deviations, sqrt(n p (1 - p)), whatever the key.
    assert np.all(np.abs(counts - 10_000 * probs) < 5 * np.sqrt(10_000 * probs * (1 - probs)))


def test_straight_through():
    one_hot = jnp.array([[0.0, 1.0, 0.0]])
    probs = jnp.array([[0.2, 0.5, 0.3]])
    np.testing.assert_allclose(distributions.straight_through(one_hot, probs), one_hot, atol=1e-7)
    # The gradient is that of the probabilities.
    weights = jnp.array([[2.0, -3.0, 5.0]])
    gradient = jax.grad(lambda p: jnp.sum(weights * distributions.straight_through(one_hot, p)))
    np.testing.assert_allclose(gradient(probs), weights)


def test_categorical_entropy_by_hand():
    # -(1/4 ln 1/4 + 3/4 ln 3/4) = ln 4 - 3/4 ln 3; uniform: ln 2.
    log_probs = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    expected = [LOG(4) - 0.75 * LOG(3), LOG(2)]
    np.testing.assert_allclose(distributions.categorical_entropy(log_probs), expected, rtol=1e-6)


@given(logits_of_four)
def test_categorical_entropy_is_bounded(logits):
    entropy = distributions.categorical_entropy(distributions.unimix(jnp.asarray(logits), 0.01))
    # Least for certainty with 1% uniform, 0.0525 nats of four classes; at most ln 4.
    assert np.all(entropy > 0.05) and np.all(entropy <= LOG(4) + 1e-5)


def test_categorical_kl_by_hand():
    # 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 3/4) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3; the other way
    # 1/4 ln 1/2 + 3/4 ln 3/2.
    half, quarter = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    kl = distributions.categorical_kl
    np.testing.assert_allclose(kl(half, quarter), 0.5 * LOG(4 / 3), rtol=1e-5)
    np.testing.assert_allclose(kl(quarter, half), 0.75 * LOG(1.5) - 0.25 * LOG(2), rtol=1e-5)


@given(logits_of_four, logits_of_four)
def test_categorical_kl_is_not_negative_and_unimix_bounds_it(logits_p, logits_q):
    log_p, log_q = (distributions.unimix(jnp.asarray(x), 0.01) for x in (logits_p, logits_q))
    kl = distributions.categorical_kl(log_p, log_q)
    assert np.all(kl >= -1e-5) and np.all(kl <= -LOG(0.01 / 4))
    np.testing.assert_array_equal(distributions.categorical_kl(log_p, log_p), 0)
    # KL = cross entropy - entropy.
    cross = -jnp.sum(jnp.exp(log_p) * log_q, -1)
    np.testing.assert_allclose(
        kl, cross - distributions.categorical_entropy(log_p), rtol=1e-4, atol=1e-5
    )


def test_categorical_log_prob():
    log_probs = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]))
    value = distributions.categorical_log_prob(log_probs, jnp.array([0, 1, 1]))
    np.testing.assert_allclose(value, LOG([0.25, 0.5, 0.9]), rtol=1e-5)
    with pytest.raises(AssertionError):
        distributions.categorical_log_prob(log_probs, jnp.array([[0, 1, 1]]))


def test_normal_log_prob_by_hand():
    # One deviation from the mean: -1/2 - ln 2 - 1/2 ln(2 pi).
    value = distributions.normal_log_prob(jnp.float32(1.0), jnp.float32(2.0), jnp.float32(3.0))
    np.testing.assert_allclose(value, -0.5 - LOG(2) - 0.5 * LOG(2 * np.pi), rtol=1e-6)


@given(st.floats(-5, 5), st.floats(0.1, 3), st.floats(-5, 5))
def test_normal_is_that_of_scipy(mean, std, value):
    mean, std, value = np.float32([mean, std, value])
    expected = scipy.stats.norm(mean, std)
    np.testing.assert_allclose(
        distributions.normal_log_prob(mean, std, value), expected.logpdf(value), rtol=1e-4
    )
    np.testing.assert_allclose(
        distributions.normal_entropy(std), expected.entropy(), rtol=1e-5, atol=1e-6
    )


@given(st.floats(0.1, 3))
def test_normal_entropy_is_the_mean_surprise(std):
    # E[(x - mean)^2] = std^2, so the mean surprise is the surprise one deviation off.
    std = np.float32(std)
    surprise = -distributions.normal_log_prob(np.float32(0), std, std)
    np.testing.assert_allclose(distributions.normal_entropy(std), surprise, rtol=1e-4, atol=1e-6)


def test_normal_sample_moves_and_scales():
    uniform = jax.random.uniform(jax.random.key(0), (4, 3))
    standard = distributions.normal_sample(uniform, jnp.zeros((4, 3)), jnp.ones((4, 3)))
    other = distributions.normal_sample(uniform, jnp.full((4, 3), 5.0), jnp.full((4, 3), 0.5))
    np.testing.assert_allclose(other, 5 + 0.5 * standard, rtol=1e-5)
    certain = distributions.normal_sample(uniform, jnp.full((4, 3), 5.0), jnp.zeros((4, 3)))
    np.testing.assert_array_equal(certain, 5)


def test_normal_sample_inverts_the_cumulative_distribution():
    # The median, one and two deviations; and the ends of what a generator draws, 0 and 1 - 2**-23.
    quantiles = np.array([0.5, 0.8413447, 0.15865526, 0.97724986, 0.0, 1 - 2.0**-23], np.float32)
    sample = distributions.normal_sample(quantiles, jnp.zeros(6), jnp.ones(6))
    np.testing.assert_allclose(sample[:4], [0, 1, -1, 2], rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(sample)) and -6 < sample[4] < -5 < 5 < sample[5] < 6
