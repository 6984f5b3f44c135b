"""The agent as a library, for many kinds of observations and actions."""

import dataclasses
import doctest
import functools

import gymnasium
import jax
import numpy as np
import pytest
import tiny_runs
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from dreamerv3_jax import agent as agent_module
from dreamerv3_jax import sharding, update
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.spaces import ActionAdapter, ObservationAdapter

VECTOR = Box(-np.inf, np.inf, (4,), np.float32)
MOVE = Box(-2.0, 2.0, (3,), np.float32)
SPACES = {
    'vector to choice': (VECTOR, Discrete(2)),
    'choice to vector': (Discrete(5, start=-2), MOVE),
    'choices to choices': (MultiDiscrete([3, 2, 5]), MultiDiscrete([2, 4, 3])),
    'bits to bits': (MultiBinary(3), MultiBinary(2)),
    'matrix to matrix': (Box(-1, 1, (2, 3), np.float64), Box(-1, 1, (2, 2), np.float32)),
    'image': (Box(0, 255, (48, 80, 3), np.uint8), Discrete(3, start=1)),
    'nested': (
        Dict({'body': Tuple((VECTOR, Discrete(3))), 'goal': Dict({'place': Box(0, 1, (2,))})}),
        Tuple((Discrete(4), Dict({'a': MOVE, 'b': MultiDiscrete([2, 3])}))),
    ),
    'images': (
        Dict(
            {
                'left': Box(0, 255, (48, 64, 3), np.uint8),
                'right': Box(0, 255, (48, 64), np.uint8),  # without channels
                'speed': Box(-1, 1, (1,), np.float32),
                'mode': Discrete(3),
            }
        ),
        Dict({'steer': MOVE, 'gear': Discrete(3), 'lights': MultiDiscrete([2, 3])}),
    ),
}
REAL = ('images',)  # is really trained; the others are only traced
COUNT = 3


pytestmark = pytest.mark.usefixtures('quick_compilation')


@functools.cache
def make_agent(name):
    return Agent.from_spaces(*SPACES[name], tiny_runs.agent_config())


@functools.cache
def batch(name, seed=0):
    agent = make_agent(name)
    return tiny_runs.random_batch(agent.observation_specs, agent.action_specs, seed)


def random_params(agent):
    rng = np.random.default_rng(0)
    params = jax.eval_shape(lambda: agent.init(0)).params
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), params)


def assert_like(result, expected):
    """Compares the structure, the shapes and the dtypes of two trees."""
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.medium
@pytest.mark.parametrize('name', SPACES)
def test_policy_acts_in_the_space(name):
    agent, (observation_space, action_space) = make_agent(name), SPACES[name]
    observation_space.seed(0)
    observations, actions = ObservationAdapter(observation_space), ActionAdapter(action_space)
    params, state = random_params(agent), agent.initial_policy_state(COUNT)
    is_first = np.ones(COUNT, bool)
    for tick in range(2):
        rows = [observations.convert(observation_space.sample()) for _ in range(COUNT)]
        flat = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        before = state
        state, chosen, latent = agent.policy(params, state, flat, is_first, (0, tick))
        is_first = np.zeros(COUNT, bool)
        assert_like(state, before)
        assert latent.deter.shape == (COUNT, 32) and latent.deter.dtype == np.float32
        assert latent.stoch.shape == (COUNT, 4) and latent.stoch.dtype == np.uint8
        assert list(chosen) == sorted(actions.specs)
        for key, spec in actions.specs.items():
            assert chosen[key].shape == (COUNT, *spec.shape)
            assert chosen[key].dtype == spec.dtype
        chosen = jax.device_get(chosen)
        for row in range(COUNT):
            assert action_space.contains(actions.convert(chosen, row))


@pytest.mark.medium
@pytest.mark.parametrize('name', SPACES)
def test_update_keeps_shapes_and_types(name):
    agent = make_agent(name)
    state = jax.eval_shape(lambda: agent.init(0))
    new, latents, metrics = jax.eval_shape(agent.pure_update, state, batch(name))
    assert_like(new, state)
    assert {x.dtype for x in jax.tree.leaves(new.params)} == {np.dtype('float32')}
    leading = (tiny_runs.SEQUENCES, tiny_runs.STEPS)
    assert latents.deter.shape == (*leading, 32) and latents.deter.dtype == np.float32
    assert latents.stoch.shape == (*leading, 4) and latents.stoch.dtype == np.uint8
    assert {(x.shape, str(x.dtype)) for x in metrics.values()} == {((), 'float32')}
    for key in agent.observation_specs:
        assert f'loss/reconstruction/{key}' in metrics


@pytest.mark.medium
@pytest.mark.parametrize('name', REAL)
def test_updates(name, monkeypatch):
    traces = []

    def count(part):
        original = getattr(update, part)
        monkeypatch.setattr(
            update, part, lambda *args, **options: traces.append(part) or original(*args, **options)
        )

    count('compute_gradients')
    count('apply_gradients')
    agent = Agent.from_spaces(*SPACES[name], tiny_runs.agent_config())
    state = agent.init(seed=0)
    first = jax.tree.map(np.array, state)  # copies: a view of a buffer would keep it alive
    for seed in range(3):
        before = state
        state, latents, metrics = agent.update(before, batch(name, seed))
        # Donated: its buffers hold the new state now.
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        assert all(np.isfinite(value) for value in metrics.values())
        assert np.isfinite(latents.deter).all() and np.max(latents.stoch) < 4
    assert traces == ['compute_gradients', 'apply_gradients']
    assert int(state.updates) == 3
    assert_like(state, first)
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), first.params, state.params)
    for network, tree in changed.items():
        assert any(jax.tree.leaves(tree)), f'nothing in {network} was trained'
    longer = jax.tree.map(lambda x: np.concatenate([x, x]), batch(name))
    with pytest.raises((TypeError, ValueError)):
        agent.update(state, longer)
    state, _, _ = agent.update(state, batch(name))
    assert traces == ['compute_gradients', 'apply_gradients']
    assert int(state.updates) == 4


def test_initialization():
    agent = make_agent('vector to choice')
    state, other = agent.init(0), agent.init(1)
    kernel = state.params['dynamics']['deter_in']['linear']['kernel']
    assert np.any(kernel != other.params['dynamics']['deter_in']['linear']['kernel'])
    for value, slow in zip(
        jax.tree.leaves(state.params['critic']), jax.tree.leaves(state.slow_critic), strict=True
    ):
        np.testing.assert_array_equal(value, slow)
    assert agent.mesh.size == 1
    assert {len(x.devices()) for x in jax.tree.leaves(state)} == {1}
    counts = agent.parameter_counts()
    assert counts.keys() == state.params.keys()
    for network, tree in state.params.items():
        assert counts[network] == sum(x.size for x in jax.tree.leaves(tree))


def test_mode_is_the_most_probable_action():
    """Without an input the actor's choice is its bias, whatever the sampled latent."""
    agent = make_agent('images')
    params = jax.tree.map(np.zeros_like, random_params(agent))
    actor = params['actor']
    actor['mean_steer']['bias'] = np.array([0.5, -1.0, 3.0], np.float32)
    actor['logits_gear']['bias'] = np.array([0.0, 0.1, 0.0], np.float32)
    actor['logits_lights']['bias'] = np.array([0.2, 0.1, 0.0, 0.0, 0.1], np.float32)
    observation = tiny_runs.random_arrays(
        agent.observation_specs, (COUNT,), np.random.default_rng(0)
    )
    state, is_first = agent.initial_policy_state(COUNT), np.ones(COUNT, bool)

    def act(seed, mode):
        result = agent.policy(params, state, observation, is_first, (0, seed), mode)
        return jax.device_get(result[1])

    for seed in range(2):
        chosen = act(seed, mode=True)
        np.testing.assert_allclose(
            chosen['steer'], np.tile(np.tanh([0.5, -1.0, 3.0]), (COUNT, 1)), rtol=1e-5
        )
        assert (chosen['gear'] == 1).all()
        assert (chosen['lights'] == [0, 2]).all()
    samples, others, again = act(0, mode=False), act(1, mode=False), act(0, mode=False)
    for key in samples:
        np.testing.assert_array_equal(samples[key], again[key])
    assert np.all(samples['steer'] != others['steer'])
    assert len(np.unique(samples['steer'])) == samples['steer'].size


def test_policy_forgets_at_first_steps():
    agent = make_agent('vector to choice')
    params, rng = random_params(agent), np.random.default_rng(0)
    blank = agent.initial_policy_state(COUNT)
    observation = tiny_runs.random_arrays(agent.observation_specs, (COUNT,), rng)
    used, _, _ = agent.policy(params, blank, observation, np.ones(COUNT, bool), (0, 0))
    is_first = np.array([True, False, True])
    after, _, _ = agent.policy(params, used, observation, is_first, (0, 1))
    fresh, _, _ = agent.policy(params, blank, observation, is_first, (0, 1))
    same = np.all(np.asarray(after.latent.deter) == np.asarray(fresh.latent.deter), -1)
    np.testing.assert_array_equal(same, is_first)


def test_mistakes():
    with pytest.raises(UserError, match='deter'):
        Agent.from_spaces(VECTOR, Discrete(2), tiny_runs.agent_config(deter=33))
    with pytest.raises(UserError, match='Text'):
        Agent.from_spaces(gymnasium.spaces.Text(3), Discrete(2), tiny_runs.agent_config())
    agent = Agent.from_spaces(
        VECTOR, Discrete(2), tiny_runs.agent_config(), mesh=sharding.make_mesh(data=3)
    )
    with pytest.raises(UserError, match='4 sequences does not divide among 3 devices'):
        agent.compile_update(tiny_runs.SEQUENCES, tiny_runs.STEPS)


def test_a_single_step_is_too_short():
    with pytest.raises(UserError, match='at least 2 steps'):
        make_agent('vector to choice').compile_update(tiny_runs.SEQUENCES, 1)


def test_precision_follows_the_devices_of_the_agent(monkeypatch):
    config = dataclasses.replace(
        AgentConfig.from_mapping(tiny_runs.agent_config()), compute_dtype='auto'
    )
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert Agent.from_spaces(VECTOR, MOVE, config).config.compute_dtype == 'float32'


@pytest.mark.medium
def test_example():
    results = doctest.testmod(agent_module)
    assert results.attempted and not results.failed
