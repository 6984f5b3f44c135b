"""The quickstart's own environment: what it asks for cannot be had by chance."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dreamerv3_jax import envs  # noqa: F401 (registers the environment)


@pytest.fixture
def env():
    with gymnasium.make('Hover-v0', render_mode='rgb_array') as env:
        yield env


def mean_return(env, policy, episodes=50):
    """Plays with `policy`, which maps a height to an action."""
    total = 0.0
    for seed in range(episodes):
        env.reset(seed=seed)
        done = False
        while not done:
            action = policy(env.unwrapped._height)
            _, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
    return total / episodes


def height_seen(observation):
    """Reads the height, in pixels from the top, as the middle of what is bright."""
    weights = observation[..., 0].astype(float).sum(1) - 40 * 48
    return weights @ (np.arange(48) + 0.5) / weights.sum()


def test_follows_the_interface(env):
    check_env(env.unwrapped)  # warnings are errors
    assert env.spec.max_episode_steps == 200


def test_random_play_crashes(env):
    rng = np.random.default_rng(0)
    assert 40 < mean_return(env, lambda _: rng.integers(2)) < 56


@pytest.mark.parametrize('action', [0, 1])
def test_one_action_alone_crashes_at_once(env, action):
    assert mean_return(env, lambda _: action) < 20


def test_pushing_towards_the_middle_solves_it(env):
    assert mean_return(env, lambda height: int(height < 0)) == 200


def test_time_limit_is_no_death(env):
    env.reset(seed=0)
    for _ in range(200):
        _, _, terminated, truncated, _ = env.step(int(env.unwrapped._height < 0))
    assert truncated and not terminated


def test_picture_shows_the_height(env):
    observation, _ = env.reset(seed=0)
    for action in (1, 1, 0, 0, 0, 0, 0):
        expected = 24 - 20 * env.unwrapped._height
        assert height_seen(observation) == pytest.approx(expected, abs=0.02)
        observation = env.step(action)[0]
    assert observation.min() == 40 and observation.max() == 240


def test_drawing_for_people(env):
    env.reset(seed=0)
    env.step(1)
    flying = env.render()
    assert flying.shape == (384, 384, 3) and flying.dtype == np.uint8
    env.unwrapped._up = False
    falling = env.render()
    changed = np.argwhere((flying != falling).any(-1))
    assert len(changed)  # the flame, under the drone
    assert changed[:, 0].min() >= 8 * (24 - 20 * env.unwrapped._height) - 1
