"""Distributions over structured actions, and the flat vector that the world model sees."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from tiny_agent import ACTION_SPECS, CONFIG

from dreamerv3_jax import actions
from dreamerv3_jax.spaces import ArraySpec

WITHOUT_UNIMIX = dataclasses.replace(CONFIG, unimix=0.0)
BUTTONS = jnp.log(jnp.array([0.25, 0.25, 0.5, 0.75, 0.25]))  # three classes, then two


def outputs(count=1, buttons=BUTTONS, mean=(0.0, 0.0), std=(0.0, 0.0)):
    """What the actor gives for `button` (3 and 2 classes) and `move` (2 numbers)."""
    rows = (jnp.tile(jnp.asarray(x, jnp.float32)[None], (count, 1)) for x in (buttons, mean, std))
    logits, mean, std = rows
    return {'button': (logits,), 'move': (mean, std)}


def policy(config=CONFIG, **kwargs):
    return actions.make_policy(outputs(**kwargs), ACTION_SPECS, config)


def test_components_may_have_unequal_classes():
    first, second = policy(WITHOUT_UNIMIX)['button'].log_probs
    np.testing.assert_allclose(jnp.exp(first), [[0.25, 0.25, 0.5]], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(second), [[0.75, 0.25]], rtol=1e-5)


def test_one_percent_is_uniform():
    first, second = policy(buttons=[0.0, 1e5, 0.0, 1e5, 0.0])['button'].log_probs
    np.testing.assert_allclose(jnp.exp(first), [[0.01 / 3, 0.99 + 0.01 / 3, 0.01 / 3]], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(second), [[0.995, 0.005]], rtol=1e-5)


def test_continuous_policy_by_hand():
    # tanh(0.5493) = 0.5; 0.9 sigmoid(2) + 0.1 = 0.9 * 0.880797 + 0.1 = 0.892717; sigmoid(-2 + 2) =
    # 1/2.
    part = policy(mean=[np.log(3) / 2, 0.0], std=[0.0, -2.0])['move']
    np.testing.assert_allclose(part.mean, [[0.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(part.std, [[0.892717, 0.55]], rtol=1e-6)


def test_continuous_policy_keeps_its_bounds():
    part = policy(mean=[1e4, -1e4], std=[1e4, -1e4])['move']
    np.testing.assert_allclose(part.mean, [[1, -1]])
    np.testing.assert_allclose(part.std, [[1.0, 0.1]], rtol=1e-6)


def test_mode_by_hand():
    mode = actions.mode(policy(mean=[np.log(3) / 2, -1e4]))
    assert mode['button'].tolist() == [[2, 0]] and mode['button'].dtype == jnp.int32
    np.testing.assert_allclose(mode['move'], [[0.5, -1.0]], rtol=1e-6)


def test_sample_of_certainty_is_the_mode():
    certain = policy(WITHOUT_UNIMIX, count=50, buttons=[0.0, 0.0, 1e5, -1e5, 0.0])
    sample = actions.sample(certain, jax.random.uniform(jax.random.key(0), (50, 4)))
    assert sample['button'].dtype == jnp.int32 and sample['move'].dtype == jnp.float32
    assert sample['button'].shape == sample['move'].shape == (50, 2)
    np.testing.assert_array_equal(sample['button'], np.tile([2, 1], (50, 1)))


def test_sample_has_the_frequencies_of_the_policy():
    count = 4000
    uniform = jax.random.uniform(jax.random.key(1), (count, 4))
    sample = actions.sample(policy(WITHOUT_UNIMIX, count=count), uniform)
    for component, probs in enumerate([np.array([0.25, 0.25, 0.5]), np.array([0.75, 0.25])]):
        counts = np.bincount(sample['button'][:, component], minlength=len(probs))
        # Within five deviations whatever the key.
        assert np.all(np.abs(counts - count * probs) < 5 * np.sqrt(count * probs * (1 - probs)))
    # Continuous actions are not clipped: with a deviation of 0.89 a quarter lies beyond 1.
    assert np.mean(np.abs(sample['move']) > 1) > 0.15
    # Components are independent of one another.
    both = np.concatenate([sample['button'], sample['move']], -1).T
    assert np.all(np.abs(np.corrcoef(both) - np.eye(4)) < 0.1)


def test_log_prob_sums_over_all_components():
    # ln 1/2 + ln 1/4, and of two standard deviations 0.55 the values 0 and 0.55 with mean 0:
    # -2 ln 0.55 - ln(2 pi) - 1/2.
    chosen = {'button': jnp.array([[2, 1]]), 'move': jnp.array([[0.0, 0.55]])}
    value = actions.log_prob(policy(WITHOUT_UNIMIX, std=[-2.0, -2.0]), chosen)
    expected = np.log(1 / 8) - 2 * np.log(0.55) - np.log(2 * np.pi) - 0.5
    np.testing.assert_allclose(value, [expected], rtol=1e-5)


def test_log_prob_of_all_actions_sums_to_one():
    every = jnp.array([[i, j] for i in range(3) for j in range(2)])
    value = actions.log_prob({'button': policy(count=6)['button']}, {'button': every})
    np.testing.assert_allclose(jnp.exp(value).sum(), 1, rtol=1e-5)


def test_log_prob_is_reinforce():
    # No gradient passes the sampled action.
    def value(mean):
        part = policy(mean=mean)
        chosen = {'button': jnp.zeros((1, 2), int), 'move': part['move'].mean + 0.5}
        return actions.log_prob(part, chosen)[0]

    assert np.all(jax.grad(value)(jnp.array([0.1, 0.2])) > 0.1)


def test_entropy_sums_over_all_components():
    # Of (1/4, 1/4, 1/2): 3/2 ln 2; of (3/4, 1/4): 2 ln 2 - 3/4 ln 3; of the normals each
    # 1/2 ln(2 pi e) + ln 0.55.
    value = actions.entropy(policy(WITHOUT_UNIMIX, std=[-2.0, -2.0]))
    expected = 3.5 * np.log(2) - 0.75 * np.log(3) + np.log(2 * np.pi * np.e) + 2 * np.log(0.55)
    np.testing.assert_allclose(value, [expected], rtol=1e-5)


def test_entropy_is_largest_for_the_uniform_policy():
    uniform = actions.entropy({'button': policy(buttons=jnp.zeros(5))['button']})
    np.testing.assert_allclose(uniform, [np.log(6)], rtol=1e-5)


def test_flat_actions_by_hand():
    specs = {
        'z': ArraySpec('continuous', (2,)),
        'a': ArraySpec('discrete', (2,), (3, 2)),
        'm': ArraySpec('continuous', (1,)),
    }
    values = {
        'z': jnp.array([[2.0, -0.5]]),
        'm': jnp.array([[-4.0]]),
        'a': jnp.array([[2, 0]]),
    }
    # Sorted names: a as one-hots of three and two, m, z; numbers beyond 1 in magnitude count as 1.
    flat = actions.flatten_actions(values, specs)
    np.testing.assert_array_equal(flat, [[0, 0, 1, 1, 0, -1, 1, -0.5]])
    assert flat.dtype == jnp.float32


@given(st.floats(-1e6, 1e6, width=32, allow_subnormal=False))
def test_flat_actions_are_what_the_environment_executes(value):
    specs = {'action': ArraySpec('continuous', (1,))}
    flat = actions.flatten_actions({'action': jnp.array([[[value]]])}, specs)
    np.testing.assert_allclose(flat, np.clip([[[value]]], -1, 1), rtol=1e-6)


def test_no_gradient_through_the_divisor():
    specs = {'action': ArraySpec('continuous', (3,))}
    gradient = jax.grad(lambda x: actions.flatten_actions({'action': x}, specs).sum())
    # a / max(1, |a|) with the divisor held: 1, 1 / 4, 1 / 2.
    np.testing.assert_allclose(gradient(jnp.array([0.5, 4.0, -2.0])), [1, 0.25, 0.5])


def test_zero_actions():
    zero = actions.zero_actions(ACTION_SPECS, 3)
    assert {name: (x.shape, str(x.dtype)) for name, x in zero.items()} == {
        'button': ((3, 2), 'int32'),
        'move': ((3, 2), 'float32'),
    }
    assert not any(np.any(x) for x in zero.values())
