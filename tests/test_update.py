"""The update: what changes, what stays, and in which precision."""

import dataclasses
import functools

import corridor
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_agent as tiny
from tiny_agent import ACTION_SPECS, OBSERVATION_SPECS

from dreamerv3_jax import losses as losses_lib
from dreamerv3_jax import update as update_lib
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Batch
from dreamerv3_jax.update import loss_scales

pytestmark = pytest.mark.usefixtures('quick_compilation')


def corridor_batch():
    shape = (8, 9)
    rng = np.random.default_rng(0)
    never = np.zeros(shape, bool)
    return Batch(
        observation={
            'door': rng.integers(3, size=(*shape, 1)).astype(np.int32),
            'room': rng.standard_normal((*shape, 1)).astype(np.float32),
        },
        action={'action': rng.integers(3, size=(*shape, 1)).astype(np.int32)},
        reward=rng.standard_normal(shape).astype(np.float32),
        is_first=never,
        is_last=never,
        is_terminal=never,
        deter=np.zeros((8, 32), np.float32),
        stoch=np.zeros((8, corridor.AGENT_CONFIG.stoch), np.uint8),
    )


def copied(tree):
    return jax.tree.map(np.array, tree)


@pytest.fixture(scope='module')
def updated():
    """States before and after two updates, and their latents and metrics."""
    state, states, results = corridor.agent().init(0), [], []
    for _ in range(2):
        states.append(copied(state))
        state, *rest = corridor.agent().update(state, corridor_batch())
        results.append(copied(rest))
    return [*states, copied(state)], results


def test_start_is_decided_by_the_seed():
    first, same, other = (copied(corridor.agent().init(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    kernels = [
        state.params[name]['mlp']['hidden_0']['linear']['kernel']
        for state, name in ((first, 'reward'), (other, 'reward'), (first, 'continue_'))
    ]
    assert np.any(kernels[0] != kernels[1])
    assert np.any(kernels[0] != kernels[2])  # networks of equal shape do not start alike


def test_slow_critic_starts_as_a_copy_and_follows(updated):
    first, second, third = updated[0]
    jax.tree.map(np.testing.assert_array_equal, first.slow_critic, first.params['critic'])
    rate = corridor.agent().config.slow_critic_rate
    assert rate == 0.02
    for before, after in ((first, second), (second, third)):
        expected = jax.tree.map(
            lambda slow, new: (1 - rate) * slow + rate * new,
            before.slow_critic,
            after.params['critic'],
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
            after.slow_critic,
            expected,
        )


def test_norms_are_those_of_the_update(updated):
    (_, second, third), ((_, first), (_, metrics)) = updated
    moved = jax.tree.map(np.subtract, third.params, second.params)
    for name, tree, rtol in ('parameter', third.params, 1e-5), ('update', moved, 1e-2):
        expected = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
        np.testing.assert_allclose(metrics[f'optimizer/{name}_norm'], expected, rtol=rtol)
    assert first['optimizer/update_norm'] == 0  # its learning rate is 0


def test_everything_learns(updated):
    first, second, third = updated[0]
    # The first update has learning rate 0, the second moves every array of every network.
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), second.params, third.params)
    still = [path for path, x in jax.tree_util.tree_leaves_with_path(moved) if not x]
    # Scales of layers whose output layer is still zero are the exception.
    assert {path[0].key for path in still} <= {'reward', 'critic'}, still
    assert all(np.any(x) for x in jax.tree.leaves(moved['dynamics']))


def test_an_update_keeps_all_shapes_and_dtypes(updated):
    first, _, third = updated[0]
    jax.tree.map(
        lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), first, third
    )
    assert {x.dtype for x in jax.tree.leaves((third.params, third.slow_critic))} == {
        np.dtype('float32')
    }
    stored, metrics = updated[1][1]
    assert stored.deter.shape == (8, 8, 32)
    assert stored.stoch.shape == (8, 8, corridor.AGENT_CONFIG.stoch)
    for name, value in metrics.items():
        assert value.shape == () and value.dtype == np.float32 and np.isfinite(value), name


def test_updates_are_counted_and_draw_new_keys(updated):
    assert [int(state.updates) for state in updated[0]] == [0, 1, 2]
    keys = {tuple(jax.random.key_data(state.key()).tolist()) for state in updated[0]}
    assert len(keys) == 3
    # The parameters are those of before, the samples are not.
    first, second = (metrics for _, metrics in updated[1])
    assert first['loss/continue'] != second['loss/continue']


def test_updates_repeat_bit_for_bit(updated):
    state = jax.device_put(updated[0][1])
    state, *rest = corridor.agent().update(state, corridor_batch())
    jax.tree.map(
        np.testing.assert_array_equal, copied((state, *rest)), (updated[0][2], *updated[1][1])
    )


def test_percentiles_are_kept(updated):
    for state, (_, metrics) in zip(updated[0][1:], updated[1], strict=True):
        assert state.percentiles.low == metrics['return/low']
        assert state.percentiles.high == metrics['return/high']


# Numbers that go wrong.

LOSSES = [
    'actor', 'continue', 'critic', 'dynamics', 'reconstruction/door', 'reconstruction/room',
    'replay_critic', 'representation', 'reward',
]  # fmt: skip
GRADIENT = len(LOSSES)  # behind all losses


def poison(losses, number):
    """Makes the loss of this number NaN, or for GRADIENT the gradient of the first one infinite."""
    spoilt = {
        name: loss * jnp.where(LOSSES.index(name) == number, jnp.nan, 1.0)
        for name, loss in losses.items()
    }
    name, loss = next(iter(losses.items()))
    spoilt[name] += jnp.sqrt(jnp.where(number == GRADIENT, 0.0, 1.0) * (1 + jnp.square(loss)))
    return spoilt


@pytest.fixture(scope='module')
def fragile():
    """An agent of which the number in the first reward spoils a loss."""

    def spoil(function):
        def spoilt(*arguments, **options):
            (batch,) = (argument for argument in arguments if isinstance(argument, Batch))
            result = function(*arguments, **options)
            return result._replace(losses=poison(result.losses, batch.reward[0, 0]))

        return spoilt

    with pytest.MonkeyPatch.context() as patch:
        for name in ('world_model_losses', 'actor_critic_losses'):
            patch.setattr(update_lib, name, spoil(getattr(update_lib, name)))
        agent = Agent(corridor.OBSERVATION_SPECS, corridor.ACTION_SPECS, corridor.AGENT_CONFIG)
        agent.compile_update(8, 8)
    return agent


def fragile_batch(number):
    batch = corridor_batch()
    batch.reward[0, 0] = number
    return batch


def test_all_losses_are_spoilt_below():
    assert LOSSES == sorted(loss_scales(corridor.OBSERVATION_SPECS, corridor.AGENT_CONFIG))


@pytest.mark.medium
@pytest.mark.parametrize('number', range(len(LOSSES) + 1))
def test_an_update_that_is_not_finite_changes_nothing(number, fragile):
    state = fragile.init(0)
    for _ in range(2):  # the first has rate 0, and leaves the slow critic where the critic is
        state, _, metrics = fragile.update(state, fragile_batch(-1))
        assert metrics['optimizer/skipped'] == 0
    before = copied(state)
    state, _, metrics = fragile.update(state, fragile_batch(number))
    spoilt = {name for name in LOSSES if not np.isfinite(metrics[f'loss/{name}'])}
    assert metrics['optimizer/skipped'] == 1 and spoilt == set(LOSSES[number : number + 1])
    assert np.isfinite(metrics['loss/total']) == (number == GRADIENT)
    assert state.updates == 3  # so that the next one draws other keys
    jax.tree.map(
        np.testing.assert_array_equal, copied(state.replace(updates=before.updates)), before
    )
    state, _, metrics = fragile.update(state, fragile_batch(-1))
    assert metrics['optimizer/skipped'] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(copied(state)))


# Memory.


@pytest.mark.medium
def test_remat_changes_no_number(updated):
    config = dataclasses.replace(corridor.AGENT_CONFIG, remat=True)
    agent = Agent(corridor.OBSERVATION_SPECS, corridor.ACTION_SPECS, config)
    state = agent.init(0)
    for expected_state, expected in zip(updated[0][1:], updated[1], strict=True):
        state, *results = agent.update(state, corridor_batch())
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), results, expected)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            (state.params, state.slow_critic),
            (expected_state.params, expected_state.slow_critic),
        )
    # And it does something: every network of which there is a gradient is marked.
    marks = {}
    for name, one in {'kept': corridor.agent(), 'again': agent}.items():
        program = jax.make_jaxpr(one.pure_update)(jax.eval_shape(lambda: state), corridor_batch())
        marks[name] = str(program).count('prevent_cse=True')
    assert marks['kept'] == 0 and marks['again'] >= 7


# Half precision.


def test_bfloat16_is_inside_only():
    agent = Agent(OBSERVATION_SPECS, ACTION_SPECS, tiny.config(compute_dtype='bfloat16'))
    state = jax.eval_shape(lambda: agent.init(0))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            'two_hot_loss',
            'continue_loss',
            'continuous_loss',
            'discrete_loss',
            'critic_loss',
        ):
            function = getattr(losses_lib, name)

            def recorded(*args, function=function, **kwargs):
                seen.append(function(*args, **kwargs))
                return seen[-1]

            patch.setattr(losses_lib, name, recorded)
        after, stored, metrics = jax.eval_shape(agent.pure_update, state, tiny.batch())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {x.dtype for x in seen} == {jnp.dtype('float32')} and len(seen) >= 6
    floats = {x.dtype for x in jax.tree.leaves((after.params, after.percentiles, metrics))}
    assert floats == {jnp.dtype('float32')}
    assert (stored.deter.dtype, stored.stoch.dtype) == (jnp.float32, jnp.uint8)


@pytest.mark.medium
def test_bfloat16_update_runs():
    specs = {'vector': ArraySpec('continuous', (2,))}, {'action': ArraySpec('discrete', (1,), (2,))}
    agent = Agent(*specs, tiny.config(compute_dtype='bfloat16', imagination_length=2))
    shapes = jax.eval_shape(lambda: agent.init(0))
    before = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    before = before.replace(params=tiny.perturbed(before.params, seed=0, scale=0.5))
    shape = (1, 3)
    never = np.zeros(shape, bool)
    batch = Batch(
        {'vector': np.ones((*shape, 2), np.float32)},
        {'action': np.ones((*shape, 1), np.int32)},
        np.ones(shape, np.float32),
        never,
        never,
        never,
        np.zeros((1, 16), np.float32),
        np.zeros((1, 4), np.uint8),
    )
    after, stored, metrics = jax.jit(agent.pure_update)(before, batch)
    assert all(np.isfinite(x) for x in metrics.values())
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.params))
    # It was computed in half precision: the state has no more significant bits than that.
    np.testing.assert_array_equal(stored.deter, stored.deter.astype(jnp.bfloat16))
