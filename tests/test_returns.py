"""Lambda-returns: by hand, against a slow loop written from the definition, and degenerate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamerv3_jax.returns import lambda_returns, replay_lambda_returns, trajectory_weights

ROWS, DISCOUNT = 50, 1 - 1 / 333
lengths = pytest.mark.parametrize('length', [1, 2, 15])


@jax.jit
def compiled(reward, continue_, value, lambda_):
    return lambda_returns(reward, continue_, value, lambda_=lambda_)


@jax.jit
def compiled_replay(reward, is_last, is_terminal, bootstrap, discount, lambda_):
    return replay_lambda_returns(
        reward, is_last, is_terminal, bootstrap, discount=discount, lambda_=lambda_
    )


def slow_lambda_returns(reward, continue_, value, lambda_):
    """`R_t` of one trajectory whose arrays start at t = 0."""

    def future(t):
        if t == len(value) - 1:
            return value[t]
        longer = (1 - lambda_) * value[t + 1] + lambda_ * future(t + 1)
        return reward[t + 1] + continue_[t + 1] * longer

    return [future(t) for t in range(len(value) - 1)]


def slow_replay_returns(reward, is_last, is_terminal, bootstrap, discount, lambda_):
    def future(t):
        if t == len(reward) - 1:
            return bootstrap[t]
        if is_terminal[t + 1]:
            return reward[t + 1]  # nothing comes after death
        if is_last[t + 1]:
            return reward[t + 1] + discount * bootstrap[t + 1]  # a time limit is no death
        longer = (1 - lambda_) * bootstrap[t + 1] + lambda_ * future(t + 1)
        return reward[t + 1] + discount * longer

    return [future(t) for t in range(len(reward) - 1)]


def test_lambda_returns_by_hand():
    # R_2 = 8. R_1 = 3 + 0.5 (0.5 * 8 + 0.5 * 8) = 7. R_0 = 2 + 0.25 (0.5 * 4 + 0.5 * 7) = 3.375.
    result = lambda_returns(
        jnp.array([[99.0, 2, 3]]),
        jnp.array([[0.9, 0.25, 0.5]]),
        jnp.array([[77.0, 4, 8]]),
        lambda_=0.5,
    )
    np.testing.assert_allclose(result, [[3.375, 7.0]])


@lengths
def test_lambda_returns_equal_a_slow_loop(length):
    rng = np.random.default_rng(length)
    reward, value = rng.standard_normal((2, ROWS, length + 1)).astype(np.float32)
    continue_ = rng.uniform(0, 1, (ROWS, length + 1)).astype(np.float32)
    for lambda_ in (0.0, 0.5, 0.95, 1.0):
        expected = [
            slow_lambda_returns(*row, lambda_) for row in zip(reward, continue_, value, strict=True)
        ]
        actual = compiled(reward, continue_, value, lambda_)
        assert actual.shape == (ROWS, length) and actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_lambda_returns_do_not_look_at_the_start():
    # The start's reward is the consequence of an action before it, and its value is what is
    # learned.
    reward, continue_, value = jnp.array([[[1.0, 2, 3]], [[0.9, 0.8, 0.7]], [[4.0, 5, 6]]])
    result = compiled(reward, continue_, value, 0.95)
    changed = (x.at[:, 0].set(jnp.nan) for x in (reward, continue_, value))
    np.testing.assert_array_equal(compiled(*changed, 0.95), result)


def test_lambda_returns_of_one_step_and_of_all():
    reward, continue_, value = jnp.array(
        [[[0.0, 1, 2, 3]], [[0.0, 0.5, 0.5, 0.5]], [[0.0, 8, 16, 24]]]
    )
    # Lambda 0: r + c v. Lambda 1: the discounted sum of rewards and the last value,
    # R_2 = 3 + 0.5 * 24 = 15, R_1 = 2 + 0.5 * 15 = 9.5, R_0 = 1 + 0.5 * 9.5 = 5.75.
    np.testing.assert_allclose(compiled(reward, continue_, value, 0.0), [[5, 10, 15]])
    np.testing.assert_allclose(compiled(reward, continue_, value, 1.0), [[5.75, 9.5, 15]])


def test_lambda_returns_of_a_trajectory_that_ends():
    reward, value = jnp.array([[[9.0, 1, 2]], [[9.0, 5, 5]]])
    result = compiled(reward, jnp.zeros((1, 3)), value, 0.95)
    np.testing.assert_array_equal(result, [[1, 2]])


def test_lambda_returns_are_linear_in_rewards_and_values():
    rng = np.random.default_rng(0)
    reward, value, reward_2, value_2 = jnp.asarray(rng.standard_normal((4, 3, 6)), jnp.float32)
    continue_ = jnp.asarray(rng.uniform(0, 1, (3, 6)), jnp.float32)
    left = compiled(reward + 2 * reward_2, continue_, value + 2 * value_2, 0.9)
    first = compiled(reward, continue_, value, 0.9)
    second = compiled(reward_2, continue_, value_2, 0.9)
    np.testing.assert_allclose(left, first + 2 * second, rtol=1e-4, atol=1e-5)


def replay(reward, is_last, is_terminal, bootstrap, discount=0.5, lambda_=0.5):
    arrays = (jnp.array([x]) for x in (reward, is_last, is_terminal, bootstrap))
    return compiled_replay(*arrays, discount, lambda_)[0]


def test_replay_returns_by_hand():
    # R_2 = b_2 = 8. R_1 = 2 + 0.5 (0.5 * 8 + 0.5 * 8) = 6. R_0 = 1 + 0.5 (0.5 * 4 + 0.5 * 6) = 3.5.
    never = [False] * 3
    np.testing.assert_allclose(replay([9.0, 1, 2], never, never, [9.0, 4, 8]), [3.5, 6.0])


def test_termination_does_not_bootstrap_and_truncation_does():
    last, never = [False, True, False], [False] * 3
    reward, bootstrap = [9.0, 1, 2], [9.0, 4, 8]
    # Death at step 1: the reward is all. A time limit: 1 + 0.5 * 4 = 3, with the bootstrap of the
    # step itself; what comes after belongs to another episode.
    assert replay(reward, last, last, bootstrap)[0] == 1.0
    assert replay(reward, last, never, bootstrap)[0] == 3.0
    assert replay([9.0, 1, 50], last, never, [9.0, 4, 70])[0] == 3.0


def test_replay_returns_do_not_look_at_the_first_step():
    flags = jnp.array([[True, False, False]]), jnp.array([[True, False, False]])
    reward, bootstrap = jnp.array([[[1.0, 2, 3]], [[4.0, 5, 6]]])
    result = compiled_replay(reward, *flags, bootstrap, 0.9, 0.9)
    reward, bootstrap = (x.at[:, 0].set(jnp.nan) for x in (reward, bootstrap))
    flags = [jnp.zeros((1, 3), bool)] * 2
    other = compiled_replay(reward, *flags, bootstrap, 0.9, 0.9)
    np.testing.assert_array_equal(result, other)


@lengths
def test_replay_returns_equal_a_slow_loop(length):
    rng = np.random.default_rng(length)
    reward, bootstrap = rng.standard_normal((2, ROWS, length + 1)).astype(np.float32)
    is_last = rng.uniform(size=(ROWS, length + 1)) < 0.3
    is_terminal = is_last & (rng.uniform(size=(ROWS, length + 1)) < 0.5)
    arrays = (reward, is_last, is_terminal, bootstrap)
    for lambda_ in (0.0, 0.5, 0.95, 1.0):
        expected = [
            slow_replay_returns(*row, DISCOUNT, lambda_) for row in zip(*arrays, strict=True)
        ]
        actual = compiled_replay(*arrays, DISCOUNT, lambda_)
        assert actual.shape == (ROWS, length) and actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_replay_returns_without_an_end_are_imagined_returns():
    rng = np.random.default_rng(1)
    reward, bootstrap = jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32)
    never = jnp.zeros((3, 8), bool)
    np.testing.assert_allclose(
        compiled_replay(reward, never, never, bootstrap, 0.9, 0.95),
        compiled(reward, jnp.full((3, 8), 0.9), bootstrap, 0.95),
        rtol=1e-5,
    )


def test_weights_by_hand():
    # The start's own continue prediction counts.
    weights = trajectory_weights(jnp.array([[0.5, 0.5, 0.8], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(weights, [[0.5, 0.25, 0.2], [1, 1, 1]], rtol=1e-6)


def test_trajectories_from_a_terminal_start_have_no_weight():
    weights = trajectory_weights(jnp.array([[0.0, 1.0, 1.0], [1e-3, 0.9, 0.9]]))
    assert not np.any(weights[0]) and np.all(weights[1] <= 1e-3)


@lengths
def test_weights_fall_and_compose(length):
    continue_ = np.random.default_rng(0).uniform(0, 1, (ROWS, length)).astype(np.float32)
    weights = np.asarray(trajectory_weights(jnp.asarray(continue_)))
    assert weights.shape == continue_.shape and np.all(np.diff(weights) <= 0)
    np.testing.assert_allclose(weights[:, 1:], weights[:, :-1] * continue_[:, 1:], rtol=1e-5)
    np.testing.assert_array_equal(weights[:, 0], continue_[:, 0])


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        lambda_returns(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 2)), lambda_=0.95)
    with pytest.raises(AssertionError):
        lambda_returns(*[jnp.zeros(3)] * 3, lambda_=0.95)
    with pytest.raises(AssertionError):
        replay_lambda_returns(*[jnp.zeros((2, 3, 1))] * 4, discount=0.9, lambda_=0.95)
    with pytest.raises(AssertionError):
        trajectory_weights(jnp.zeros(3))


def test_gradients_are_those_of_the_definition():
    # dR_0 / dr_2 = c_1 lambda; dR_0 / dr_1 = 1; the first reward has none.
    continue_, value = jnp.full((1, 3), 0.8), jnp.zeros((1, 3))
    gradient = jax.grad(lambda reward: compiled(reward, continue_, value, 0.5)[0, 0])(value)
    np.testing.assert_allclose(gradient, [[0, 1, 0.4]], rtol=1e-6)
