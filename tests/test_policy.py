"""The acting agent: whose parameters, whose state, and which action."""

import functools

import corridor
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_agent as tiny

from dreamerv3_jax import actions, policy, rssm
from dreamerv3_jax.types import Latent, PolicyState

COUNT = 4  # environments
DISCRETE, CONTINUOUS = 'button', 'move'


pytestmark = pytest.mark.usefixtures('quick_compilation')


@functools.cache
def compiled(mode):
    """`policy.act` of the tiny agent."""
    return jax.jit(
        functools.partial(
            policy.act,
            tiny.networks(),
            mode=mode,
            action_specs=tiny.ACTION_SPECS,
            config=tiny.CONFIG,
        )
    )


def state(seed=0):
    rng = np.random.default_rng(seed)
    config = tiny.CONFIG
    deter = jnp.asarray(rng.standard_normal((COUNT, config.deter)), jnp.float32)
    index = rng.integers(config.classes, size=(COUNT, config.stoch))
    action = {
        name: tiny.random_array(spec, (COUNT,), rng) for name, spec in tiny.ACTION_SPECS.items()
    }
    return PolicyState(Latent(deter, jax.nn.one_hot(index, config.classes)), action)


def act(params=None, state_=None, observation=None, first=(), seed=0, mode=False):
    is_first = np.isin(np.arange(COUNT), first)
    return compiled(mode)(
        tiny.parameters() if params is None else params,
        state() if state_ is None else state_,
        tiny.observations(COUNT) if observation is None else observation,
        is_first,
        jax.random.key(seed),
    )


def equal_rows(left, right, rows):
    rows = np.array(rows)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[rows], y[rows]), left, right)


def same(left, right, row):
    """Whether a row of all arrays is equal, for each of them."""
    return jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.all(x[row] == y[row])), left, right))


def distribution(params, latent):
    outputs = tiny.networks().actor(params['actor'], latent.deter, rssm.flat(latent.stoch))
    return actions.make_policy(outputs, tiny.ACTION_SPECS, tiny.CONFIG)


# Which action.


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_mode_is_the_most_probable_action(seed):
    params = tiny.perturbed(tiny.parameters(), seed=seed)
    (latent, previous), chosen, _ = act(params, seed=seed, mode=True)
    expected = actions.mode(distribution(params, latent))
    np.testing.assert_array_equal(chosen[DISCRETE], expected[DISCRETE])
    np.testing.assert_allclose(chosen[CONTINUOUS], expected[CONTINUOUS], rtol=1e-4, atol=1e-6)
    assert chosen.keys() == previous.keys()
    jax.tree.map(np.testing.assert_array_equal, previous, chosen)


def test_latents_and_actions_are_sampled_by_numbers_of_their_own(monkeypatch):
    taken = []
    observe_step, sample = rssm.observe_step, actions.sample

    def counted(key, shape):
        return (jnp.arange(np.prod(shape), dtype=jnp.float32) / np.prod(shape)).reshape(shape)

    def recorded_step(*arguments, unimix):
        taken.append(arguments[-1])
        return observe_step(*arguments, unimix=unimix)

    def recorded_sample(distribution, uniform):
        taken.append(uniform)
        return sample(distribution, uniform)

    monkeypatch.setattr(jax.random, 'uniform', counted)
    monkeypatch.setattr(rssm, 'observe_step', recorded_step)
    monkeypatch.setattr(actions, 'sample', recorded_sample)
    compiled.__wrapped__(False).__wrapped__(
        tiny.parameters(), state(), tiny.observations(COUNT), np.zeros(COUNT, bool), None
    )
    of_latents, of_actions = taken
    assert of_latents.shape == (COUNT, tiny.CONFIG.stoch)
    assert of_actions.shape == (COUNT, actions.components(tiny.ACTION_SPECS))
    both = np.concatenate(taken, -1)
    assert len(np.unique(both)) == both.size


def test_a_sample_is_not_the_mode():
    (latent, previous), chosen, _ = act()
    mean = distribution(tiny.parameters(), latent)[CONTINUOUS].mean
    # The least deviation is 0.1, so a sample hits the mean with probability 0.
    assert np.all(np.abs(chosen[CONTINUOUS] - mean) > 1e-6)
    jax.tree.map(np.testing.assert_array_equal, previous, chosen)
    assert np.any(act(seed=1)[1][CONTINUOUS] != chosen[CONTINUOUS])
    jax.tree.map(np.testing.assert_array_equal, act(), act())


def test_a_certain_policy_is_followed():
    # Means of +1 and -1 with the least deviation, 0.1: samples lie within six deviations.
    params = tiny.parameters()
    actor = dict(params['actor'])
    for name, bias in (('mean_move', [9.0, -9.0]), ('std_move', [-99.0, -99.0])):
        kernel = np.zeros_like(actor[name]['kernel'])
        actor[name] = {'kernel': kernel, 'bias': np.array(bias, np.float32)}
    params = {**params, 'actor': actor}
    chosen = act(params)[1][CONTINUOUS]
    np.testing.assert_allclose(chosen, np.tile([1.0, -1.0], (COUNT, 1)), atol=0.6)


# Whose state.


def test_environments_do_not_see_each_other():
    observation, noticed = tiny.observations(COUNT), []
    observation['vector'][1] *= -9
    observation['mode'][1] = 0
    for seed in range(10):
        before, after = act(seed=seed), act(observation=observation, seed=seed)
        equal_rows(before, after, (0, 2, 3))
        noticed.append(not all(same(before, after, 1)))
    assert any(noticed)  # by the environment itself
    before = act()
    other = state()
    other = other._replace(latent=other.latent._replace(deter=other.latent.deter.at[1].add(1.0)))
    other.action['move'][1] += 1
    equal_rows(before, act(state_=other), (0, 2, 3))
    equal_rows(before, act(first=[1]), (0, 2, 3))


@pytest.mark.parametrize('part', ['deter', 'stoch', 'action'])
def test_the_state_is_remembered_until_a_reset(part):
    other = state()
    if part == 'action':
        other.action['move'][2] += 0.5
    else:
        array = getattr(other.latent, part)
        other = other._replace(
            latent=other.latent._replace(**{part: array.at[2].set(jnp.roll(array[2], 1, -1))})
        )
    assert not same(act()[0].latent, act(state_=other)[0].latent, 2)[0]
    equal_rows(act(first=[2]), act(state_=other, first=[2]), range(COUNT))


def test_a_first_step_starts_from_nothing():
    blank = PolicyState(
        jax.tree.map(jnp.zeros_like, state().latent),
        actions.zero_actions(tiny.ACTION_SPECS, COUNT),
    )
    everywhere = range(COUNT)
    equal_rows(act(first=everywhere), act(state_=blank, first=everywhere), everywhere)
    # A zero action is a zero vector; a zero button among the actions would be a one-hot.
    assert not np.any(same(act(state_=blank)[0].latent, act(first=everywhere)[0].latent, 0)[:1])


def test_what_is_stored_is_the_new_state():
    after, _, stored = act()
    np.testing.assert_array_equal(stored.deter, after.latent.deter)
    np.testing.assert_array_equal(stored.stoch, after.latent.stoch.argmax(-1))
    assert np.any(stored.deter != state().latent.deter)


def test_acting_is_the_posterior_of_training():
    """Two steps of the policy give the latents that training infers from the same record."""
    params, observations = tiny.parameters(), [tiny.observations(COUNT, seed=i) for i in (0, 1)]
    first, chosen, _ = act(observation=observations[0], first=range(COUNT))
    second, _, _ = act(state_=first, observation=observations[1], seed=1)
    flat = actions.flatten_actions(chosen, tiny.ACTION_SPECS)
    tokens = tiny.networks().encoder(params['encoder'], observations[1])
    observed = rssm.observe(
        tiny.networks().dynamics,
        params['dynamics'],
        first.latent,
        flat[:, None],
        tokens[:, None],
        jnp.zeros((COUNT, 1), bool),
        None,
        unimix=tiny.CONFIG.unimix,
    )
    np.testing.assert_allclose(
        second.latent.deter, observed.latent.deter[:, 0], rtol=1e-4, atol=1e-5
    )


# Whose parameters.


def observe(seed):
    rng = np.random.default_rng(seed)
    return {
        'door': rng.integers(3, size=(COUNT, 1)).astype(np.int32),
        'room': rng.standard_normal((COUNT, 1)).astype(np.float32),
    }


def with_door(params, door):
    """Parameters whose actor always takes one door."""
    bias = np.where(np.arange(corridor.DOORS) == door, 1e4, 0).astype(np.float32)
    layer = {**params['actor']['logits_action'], 'bias': bias}
    return {**params, 'actor': {**params['actor'], 'logits_action': layer}}


@pytest.mark.parametrize('mode', [True, False])
def test_the_agent_acts_with_the_parameters_it_is_given(mode):
    agent = corridor.agent()
    params, start = agent.init(0).params, agent.initial_policy_state(COUNT)
    is_first = np.ones(COUNT, bool)
    doors = []
    for call, door in enumerate((0, 2, 1, 2)):
        _, chosen, _ = agent.policy(
            with_door(params, door), start, observe(0), is_first, seed=(0, call), mode=mode
        )
        doors.append(chosen['action'][:, 0].tolist())
    # A sample takes one of the other doors with probability 1 / 150: not the four environments at
    # once.
    most = [max(set(row), key=row.count) for row in doors]
    assert most == [0, 2, 1, 2]
    if mode:
        assert doors == [[door] * COUNT for door in most]


def test_the_agent_takes_the_mode_only_if_asked():
    agent = corridor.agent()
    params, now = agent.init(0).params, agent.initial_policy_state(COUNT)
    is_first = np.ones(COUNT, bool)
    sampled, modes = [], []
    for call in range(12):
        after, chosen, _ = agent.policy(params, now, observe(0), is_first, (0, call))
        sampled += chosen['action'][:, 0].tolist()
        after, chosen, _ = agent.policy(params, now, observe(0), is_first, (0, call), mode=True)
        outputs = agent.networks.actor(
            params['actor'], after.latent.deter, rssm.flat(after.latent.stoch)
        )
        modes += (chosen['action'][:, 0] == outputs['action'][0].argmax(-1)).tolist()
    # A fresh policy is uniform to a percent: 48 samples miss a door with probability 1e-8.
    assert set(sampled) == {0, 1, 2} and all(modes)


def test_samples_do_not_depend_on_the_generator_of_the_process():
    agent = corridor.agent()
    params, start = agent.init(0).params, agent.initial_policy_state(COUNT)
    chosen = []
    for generator in ('threefry2x32', 'rbg'):  # the latter has longer keys
        with jax.default_prng_impl(generator):
            chosen.append(agent.policy(params, start, observe(0), np.ones(COUNT, bool), (0, 7))[1])
    np.testing.assert_array_equal(chosen[0]['action'], chosen[1]['action'])


def test_seeds_decide_samples():
    agent = corridor.agent()
    params, start = agent.init(0).params, agent.initial_policy_state(COUNT)
    is_first = np.ones(COUNT, bool)
    results = [
        jax.device_get(agent.policy(params, start, observe(0), is_first, seed))
        for seed in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    for other in results[2:]:
        assert np.any(results[0][2].stoch != other[2].stoch)
