"""Suites whose packages no registry has, against stand-ins for their documented interfaces."""

import contextlib
import importlib.metadata
import importlib.util
import sys

import doubles
import numpy as np
import pytest
from doubles import RecordedLabContract, RecordedMineRLContract
from test_suites import discrete, inner, make, play
from toy_envs import taken_logs

from dreamerv3_jax import envs, presets
from dreamerv3_jax.envs import text
from dreamerv3_jax.errors import UserError


@contextlib.contextmanager
def installed(adapter, modules):
    """Lets the adapter find the stand-ins, and forgets both at the end."""
    sys.modules.pop(f'dreamerv3_jax.envs.{adapter}', None)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield
    sys.modules.pop(f'dreamerv3_jax.envs.{adapter}', None)
    vars(envs).pop(adapter, None)


@pytest.mark.parametrize('env_id', ['dmlab/rooms_watermaze', 'minecraft/diamond'])
def test_without_the_package(env_id, monkeypatch):
    package = {'dmlab': 'deepmind_lab', 'minecraft': 'minerl'}[env_id.partition('/')[0]]
    if importlib.util.find_spec(package):
        pytest.skip(f'{package} is installed')
    with pytest.raises(UserError, match=r'not installed: .*pip install') as error:
        make(env_id)
    assert '\n' not in str(error.value)


class TestLab:
    @pytest.fixture(autouse=True)
    def package(self):
        with installed('dmlab', doubles.lab_modules()):
            yield

    def test_specs(self):
        with make('dmlab/language_execute_random_task') as env:
            shapes = {name: spec.shape for name, spec in env.observation_specs.items()}
            assert shapes == {'image': (64, 64, 3), 'instruction': text.space().shape}
            assert env.observation_specs['image'].kind == 'image'
            assert env.action_specs['action'].classes == (15,)
            assert env.messages == []
            lab = RecordedLabContract.latest
            assert lab.level == 'contributed/dmlab30/language_execute_random_task'
            instruction = env.reset().observation['instruction'][0]
            expected = text.embed('Get the red hat from the blue room.')
            np.testing.assert_array_equal(instruction, expected)
        assert lab.closed
        with make('dmlab/rooms_watermaze', image_size=80, repeat=4) as env:
            assert env.observation_specs['image'].shape == (80, 80, 3)
            assert env.frame_rate == 15
        kwargs = {'renderer': 'hardware', 'dataset': 'pictures'}
        with make('dmlab/psychlab_visual_search', kwargs=kwargs):
            lab = RecordedLabContract.latest
            assert lab.renderer == 'hardware'
            assert lab.config['datasetPath'] == 'pictures'

    def test_levels(self):
        from dreamerv3_jax.envs import dmlab

        assert len(set(dmlab.LEVELS)) == 30
        for name in (*dmlab.LEVELS, *dmlab.TEST_LEVELS):
            with make(f'dmlab/{name}') as env:
                assert env.reset().is_first.all()
            seed = RecordedLabContract.latest.config.get('mixerSeed')
            assert seed == (str(0x600D5EED) if name in dmlab.TEST_LEVELS else None)
        with pytest.raises(UserError, match='did you mean .*rooms_watermaze'):
            make('dmlab/rooms_watermase')

    def test_actions(self):
        with make('dmlab/rooms_watermaze') as env:
            env.reset()
            for action in range(15):
                env.step(discrete(action))
            taken = [action for action, _ in RecordedLabContract.latest.steps]
        assert len(set(taken)) == 15
        assert taken[0] == (0, 0, 0, 1, 0, 0, 0)  # forward
        assert taken[8] == (0, 10, 0, 0, 0, 0, 0)  # look down
        assert taken[12] == (-60, 0, 0, 1, 0, 0, 0)  # forward and fast to the left
        assert taken[14] == (0, 0, 0, 0, 1, 0, 0)  # fire

    def test_repeat_is_counted_by_the_game(self):
        with make('dmlab/rooms_watermaze', repeat=4) as env:
            env.reset()
            assert env.step(discrete(0))[0].reward[0] == 4.0
            assert env.step(discrete(1))[0].reward[0] == 0.0
            lab = RecordedLabContract.latest
            assert [steps for _, steps in lab.steps] == [4, 4]
            assert lab.frame == 8

    def test_time_limit_truncates(self):
        with make('dmlab/rooms_watermaze', repeat=4) as env:
            env.reset()
            for step in range(23):  # 90 frames
                before = env.step(discrete(0))[0]
                assert before.is_last[0] == (step == 22)
            assert not before.is_terminal[0]
            assert before.reward[0] == 2.0
            assert env.step(discrete(0))[0].is_first[0]

    def test_an_early_end_terminates_and_shows_the_last_picture_again(self, monkeypatch):
        monkeypatch.setattr(RecordedLabContract, 'early', 10)
        with make('dmlab/rooms_watermaze', repeat=4) as env:
            env.reset()
            env.step(discrete(0))
            before, _ = env.step(discrete(0))
            image = before.observation['image'].copy()
            records, _ = env.step(discrete(0))
            assert records.is_terminal[0]
            assert records.is_last[0]
            assert records.reward[0] == 2.0
            np.testing.assert_array_equal(records.observation['image'], image)

    def test_seeds(self):
        def fingerprint(seed):
            with make('dmlab/rooms_watermaze', seed=seed, repeat=4) as env:
                return play(env, 60), tuple(RecordedLabContract.latest.seeds)

        assert fingerprint(1) == fingerprint(1) != fingerprint(2)
        assert len(set(fingerprint(1)[1])) > 1  # not the same episode again and again

    def test_render(self):
        with make('dmlab/rooms_watermaze', render=True) as env:
            records = env.reset()
            np.testing.assert_array_equal(env.render(), records.observation['image'][0])

    def test_preset(self):
        config = presets.load_config('dmlab').env
        config.num_envs, config.vectorization = 2, 'sync'
        with envs.make(config, 0) as env:
            assert env.reset().is_first.all()
            assert env.messages == []


class TestMinecraft:
    @pytest.fixture(autouse=True)
    def package(self):
        with installed('minecraft', doubles.minerl_modules()):
            yield

    def act(self, env, name):
        """Takes the action of a name."""
        from dreamerv3_jax.envs import minecraft

        return env.step(discrete(list(minecraft.ACTIONS).index(name)))[0]

    def test_specs(self):
        with make('minecraft/diamond') as env:
            shapes = {name: spec.shape for name, spec in env.observation_specs.items()}
            many = len(doubles.ITEMS) - 1  # both kinds of logs are one
            assert shapes == {
                'image': (64, 64, 3),
                'inventory': (many,),
                'inventory_max': (many,),
                'equipped': (len(doubles.ITEMS) + 1,),
                **dict.fromkeys(('health', 'hunger', 'breath'), (1,)),
            }
            assert env.action_specs['action'].classes == (25,)
            assert env.messages == []
            first = env.reset().observation
            assert first['health'] == first['breath'] == 1.0
            assert first['hunger'] == 0.5
            assert first['equipped'].sum() == 1.0
            game = RecordedMineRLContract.latest
            assert game.spec.agent_start[0].arguments == (100.0,)
            observation, _ = inner(env).reset(seed=0)
            assert inner(env).observation_space.contains(observation)
        assert game.closed
        with make('minecraft/diamond', image_size=80) as env:
            assert env.observation_specs['image'].shape == (80, 80, 3)
        with pytest.raises(UserError, match='comes as minecraft/diamond'):
            make('minecraft/diamonds')

    def test_a_version_that_cannot_craft(self, monkeypatch):
        monkeypatch.setattr(importlib.metadata, 'version', lambda name: '1.0.2')
        with pytest.raises(UserError, match=r'MineRL 1.0.2 .* install minerl==0.4.4'):
            make('minecraft/diamond')

    def test_inventory(self):
        with make('minecraft/diamond') as env:
            env.reset()
            game = RecordedMineRLContract.latest
            items = [item for item in doubles.ITEMS if item != 'log2']
            log, planks = items.index('log'), items.index('planks')
            game.inventory = {'log': 2, 'log2': 3}
            env.step(discrete(0))
            game.inventory, game.hand = {'planks': 4}, 'wooden_pickaxe'
            found = env.step(discrete(0))[0].observation
            assert found['inventory'][0, planks] == found['inventory_max'][0, planks] == 4
            assert found['inventory'][0, log] == 0
            assert found['inventory_max'][0, log] == 5
            hand = sorted({*doubles.ITEMS, 'other'}).index('wooden_pickaxe')
            assert found['equipped'][0].argmax() == hand
            assert env.reset().observation['inventory_max'].sum() == 0

    def test_milestones_pay_once(self):
        from dreamerv3_jax.envs import minecraft

        assert len(set(minecraft.MILESTONES)) == 12
        with make('minecraft/diamond', kwargs={'length': 50}) as env:
            for _ in range(2):  # in every episode anew
                env.reset()
                game = RecordedMineRLContract.latest
                rewards = []
                for item in (*minecraft.MILESTONES, 'dirt', 'log', 'diamond'):
                    game.inventory = {item: 3}
                    rewards.append(env.step(discrete(0))[0].reward[0])
                assert rewards == [1.0] * 12 + [0.0] * 3
            env.reset()
            game.inventory = {'log2': 1, 'stick': 4}
            assert env.step(discrete(0))[0].reward[0] == 2.0

    def test_health_pays(self):
        with make('minecraft/diamond') as env:
            env.reset()
            game = RecordedMineRLContract.latest
            rewards = []
            for game.life in (20.0, 15.0, 15.0, 17.0):
                rewards.append(env.step(discrete(0))[0].reward[0])
            np.testing.assert_allclose(rewards, [0, -0.0025, 0, 0.001], atol=1e-7)
            game.life = 3.0
            env.reset()  # heals without a reward
            assert env.step(discrete(0))[0].reward[0] == 0.0

    def test_death_terminates_and_time_truncates(self):
        with make('minecraft/diamond', kwargs={'length': 3}) as env:
            env.reset()
            game = RecordedMineRLContract.latest
            game.inventory = {'log': 1}
            lasts = [env.step(discrete(0))[0] for _ in range(3)]
            assert [bool(records.is_last[0]) for records in lasts] == [False, False, True]
            assert not lasts[-1].is_terminal[0]
            logs = taken_logs(env)
            assert logs['milestone_log'] == logs['milestones'] == 1.0
            assert logs['milestone_diamond'] == 0.0
            assert len(logs) == 13
            env.reset()
            game.dies, game.life = True, 0.0
            records, _ = env.step(discrete(0))
            assert records.is_last[0]
            assert records.is_terminal[0]
            assert records.reward[0] == pytest.approx(-0.01)
            assert env.step(discrete(0))[0].is_first[0]

    def test_a_dead_game_is_started_again(self):
        with make('minecraft/diamond') as env:
            env.reset()
            first = RecordedMineRLContract.latest
            first.error = 'Connection timed out!'
            env.step(discrete(0))
            assert RecordedMineRLContract.latest is not first
            assert first.closed

    def test_actions(self):
        with make('minecraft/diamond') as env:
            env.reset()
            for action in range(25):
                env.step(discrete(action))
            taken = RecordedMineRLContract.latest.actions
        words = ('place', 'equip', 'craft', 'nearbyCraft', 'nearbySmelt')
        commands = [action[word] for action in taken for word in words if action[word] != 'none']
        assert len(commands) == 14
        assert taken[0]['attack'] == 0
        assert taken[1]['attack'] == 1
        assert [action['attack'] for action in taken[2:5]] == [0, 0, 0]  # blocks break at once

    def test_jumps_go_on(self):
        with make('minecraft/diamond') as env:
            env.reset()
            self.act(env, 'jump')
            for _ in range(11):
                self.act(env, 'turn_left')
            taken = RecordedMineRLContract.latest.actions
            assert [action['jump'] for action in taken] == [1] * 10 + [0] * 2
            assert [action['forward'] for action in taken] == [1] * 10 + [0] * 2
            self.act(env, 'jump')
            env.reset()
            self.act(env, 'noop')
            assert RecordedMineRLContract.latest.actions[-1]['jump'] == 0

    def test_attacks_go_on_where_blocks_are_hard(self):
        with make('minecraft/diamond', kwargs={'break_speed': 1.0}) as env:
            env.reset()
            self.act(env, 'attack')
            for _ in range(30):
                self.act(env, 'noop')
            taken = RecordedMineRLContract.latest.actions
        assert [action['attack'] for action in taken] == [1] * 30 + [0]

    def test_view_stays_off_the_poles(self):
        with make('minecraft/diamond') as env:
            env.reset()
            for name in ['turn_down'] * 6 + ['turn_up'] * 10 + ['turn_right']:
                self.act(env, name)
            camera = np.array(
                [action['camera'] for action in RecordedMineRLContract.latest.actions]
            )
        pitch = camera[:, 0].cumsum()
        assert (pitch.min(), pitch.max()) == (-60, 60)
        np.testing.assert_array_equal(camera[-1], [0, 15])

    def test_seeds(self):
        def fingerprint(seed):
            with make('minecraft/diamond', seed=seed, kwargs={'length': 10}) as env:
                return play(env, 40), tuple(RecordedMineRLContract.latest.seeds)

        assert fingerprint(1) == fingerprint(1) != fingerprint(2)
        assert len(set(fingerprint(1)[1])) > 1  # a new world for every episode

    def test_preset(self):
        config = presets.load_config('minecraft').env
        config.num_envs, config.vectorization = 2, 'sync'
        with envs.make(config, 0) as env:
            assert env.reset().is_first.all()
            assert env.messages == []
