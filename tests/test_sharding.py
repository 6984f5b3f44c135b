"""The same training on one device and on four, however they are arranged."""

import functools

import jax
import numpy as np
import pytest
import tiny_runs
from gymnasium.spaces import Box, Discrete
from jax.sharding import PartitionSpec as P

from dreamerv3_jax import sharding
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.normalization import init_return_percentiles, update_return_percentiles

SPACES = (Box(-np.inf, np.inf, (4,), np.float32), Discrete(2))
UPDATES = 5
MESHES = {'data': (4, 1), 'fsdp': (1, 4), 'both': (2, 2)}


pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def start():
    """The first state, on the host."""
    agent = Agent.from_spaces(*SPACES, tiny_runs.agent_config())
    return jax.tree.map(np.array, agent.init(0))


def train(start, data, fsdp):
    """Returns the last state, the last latents, and the metrics of every update."""
    mesh = sharding.make_mesh(data, fsdp)
    agent = Agent.from_spaces(*SPACES, tiny_runs.agent_config(), mesh=mesh)
    state, metrics = jax.device_put(start, sharding.state_sharding(mesh, start)), []
    for seed in range(UPDATES):
        batch = tiny_runs.random_batch(agent.observation_specs, agent.action_specs, seed)
        state, latents, values = agent.update(state, batch)
        metrics.append(jax.device_get(values))
    return state, latents, metrics


@pytest.fixture(scope='module')
def alone(start):
    return train(start, 1, 1)


@pytest.mark.medium
@pytest.mark.parametrize('name', MESHES)
def test_same_training_on_four_devices(name, start, alone, monkeypatch):
    monkeypatch.setattr(sharding, 'LEAST_SHARDED', 64)
    data, fsdp = MESHES[name]
    state, latents, metrics = train(start, data, fsdp)
    expected_state, expected_latents, expected_metrics = alone
    for values, expected in zip(metrics, expected_metrics, strict=True):
        assert values.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(
                values[key], expected[key], rtol=1e-5, atol=1e-5, err_msg=key
            )
    # No sampled latent differs, or the parameters would, by much more than this. They moved by:
    moved = np.abs(expected_state.params['critic']['output']['kernel']).max()
    assert moved > 100 * 1e-5
    np.testing.assert_array_equal(latents.stoch, expected_latents.stoch)
    paths = jax.tree_util.tree_flatten_with_path(expected_state)[0]
    for (path, expected), value in zip(paths, jax.tree.leaves(state), strict=True):
        if 'optimizer' not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(
                value, expected, atol=1e-5, rtol=0, err_msg=jax.tree_util.keystr(path)
            )
    # And it was really done on four devices, with optimiser and slow critic split up as well.
    assert len(latents.deter.sharding.device_set) == 4
    assert latents.deter.addressable_shards[0].data.shape[0] == 1
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 4
        largest = max(shard.data.size for shard in leaf.addressable_shards)
        divisible = leaf.size >= 64 and any(side % fsdp == 0 for side in leaf.shape)
        assert largest * (fsdp if divisible else 1) == leaf.size


def test_percentiles_are_those_of_the_global_batch():
    """The 4 shards hold 0..24, 25..49, 50..74, 75..99: no shard has the 5th and 95th percentile."""
    mesh = sharding.make_mesh(2, 2)
    returns = jax.device_put(
        np.arange(100, dtype=np.float32).reshape(4, 25), sharding.batch_sharding(mesh, 4)
    )
    update = functools.partial(
        update_return_percentiles, low_percentile=5.0, high_percentile=95.0, rate=0.1
    )
    low, high = jax.jit(update, out_shardings=sharding.replicated(mesh))(
        init_return_percentiles(), returns
    )
    np.testing.assert_allclose([low, high], [0.1 * 4.95, 0.1 * 94.05], rtol=1e-6)


def test_state_is_split_along_its_longest_divisible_axis(monkeypatch):
    monkeypatch.setattr(sharding, 'LEAST_SHARDED', 100)
    cases = {
        (200,): P('fsdp'),
        (10, 12): P(None, 'fsdp'),
        (12, 10): P('fsdp'),
        (3, 8, 15): P(None, 'fsdp'),
        (8, 8, 8): P('fsdp'),
        (99, 99): P(),  # does not divide
        (4, 24): P(),  # small
        (): P(),
    }
    state = {str(shape): jax.ShapeDtypeStruct(shape, np.float32) for shape in cases}
    found = sharding.state_sharding(sharding.make_mesh(1, 4), state)
    assert {key: value.spec for key, value in found.items()} == {
        str(shape): spec for shape, spec in cases.items()
    }
    found = sharding.state_sharding(sharding.make_mesh(4, 1), state)
    assert all(value.is_fully_replicated for value in found.values())


def test_meshes():
    assert dict(sharding.make_mesh().shape) == {'data': 4, 'fsdp': 1}
    assert dict(sharding.make_mesh(-1, 2).shape) == {'data': 2, 'fsdp': 2}
    assert dict(sharding.make_mesh(1, 1).shape) == {'data': 1, 'fsdp': 1}
    assert sharding.batch_sharding(sharding.make_mesh(2, 2), 8).spec == P(('data', 'fsdp'))


@pytest.mark.parametrize(('data', 'fsdp'), [(5, 1), (3, 2), (-1, 5), (2, 4)])
def test_impossible_meshes(data, fsdp):
    with pytest.raises(UserError, match='needs .* devices and there are 4; lower one of them'):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(('data', 'fsdp', 'batch'), [(4, 1, 6), (2, 2, 3), (3, 1, 16)])
def test_impossible_batches(data, fsdp, batch):
    with pytest.raises(UserError, match=f'A batch of {batch} sequences does not divide among'):
        sharding.batch_sharding(sharding.make_mesh(data, fsdp), batch)
