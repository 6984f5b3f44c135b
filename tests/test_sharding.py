"""The same training on one device and on up to eight, however they are arranged."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tiny_runs
from gymnasium.spaces import Box, Discrete
from jax.sharding import PartitionSpec as P

from dreamerv3_jax import sharding
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.configs import base
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.normalization import init_return_percentiles, update_return_percentiles
from dreamerv3_jax.transforms import two_hot_bins

SPACES = (Box(-np.inf, np.inf, (4,), np.float32), Discrete(2))
IMAGE = (Box(0, 255, (16, 16, 1), np.uint8), Discrete(2))
UPDATES = 5
MESHES = [(8, 1), (2, 4)]
OTHER_MESHES = [(2, 1), (4, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 2)]


pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def start():
    """The first state, on the host."""
    return first_state_on_host(SPACES)


def first_state_on_host(spaces):
    agent = Agent.from_spaces(*spaces, tiny_runs.agent_config())
    return jax.tree.map(np.array, first_state(agent))


def first_state(agent):
    """Of an agent that expects rewards and values of some size, as a trained one does.

    Returns then differ by more than the limit under which they are not scaled. And bins reach e^20:
    to a new agent all are equally likely, and where the weight of one of these 15 is rounded
    otherwise, the value is another by up to 2.
    """
    state = agent.init(0)
    bias = -np.log1p(np.abs(two_hot_bins(tiny_runs.agent_config()['bins'])))
    heads = (state.params['reward'], state.params['critic'], state.slow_critic)
    for head, seed in zip(heads, (1, 2, 2), strict=True):
        output = head['output']
        kernel = np.random.default_rng(seed).standard_normal(output['kernel'].shape)
        output['bias'] += bias
        output['kernel'] += kernel.astype(np.float32)
    return state


def batch_of_eight(agent, seed):
    specs = (agent.observation_specs, agent.action_specs)
    halves = [tiny_runs.random_batch(*specs, seed + part) for part in (0, 100)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *halves)


def train(start, data, fsdp, spaces=SPACES):
    """Returns the agent, the last state and latents, and the metrics of every update."""
    mesh = sharding.make_mesh(data, fsdp)
    agent = Agent.from_spaces(*spaces, tiny_runs.agent_config(), mesh=mesh)
    state, metrics = jax.device_put(start, sharding.state_sharding(mesh, start)), []
    for seed in range(UPDATES):
        state, latents, values = agent.update(state, batch_of_eight(agent, seed))
        metrics.append(jax.device_get(values))
    return agent, state, latents, metrics


@pytest.fixture(scope='module')
def alone(start):
    return train(start, 1, 1)


@pytest.mark.medium
@pytest.mark.parametrize(
    ('data', 'fsdp'),
    [*MESHES, *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in OTHER_MESHES)],
)
def test_same_training_on_many_devices(data, fsdp, start, alone, monkeypatch):
    monkeypatch.setattr(sharding, 'LEAST_SHARDED', 64)
    agent, state, latents, metrics = train(start, data, fsdp)
    check_same_training((state, latents, metrics), alone[1:])
    # And it was really done on all devices, with optimiser and slow critic split up as well.
    devices = data * fsdp
    assert len(latents.deter.sharding.device_set) == devices
    assert latents.deter.addressable_shards[0].data.shape[0] == 8 // devices
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == devices
        largest = max(shard.data.size for shard in leaf.addressable_shards)
        divisible = leaf.size >= 64 and any(side % fsdp == 0 for side in leaf.shape)
        assert largest * (fsdp if divisible else 1) == leaf.size
    text = '\n'.join(program.as_text() for program in agent._programs)
    check_communication(text, state, fsdp)
    # One device acts, with whole parameters, as one that trains alone.
    chosen = [act(*pair) for pair in ((agent, state), alone[:2])]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), *chosen)


@pytest.mark.slow
def test_same_training_from_images(monkeypatch):
    monkeypatch.setattr(sharding, 'LEAST_SHARDED', 64)
    start = first_state_on_host(IMAGE)
    _, *expected = train(start, 1, 1, IMAGE)
    agent, *found = train(start, 2, 4, IMAGE)
    check_same_training(found, expected)
    # Images are pooled in turns, in which devices exchange nothing.
    text = agent._programs[0].as_text()
    assert 'pooled/while' in text and not collectives_in_loops(text)


def check_same_training(found, one):
    """Compares last states and latents, and the metrics of every update."""
    state, latents, metrics = found
    expected_state, expected_latents, expected_metrics = one
    for values, expected in zip(metrics, expected_metrics, strict=True):
        assert values.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(
                values[key], expected[key], rtol=1e-5, atol=1e-5, err_msg=key
            )
    assert expected_metrics[-1]['return/scale'] > 1  # and so depends on the percentiles
    # No sampled latent differs, or the parameters would, by much more than this. They moved by:
    moved = np.abs(expected_state.params['continue_']['output']['kernel']).max()
    assert moved > 100 * 1e-5
    for name, expected in expected_latents._asdict().items():
        np.testing.assert_allclose(getattr(latents, name), expected, atol=1e-5)
    paths = jax.tree_util.tree_flatten_with_path(expected_state)[0]
    for (path, expected), value in zip(paths, jax.tree.leaves(state), strict=True):
        name = jax.tree_util.keystr(path)
        limit = 1e-4 * np.abs(expected).max() if 'optimizer' in name else 1e-5
        np.testing.assert_allclose(value, expected, atol=limit, rtol=0, err_msg=name)


def collectives_in_loops(program):
    kinds = 'all-gather|all-reduce|all-to-all|collective-permute'
    return re.findall(rf' (?:{kinds})\(.*op_name="(.*?while.*?)"', program)


def check_communication(program, state, fsdp):
    """Devices exchange parameters once, gradients once, and the returns; nothing inside scans."""
    pattern = r' = (.*?) (all-gather|all-reduce|all-to-all|collective-permute)\(.*op_name="(.*?)"'
    found = re.findall(pattern, program)
    assert {kind for _, kind, _ in found} <= {'all-reduce', 'all-gather'}
    assert not collectives_in_loops(program)
    gathered = [
        shape for shape, kind, name in found if kind == 'all-gather' and 'top_k' not in name
    ]
    split = [x for x in jax.tree.leaves((state.params, state.slow_critic)) if not replicated(x)]
    assert len(gathered) <= len(split) and bool(gathered) == bool(split) == (fsdp > 1)


def replicated(array):
    return array.sharding.is_fully_replicated


def act(agent, state):
    """Acts twice; returns the actions."""
    params, policy_state, chosen = agent.acting_params(state), agent.initial_policy_state(3), []
    for tick in range(2):
        observation = {'observation': np.full((3, 4), tick, np.float32)}
        policy_state, actions, latent = agent.policy(
            params, policy_state, observation, np.zeros(3, bool), (0, tick)
        )
        assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(latent))
        chosen.append(jax.device_get((actions, latent)))
    assert agent._policy._cache_size() == 1
    return chosen


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
    assert dict(sharding.make_mesh().shape) == {'data': 8, 'fsdp': 1}
    assert dict(sharding.make_mesh(-1, 2).shape) == {'data': 4, 'fsdp': 2}
    assert dict(sharding.make_mesh(1, 1).shape) == {'data': 1, 'fsdp': 1}
    assert dict(sharding.make_mesh(-1, 3, jax.devices()[:6]).shape) == {'data': 2, 'fsdp': 3}
    assert sharding.make_mesh(1, 2).devices.tolist() == [jax.devices()[:2]]
    assert sharding.batch_sharding(sharding.make_mesh(2, 2), 8).spec == P(('data', 'fsdp'))


def test_meshes_of_gpus_in_several_machines():
    """JAX refuses to place them; those of one machine stay next to each other."""
    names = ('platform', 'device_kind', 'slice_index', 'process_index', 'id')
    Device = dataclasses.make_dataclass('Device', names, frozen=True)
    devices = [Device('gpu', 'H100', index // 8, index // 8, index) for index in range(16)]
    mesh = sharding.make_mesh(-1, 4, devices[8:] + devices[:8])
    assert mesh.devices.tolist() == [devices[start : start + 4] for start in (0, 4, 8, 12)]
    assert mesh.axis_names == ('data', 'fsdp')


@pytest.mark.parametrize(
    ('data', 'fsdp', 'words'),
    [
        (9, 1, 'mesh.data=9 times mesh.fsdp=1 needs 9 devices and there are 8; lower one of them'),
        (3, 4, 'needs 12 devices'),
        (2, 5, 'needs 10 devices'),
        (-1, 5, 'mesh.fsdp=5 does not divide the 8 devices; choose a number that does'),
        (-1, 16, 'mesh.fsdp=16 does not divide'),
    ],
)
def test_impossible_meshes(data, fsdp, words):
    with pytest.raises(UserError, match=words):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(('data', 'fsdp', 'batch'), [(4, 1, 6), (2, 2, 3), (3, 1, 16)])
def test_impossible_batches(data, fsdp, batch):
    with pytest.raises(UserError, match=f'A batch of {batch} sequences does not divide among'):
        sharding.batch_sharding(sharding.make_mesh(data, fsdp), batch)


def test_a_device_is_set_apart_for_acting():
    settings = base.get_config('nano').mesh
    assert sharding.arrange(settings, 8)[1] is None
    settings.acting = True
    mesh, acting = sharding.arrange(settings, 14)
    assert mesh.devices.flatten().tolist() == jax.devices()[:7] and acting == jax.devices()[7]
    with pytest.raises(UserError, match='mesh.acting needs two devices on each host'):
        sharding.set_apart(jax.devices()[:1])


@pytest.mark.parametrize(
    ('batch_size', 'fsdp', 'count'),
    [(16, 1, 8), (6, 1, 6), (5, 1, 5), (7, 1, 7), (11, 1, 1), (6, 2, 6), (3, 2, 8)],
)
def test_cores_are_used_as_far_as_the_batch_can_be_dealt_out(batch_size, fsdp, count):
    assert len(sharding.devices_for(batch_size, fsdp, jax.devices())) == count
