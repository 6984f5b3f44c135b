"""Presets: complete, of published values, and honest in what they say."""

import math
import re

import pytest

from dreamerv3_jax import cli, presets, settings
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.configs import base
from dreamerv3_jax.envs.registry import SUITES
from dreamerv3_jax.errors import UserError

WIDTHS = {'deter', 'hidden', 'classes', 'depth', 'units'}

# id, kwargs, image size, repeat, environments, train ratio, frames, size
TABLE = {
    'atari': (
        'atari/pong',
        {'sticky': True, 'full_actions': True, 'gray': True},
        *(96, 4, 16, 32.0, 200_000_000, 'size200m'),
    ),
    'atari100k': (
        'atari/pong',
        {'sticky': False, 'full_actions': False, 'gray': False},
        *(64, 4, 1, 256.0, 400_000, 'size200m'),
    ),
    'bsuite': ('bsuite/catch/0', {'mnist': ''}, 0, 1, 1, 1024.0, 100_000, 'size1m'),
    'crafter': ('crafter/reward', {}, 64, 1, 1, 512.0, 1_000_000, 'size200m'),
    'craftax': (
        'craftax/classic',
        {'pixels': True},
        *(64, 1, 16, 512.0, 1_000_000, 'size200m'),
    ),
    'dmc_manipulation': (
        'manipulation/reach_site',
        {'vision': False},
        *(0, 1, 16, 1024.0, 1_000_000, 'size1m'),
    ),
    'dmc_proprio': ('dmc/walker_walk', {}, 0, 1, 16, 1024.0, 1_000_000, 'size1m'),
    'dmc_vision': (
        'dmc/walker_walk',
        {'vision': True},
        *(64, 1, 16, 256.0, 1_000_000, 'size200m'),
    ),
    'dmlab': ('dmlab/rooms_watermaze', {}, 64, 4, 16, 32.0, 100_000_000, 'size200m'),
    'envpool': ('envpool/CartPole-v1', {}, 0, 1, 16, 256.0, 1_000_000, 'size1m'),
    'memory_maze': ('memorymaze/9x9', {}, 64, 1, 16, 32.0, 100_000_000, 'size200m'),
    'metaworld': ('metaworld/reach', {}, 0, 1, 16, 512.0, 1_000_000, 'size12m'),
    'minigrid': (
        'minigrid/DoorKey-8x8-v0',
        {'vision': False},
        *(0, 1, 16, 512.0, 1_000_000, 'size12m'),
    ),
    'popgym': ('popgym/RepeatPreviousEasy-v0', {}, 0, 1, 16, 512.0, 1_000_000, 'size12m'),
    'robotics': ('robotics/FetchReach-v4', {}, 0, 1, 16, 512.0, 1_000_000, 'size12m'),
    'vizdoom': (
        'vizdoom/basic',
        {'combine': False},
        *(64, 4, 16, 256.0, 4_000_000, 'size200m'),
    ),
    'gymnasium': ('', {}, 0, 1, 4, 256.0, 1_000_000, 'size1m'),
    'procgen': (
        'procgen/coinrun',
        {'distribution': 'hard'},
        *(64, 1, 16, 64.0, 50_000_000, 'size200m'),
    ),
    'minecraft': (
        'minecraft/diamond',
        {'break_speed': 100.0, 'length': 36_000},
        *(64, 1, 64, 32.0, 100_000_000, 'size200m'),
    ),
    'quickstart': ('Hover-v0', {}, 0, 1, 4, 64.0, 11_200, 'cpu'),
}


def flat(config, prefix=''):
    for key, value in config.items():
        if hasattr(value, 'items'):
            yield from flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


def commands(preset):
    """Returns the commands in a preset's docstring, as lists of arguments."""
    text = presets._preset_module(preset).__doc__.replace('\\\n', ' ')
    return [line.split()[1:] for line in text.splitlines() if line.startswith('dreamerv3-jax ')]


def test_every_preset_is_in_the_table():
    assert presets.names() == sorted(TABLE)


@pytest.mark.parametrize('preset', TABLE)
def test_preset_values(preset):
    config = presets.load_config(preset)
    env = config.env
    found = (env.id, env.kwargs.to_dict(), env.image_size, env.repeat, env.num_envs)
    found += (config.replay.train_ratio, config.run.steps, config.size)
    assert found == TABLE[preset]


@pytest.mark.parametrize('preset', TABLE)
def test_preset_changes_only_what_may_differ(preset):
    allowed = {'replay.capacity', 'replay.train_ratio', 'run.steps'}
    config = presets.load_config(preset)
    reference = dict(flat(base.get_config(config.size)))
    changed = {key for key, value in flat(config) if reference.get(key) != value}
    assert not {key for key in changed if not key.startswith('env.')} - allowed


@pytest.mark.parametrize('preset', TABLE)
@pytest.mark.parametrize('size', base.SIZES)
def test_preset_builds_the_agent_at_every_size(preset, size):
    config = presets.load_config(f'{preset}:{size}')
    config.env.id = config.env.id or 'CartPole-v1'
    settings.validate(config)
    agent = AgentConfig.from_mapping(config.agent.to_dict())
    assert config.size == size
    assert agent.deter == base.SIZES[size][0]


@pytest.mark.parametrize('size', base.SIZES)
def test_sizes_differ_in_widths_only(size):
    first, second = base.get_config('size12m'), base.get_config(size)
    differ = {key for key in first.agent if first.agent[key] != second.agent[key]}
    assert differ <= WIDTHS
    assert {key for key, value in flat(first) if dict(flat(second))[key] != value} <= {
        'size',
        *(f'agent.{width}' for width in WIDTHS),
    }


def test_published_sizes():
    # deter, hidden, classes, depth, units; the published ones are all in proportion.
    assert base.SIZES['size1m'] == (512, 64, 4, 4, 64)
    assert base.SIZES['size12m'] == (2048, 256, 16, 16, 256)
    assert base.SIZES['size200m'] == (8192, 1024, 64, 64, 1024)
    for deter, hidden, classes, depth, units in list(base.SIZES.values())[2:]:
        assert deter == 128 * depth
        assert (hidden, classes, units) == (16 * depth, depth, 16 * depth)


def test_default_size_is_the_published_one():
    assert base.get_config().size == 'size200m'


def test_load_config_returns_independent_settings():
    first = presets.load_config('quickstart')
    first.env.id = 'changed'
    assert presets.load_config('quickstart').env.id == 'Hover-v0'


@pytest.mark.parametrize('preset', TABLE)
def test_docstring_commands_are_accepted(preset, trained):
    found = commands(preset)
    assert found[0][:2] == ['train', f'--config={preset}']
    for arguments in found:
        if arguments[0] == 'train':
            assert cli.main(arguments) == 0
    assert len(trained) == sum(arguments[0] == 'train' for arguments in found)
    assert all(name == preset for _, _, name in trained)


@pytest.mark.parametrize('preset', TABLE)
def test_docstring_installs_an_extra_that_exists(preset):
    text = presets._preset_module(preset).__doc__
    extras = re.findall(r"pip install -e '\.\[(\w+)\]'", text)
    suite = presets.load_config(preset).env.id.partition('/')[0]
    if suite in SUITES and SUITES[suite].install.startswith('in the clone, '):
        assert [f'in the clone, pip install -e ".[{extra}]"' for extra in extras] == [
            SUITES[suite].install
        ]
    else:
        assert extras == []


@pytest.mark.parametrize('preset', TABLE)
def test_preset_is_one_screen(preset):
    path = presets.configs.__path__[0] + f'/{preset}.py'
    with open(path) as file:
        lines = file.read().splitlines()
    assert len(lines) <= 45


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'env.id': ' '}, 'Name the environment'),
        ({'seed': -1}, 'config.seed must be at least 0'),
        ({'env.num_envs': 0}, 'config.env.num_envs must be at least 1'),
        ({'env.repeat': 0}, 'config.env.repeat must be at least 1'),
        ({'env.image_size': 100}, 'multiple of 16'),
        ({'env.image_size': 32}, 'multiple of 16'),
        ({'env.vectorization': 'asink'}, "did you mean 'async'?"),
        ({'env.autoreset': 'same'}, "did you mean 'same_step'?"),
        ({'replay.train_ratio': 0.0}, 'must be positive'),
        ({'replay.train_ratio': float('nan')}, 'must be finite'),
        ({'replay.batch_size': 0}, 'must be at least 1'),
        ({'replay.batch_length': 1}, 'must be at least 2'),
        ({'replay.capacity': 1039}, '1040 steps, not 1039'),  # 16 * (64 + 1) = 1040
        ({'run.steps': 0}, 'must be at least 1'),
        ({'run.log_every': 0.0}, 'must be positive'),
        ({'mesh.data': 0}, 'or -1 for all'),
        ({'mesh.fsdp': 0}, 'must be at least 1'),
        ({'agent.unimix': 1.5}, 'between 0 and 1'),
        ({'agent.free_nats': -1.0}, 'must not be negative'),
        ({'agent.rms_decay': 1 - 1e-9}, 'from 0 to below 1'),  # 1 on devices
        ({'agent.bins': 10}, 'odd number'),
        ({'agent.gradient_clip': 0.0}, 'must be positive'),
        ({'agent.gradient_clip_floor': 0.0}, 'must be positive'),
        ({'agent.rms_epsilon': 1e-40}, 'must be positive'),  # 0 on devices
        ({'agent.max_std': 0.05}, 'agent.min_std (0.1) must not be above agent.max_std (0.05)'),
        ({'agent.compute_dtype': 'float16'}, "not 'float16'"),
    ],
)
def test_impossible_values_are_refused(change, words):
    config = presets.load_config('quickstart')
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=re.escape(words)):
        settings.validate(config)


@pytest.mark.parametrize(
    'change',
    [
        {'unimix': 1.5},
        {'return_limit': 0.0},
        {'discount_horizon': math.nan},
        {'learning_rate': 0.0},
    ],
)
def test_impossible_values_are_refused_by_the_agent_itself(change):
    with pytest.raises(UserError, match=f'agent.{next(iter(change))} must be'):
        AgentConfig.from_mapping(base.get_config().agent.to_dict() | change)


def test_precision_is_one_that_the_device_has():
    config = AgentConfig.from_mapping(base.get_config().agent.to_dict())
    for device, dtype in (
        (('cpu',), 'float32'),
        (('tpu',), 'bfloat16'),
        (('gpu', '7.5'), 'float32'),
        (('gpu', '8.0'), 'bfloat16'),
        (('gpu', '12.0'), 'bfloat16'),
        (('gpu', 'gfx942'), 'bfloat16'),  # of AMD
    ):
        assert config.on(*device).compute_dtype == dtype


def test_incomplete_unknown_and_mistyped_settings_are_refused():
    config = presets.load_config('quickstart')
    del config.replay['online']
    with pytest.raises(UserError, match='lack replay.online'):
        settings.validate(config)
    config = presets.load_config('quickstart')
    config.replay.batchsize = 3
    with pytest.raises(UserError, match='did you mean config.replay.batch_size'):
        settings.validate(config)
    config = presets.load_config('quickstart')
    with config.ignore_type():
        config.run.steps = '100'
    with pytest.raises(UserError, match='config.run.steps takes a whole number'):
        settings.validate(config)


def test_run_folder_names_the_run():
    config = presets.load_config('quickstart')
    config.env.id = 'my.module:make env/2'
    folder = settings.run_folder(config, 'quickstart')
    assert folder.as_posix() == 'runs/quickstart-my.module_make_env_2-cpu-seed0'
    config.logdir = 'here/it is'
    assert settings.run_folder(config, 'quickstart').as_posix() == 'here/it is'
