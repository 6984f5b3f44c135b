"""The suites whose packages step many environments at once: EnvPool, ProcGen, Craftax."""

import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_runs
from test_suites import discrete, make, play, random_actions
from toy_envs import taken_logs

from dreamerv3_jax import evaluation
from dreamerv3_jax.envs.native import Native
from dreamerv3_jax.errors import UserError


def make_pool(env_id, seed=0, **changes):
    return make(env_id, seed=seed, **{'vectorization': 'auto', **changes})


def check_contract(env, steps):
    """Plays at random over several episodes; returns which ends there were."""
    rng = np.random.default_rng(0)
    records = env.reset()
    assert records.is_first.all()
    assert not (records.reward.any() or records.is_last.any() or records.is_terminal.any())
    was_last, ends = np.zeros(env.num_envs, bool), set()
    for _ in range(steps):
        records, finals = env.step(random_actions(env, rng))
        assert finals is None
        np.testing.assert_array_equal(records.is_first, was_last)
        assert not records.reward[records.is_first].any()
        assert not (records.is_last & records.is_first).any()
        assert not (records.is_terminal & ~records.is_last).any()
        assert records.reward.dtype == np.float32 and np.isfinite(records.reward).all()
        assert set(records.observation) == set(env.observation_specs)
        for name, spec in env.observation_specs.items():
            value = records.observation[name]
            assert (value.shape, value.dtype) == ((env.num_envs, *spec.shape), spec.dtype)
            assert np.isfinite(value).all()
            if spec.kind == 'image':
                assert value[records.is_first].max(initial=255) > 20
        was_last = records.is_last
        ends |= {bool(terminal) for terminal in records.is_terminal[records.is_last]}
    return {'terminated' if end else 'truncated' for end in ends}


def fingerprint(env_id, seed, steps=60, **changes):
    with make_pool(env_id, seed=seed, num_envs=2, **changes) as env:
        return play(env, steps)


def check_seeds(env_id, steps=60, **changes):
    first = fingerprint(env_id, 1, steps, **changes)
    assert first == fingerprint(env_id, 1, steps, **changes)
    assert first != fingerprint(env_id, 2, steps, **changes)
    code = (
        'from dreamerv3_jax import startup; startup.tune_cpu()\n'
        'from test_suites_envpool import fingerprint\n'
        f'print(fingerprint({env_id!r}, 1, {steps}, **{changes!r}))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.split()[-1] == first


def check_streams_differ(env):
    """Every stream has its own seed."""
    records = env.reset()
    actions = {'action': np.zeros((env.num_envs, 1), np.int32)}
    for _ in range(5):
        records, _ = env.step(actions)
    images = list(records.observation.values())[0]
    assert len({image.tobytes() for image in images}) == env.num_envs


class TestEnvPool:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('envpool')

    def test_cart_pole(self):
        with make_pool('envpool/CartPole-v1', num_envs=4, kwargs={'max_episode_steps': 20}) as env:
            assert isinstance(env, Native)
            assert env.observation_specs['observation'].shape == (4,)
            assert env.action_specs['action'].classes == (2,)
            assert env.messages == []
            assert check_contract(env, 200) == {'terminated', 'truncated'}
            check_streams_differ(env)

    def test_images_have_their_channels_last(self):
        with make_pool('envpool/Pong-v5', num_envs=3, image_size=64) as env:
            assert env.observation_specs['observation'].shape == (64, 64, 4)
            check_contract(env, 100)

    def test_nested_observations(self):
        kwargs = {'max_episode_steps': 30}
        with make_pool('envpool/MiniGrid-Empty-5x5-v0', num_envs=3, kwargs=kwargs) as env:
            shapes = {name: spec.shape for name, spec in env.observation_specs.items()}
            assert shapes == {'direction': (1,), 'image': (147,), 'mission': (96,)}
            assert 'truncated' in check_contract(env, 150)

    def test_rewards_of_a_reset(self):
        """EnvPool repeats there the last reward of the episode before."""
        kwargs = {'max_episode_steps': 5}
        with make_pool('envpool/CheetahRun-v1', num_envs=2, kwargs=kwargs) as env:
            assert {'position', 'velocity'} == set(env.observation_specs)
            assert check_contract(env, 30) == {'truncated'}

    @pytest.mark.parametrize('repeat', [2, 3])
    def test_repeat_of_atari(self, repeat):
        kwargs = {'noop_max': 1, 'use_fire_reset': False}
        total = []
        for held in (1, repeat):
            per_step = {'frame_skip': 1} if held == 1 else {}
            options = {'repeat': held, 'kwargs': {**kwargs, **per_step}}
            with make_pool('envpool/Pong-v5', num_envs=1, **options) as env:
                frames = env._env.config['max_episode_steps'] * env._env.config['frame_skip']
                assert held == 1 or math.isclose(frames, 108_000, abs_tol=repeat)
                env.reset()
                rewards = [env.step(discrete(2))[0].reward[0] for _ in range(600 // held)]
                total.append(np.cumsum(rewards)[:: repeat if held == 1 else 1])
        assert total[0][-1] < 0  # else nothing was compared
        assert abs(total[0][-1] - total[1][-1]) <= 1

    @pytest.mark.parametrize('name', ['CheetahRun-v1', 'CartPole-v1', 'HalfCheetah-v4'])
    def test_others_cannot_hold_actions(self, name):
        with pytest.raises(UserError, match='use env.repeat=1'):
            make_pool(f'envpool/{name}', repeat=2)

    def test_mistakes(self):
        with pytest.raises(UserError, match='did you mean .*CartPole-v1'):
            make_pool('envpool/CartPol-v1')
        with pytest.raises(UserError, match='no setting env.kwargs.max_episode_step; .*steps'):
            make_pool('envpool/CartPole-v1', kwargs={'max_episode_step': 5})
        with pytest.raises(UserError, match='has 2 players'):
            make_pool('envpool/ConnectFour-v1')
        with pytest.raises(UserError, match='no setting env.kwargs.seed'):
            make_pool('envpool/CartPole-v1', kwargs={'seed': 5})
        for vectorization in ('sync', 'async'):
            with pytest.raises(UserError, match="use env.vectorization='auto'"):
                make_pool('envpool/CartPole-v1', vectorization=vectorization)

    @pytest.mark.medium
    @pytest.mark.parametrize('name', ['Pong-v5', 'CheetahRun-v1'])
    def test_seeds(self, name):
        check_seeds(f'envpool/{name}')

    def test_pictures(self):
        with make_pool('envpool/CartPole-v1', render=True, num_envs=2) as env:
            env.reset()
            picture = env.render()
            assert (picture.shape, picture.dtype) == ((400, 600, 3), np.uint8)
        with make_pool('envpool/CheetahRun-v1', render=True, num_envs=2) as env:
            env.reset()
            assert env.render() is None


@pytest.mark.medium
def test_a_run_and_its_evaluation(tmp_path, quick_compilation):
    """Fewer episodes than environments: fewer environments play them."""
    pytest.importorskip('envpool')
    config = tiny_runs.run_config('envpool/CartPole-v1', env__num_envs=4, env__vectorization='auto')
    with tiny_runs.ticked(config, tmp_path, 40) as trainer:
        trainer.save()
    result = evaluation.evaluate(tmp_path, episodes=3)
    assert len(result['returns']) == 3
    assert result['returns'] == [float(length) for length in result['lengths']]


@pytest.mark.usefixtures('qt')
class TestProcGen:
    @pytest.mark.parametrize('name', ['coinrun', 'starpilot'])
    def test_contract(self, name):
        with make_pool(f'procgen/{name}', num_envs=8) as env:
            assert env.observation_specs['observation'].shape == (64, 64, 3)
            assert env.action_specs['action'].classes == (15,)
            assert env.messages == []
            config = env._env.config
            assert (config['num_levels'], config['start_level']) == (0, 0)
            assert config['distribution_mode'] == 1  # hard
            assert 'terminated' in check_contract(env, 500)
            check_streams_differ(env)

    def test_time_limit_truncates(self):
        with make_pool('procgen/leaper', num_envs=1) as env:
            env.reset()
            steps, last = 0, False
            while not last:
                records, _ = env.step(discrete(4))  # stands still
                last = records.is_last[0]
                steps += 1
            assert (steps, records.is_terminal[0]) == (500, False)

    @pytest.mark.medium
    def test_all_games(self):
        from dreamerv3_jax.envs.procgen import GAMES

        assert len(GAMES) == 16
        for game in GAMES:
            with make_pool(f'procgen/{game}', num_envs=1) as env:
                assert env.reset().observation['observation'].max() > 20

    def test_levels(self):
        kwargs = {'num_levels': 1, 'start_level': 7, 'distribution': 'easy'}
        with make_pool('procgen/coinrun', num_envs=2, kwargs=kwargs) as env:
            first, second = env.reset().observation['observation']
            np.testing.assert_array_equal(first, second)

    def test_mistakes(self, monkeypatch):
        with pytest.raises(UserError, match='did you mean .*coinrun'):
            make_pool('procgen/coinrunn')
        with pytest.raises(UserError, match='no setting env.kwargs.levels; it has distribution,'):
            make_pool('procgen/coinrun', kwargs={'levels': 5})
        with pytest.raises(UserError, match='distributions easy, hard, .* not .extreme'):
            make_pool('procgen/coinrun', kwargs={'distribution': 'extreme'})
        with pytest.raises(UserError, match='use env.repeat=1'):
            make_pool('procgen/coinrun', repeat=2)

        for error, words in [
            ('libQt5Gui.so.5: cannot open shared object file', 'Qt 5; .* libqt5core5a libqt5gui5'),
            ('EnvPool Procgen requires the system Qt 5 runtime', 'Qt 5; .* libqt5gui5.$'),
            ('libGL.so.1: cannot open shared object file', 'the library libGL.so.1.$'),
        ]:
            monkeypatch.setattr('envpool.make_spec', Mock(side_effect=ImportError(error)))
            with pytest.raises(UserError, match=f'needs {words}'):
                make_pool('procgen/coinrun')

    def test_pictures(self):
        with make_pool('procgen/coinrun', render=True, num_envs=2) as env:
            records = env.reset()
            np.testing.assert_array_equal(env.render(), records.observation['observation'][0])


@pytest.mark.medium
@pytest.mark.usefixtures('quick_compilation')
class TestCraftax:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('craftax')

    def test_time_limit_and_logs(self):
        with make_pool('craftax/classic', num_envs=3, kwargs={'length': 60}) as env:
            assert isinstance(env, Native)
            assert env.observation_specs['observation'].shape == (1345,)
            assert env.action_specs['action'].classes == (17,)
            assert 'truncated' in check_contract(env, 150)
            logs = taken_logs(env)
            assert len(logs) == 23
            assert 0 < logs['achievements'] < 22
            assert env._env._step_all._cache_size() == 1
            assert env._env._restart._cache_size() == 1

    @pytest.mark.slow
    def test_death_terminates(self):
        with make_pool('craftax/classic', num_envs=8, kwargs={'length': 10_000}) as env:
            assert check_contract(env, 500) == {'terminated'}
            check_streams_differ(env)

    @pytest.mark.slow
    def test_pictures_and_seeds(self):
        def look(seed):
            settings = {'kwargs': {'pixels': True}, 'num_envs': 2, 'image_size': 64}
            with make_pool('craftax/classic', seed=seed, render=True, **settings) as env:
                assert env.messages == []
                assert env.observation_specs['observation'].shape == (64, 64, 3)
                result = play(env, 20)
                picture = env.render()
                assert (picture.shape, picture.dtype) == ((144, 144, 3), np.uint8)
                assert picture.max() > 100
                return result

        assert look(1) == look(1) != look(2)

    @pytest.mark.slow
    def test_the_larger_game(self):
        with make_pool('craftax/full', num_envs=2) as env:
            assert env.observation_specs['observation'].shape == (8268,)
            assert env.action_specs['action'].classes == (43,)
            check_contract(env, 30)

    def test_mistakes(self):
        with pytest.raises(UserError, match=r'craftax/classic and craftax/full'):
            make_pool('craftax/clasic')
        with pytest.raises(UserError, match='no setting env.kwargs.pixel; it has pixels, length'):
            make_pool('craftax/classic', kwargs={'pixel': True})
        with pytest.raises(UserError, match='use env.repeat=1'):
            make_pool('craftax/classic', repeat=2)
