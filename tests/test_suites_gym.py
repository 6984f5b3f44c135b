"""Suites behind gymnasium's interface or close to it, on the real packages."""

import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from test_suites import check_seeds, discrete, inner, make, play, random_actions
from toy_envs import taken_logs

from dreamerv3_jax.envs import mujoco, text
from dreamerv3_jax.errors import UserError

FRAMES = 300  # of ViZDoom's basic scenario


def shapes(env):
    return {name: spec.shape for name, spec in env.observation_specs.items()}


def play_to_the_end(env, *, most=5000):
    """Returns the number of steps of an episode of random actions, and its last record."""
    rng = np.random.default_rng(0)
    assert env.reset().is_first.all()
    for step in range(1, most + 1):
        records, _ = env.step(random_actions(env, rng))
        if records.is_last[0]:
            return step, records
    raise AssertionError('the episode did not end')


@pytest.fixture
def picture():
    mujoco.choose_renderer()
    if os.environ.get('MUJOCO_GL') in mujoco.NO_RENDERER:
        pytest.skip('no OpenGL library')


class TestMinigrid:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('minigrid')

    def test_specs(self):
        with make('minigrid/DoorKey-8x8-v0') as env:
            assert shapes(env) == {'image': (147,), 'direction': (1,), 'mission': (512,)}
            assert env.observation_specs['image'].classes == (11,) * 49 + (6,) * 49 + (3,) * 49
            assert env.action_specs['action'].classes == (7,)
            assert env.messages == []

    def test_names(self):
        make('minigrid/MiniGrid-Empty-5x5-v0').close()
        with make('minigrid/MultiRoom-N4-S5') as env:
            assert inner(env).spec.id == 'MiniGrid-MultiRoom-N4-S5-v1'
        with make('minigrid/MultiRoom-N4-S5-v0') as env:
            assert inner(env).spec.id == 'MiniGrid-MultiRoom-N4-S5-v0'
        with pytest.raises(UserError, match='did you mean .*BabyAI-GoToLocal-v0'):
            make('minigrid/BabyAI-GotoLocal-v0')

    def test_view(self):
        with make('minigrid/Empty-5x5-v0') as env:
            things, colours, _ = env.reset().observation['image'].reshape(3, 7, 7)
            # The green goal is two cells ahead and two to the right of the agent, at (3, 6).
            assert (things[5, 4], colours[5, 4]) == (8, 1)
            assert np.count_nonzero(things == 8) == 1

    def test_mission(self):
        with make('minigrid/BabyAI-GoToLocal-v0') as env:
            seen = env.reset().observation['mission'][0]
            np.testing.assert_array_equal(seen, text.embed(inner(env).mission))

    def test_goal_terminates_and_time_limit_truncates(self):
        with make('minigrid/Empty-5x5-v0') as env:
            env.reset()
            for action in (2, 2, 1, 2, 2):
                records, _ = env.step(discrete(action))
            assert records.is_terminal[0]
            assert records.reward[0] > 0.9
            assert env.step(discrete(2))[0].is_first[0]
            for _ in range(100):
                records, _ = env.step(discrete(0))
            assert records.is_last[0]
            assert not records.is_terminal[0]

    def test_vision(self):
        with make('minigrid/DoorKey-8x8-v0', kwargs={'vision': True}) as env:
            assert shapes(env) == {'image': (64, 64, 3), 'direction': (1,), 'mission': (512,)}
            assert env.reset().observation['image'].std() > 5
        kwargs = {'vision': True}
        with make('minigrid/Empty-5x5-v0', kwargs=kwargs, image_size=96, repeat=2) as env:
            assert env.reset().observation['image'].shape == (1, 96, 96, 3)

    def test_seeds(self, capfd):
        check_seeds('minigrid/BabyAI-GoToLocal-v0', steps=100)
        assert not capfd.readouterr().out

    @pytest.mark.medium
    def test_every_environment(self):
        for name in list(gymnasium.registry):
            if name.startswith(('MiniGrid-', 'BabyAI-')) and '-WFC-' not in name:
                with make(f'minigrid/{name}') as env:
                    play(env, 10)


class TestPopgym:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('popgym')

    def test_names(self):
        with make('popgym/RepeatPreviousEasy') as env:
            assert env.observation_specs['observation'].classes == (4,)
        with pytest.raises(UserError, match='did you mean .*CountRecallEasy-v0'):
            make('popgym/CountRecalEasy-v0')

    def test_endings(self):
        with make('popgym/RepeatPreviousEasy-v0') as env:
            _, records = play_to_the_end(env)
            assert records.is_terminal[0]
        with make('popgym/PositionOnlyPendulumEasy-v0', repeat=3) as env:
            steps, records = play_to_the_end(env)
            assert steps == 67  # of 200
            assert not records.is_terminal[0]

    @pytest.mark.medium
    def test_every_environment(self):
        from popgym.envs import ALL

        assert len(ALL) >= 42
        for entry in ALL.values():
            name = entry['id'].removeprefix('popgym-')
            prints = []
            for _ in range(2):
                with make(f'popgym/{name}', seed=3) as env:
                    prints.append(play(env, 120))
                    assert env.messages == []
            assert prints[0] == prints[1], name

    def test_seeds(self):
        check_seeds('popgym/AutoencodeEasy-v0', steps=150)


class TestMemoryMaze:
    @pytest.fixture(autouse=True)
    def package(self, picture):
        if importlib.util.find_spec('memory_maze') is None:  # alone it cannot be imported
            pytest.skip('memory_maze is not installed')

    def test_specs_and_names(self):
        with make('memorymaze/9x9') as env:
            assert shapes(env) == {'observation': (64, 64, 3)}
            assert env.action_specs['action'].classes == (6,)
            assert env.messages == []
            assert env.reset().observation['observation'].std() > 5
        assert 'gym' not in sys.modules
        with pytest.raises(UserError, match='A maze is one of 9x9, 11x11, 13x13, 15x15'):
            make('memorymaze/9x11')

    @staticmethod
    def simulation(env):
        from dm_control import composer

        found = inner(env)._env
        while not isinstance(found, composer.Environment):
            found = found.env
        return found

    def test_the_ball_that_is_asked_for_pays(self):
        with make('memorymaze/9x9') as env:
            env.reset()
            maze = self.simulation(env)
            rewards = []
            for offset in (0, 1):  # the right ball and a wrong one
                ball = maze.task._targets[(maze.task._current_target_ix + offset) % 3]
                position = maze.physics.bind(ball.geom).xpos
                maze.task._walker.set_pose(maze.physics, [*position[:2], 0])
                rewards.append(env.step(discrete(0))[0].reward[0])
        assert rewards == [1, 0]

    def test_time_limit_truncates(self):
        with make('memorymaze/9x9', repeat=2, image_size=48, render=True) as env:
            assert env.reset().observation['observation'].shape == (1, 48, 48, 3)
            assert env.render().shape == (48, 48, 3) and env.render().std() > 5
            self.simulation(env)._time_limit = 1 - 1e-3  # of 250 seconds
            for _ in range(2):  # steps are a quarter of a second
                records, _ = env.step(discrete(0))
            assert records.is_last[0]
            assert not records.is_terminal[0]
            assert env.step(discrete(0))[0].is_first[0]

    @pytest.mark.medium
    def test_seeds(self):
        check_seeds('memorymaze/9x9', steps=8)


class TestMetaworld:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('metaworld')

    def test_specs_and_names(self):
        with make('metaworld/reach') as env:
            assert shapes(env) == {'observation': (39,)}
            assert env.action_specs['action'].shape == (4,)
            assert env.messages == []
            first = env.reset().observation['observation'][0]
            assert first[36:].any()  # the goal
            assert (first != env.reset().observation['observation'][0]).any()
        make('metaworld/drawer_open').close()
        with pytest.raises(UserError, match='did you mean .*drawer-open'):
            make('metaworld/drawer-opn')

    def test_time_limit_truncates(self):
        with make('metaworld/reach', repeat=3) as env:
            steps, records = play_to_the_end(env)
            assert steps == 167  # of 500
            assert not records.is_terminal[0]

    @pytest.mark.parametrize('skilled', [False, True])
    def test_success_is_logged(self, skilled):
        with make('metaworld/reach') as env:
            records = env.reset()
            while not records.is_last[0]:
                seen = records.observation['observation'][0]
                action = np.clip(10 * (seen[36:] - seen[:3]), -1, 1) if skilled else np.ones(3)
                action = np.append(action, 0).astype(np.float32)[None]
                records, _ = env.step({'action': action})
            assert taken_logs(env)['success'] == skilled

    @pytest.mark.medium
    def test_every_task(self):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        assert len(ALL_V3_ENVIRONMENTS) == 50
        for name in ALL_V3_ENVIRONMENTS:
            with make(f'metaworld/{name}') as env:
                play(env, 3)

    def test_render(self, picture):
        with make('metaworld/reach', render=True) as env:
            env.reset()
            assert env.render().std() > 5


class TestRobotics:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('gymnasium_robotics')

    def test_specs_and_names(self):
        with make('robotics/FetchReach') as env:
            assert inner(env).spec.id == 'FetchReach-v4'
            assert shapes(env) == {
                'observation': (10,),
                'achieved_goal': (3,),
                'desired_goal': (3,),
            }
            assert env.messages == []
        with pytest.raises(UserError, match='did you mean .*FetchReach-v4'):
            make('robotics/FetchReech-v4')

    @pytest.mark.parametrize('skilled', [False, True])
    def test_success_is_logged_and_time_limit_truncates(self, skilled):
        with make('robotics/FetchReach-v4') as env:
            records, steps = env.reset(), 0
            while not records.is_last[0]:
                seen = records.observation
                wanted = seen['desired_goal'] - seen['achieved_goal']
                action = np.clip(10 * wanted, -1, 1) if skilled else np.ones((1, 3))
                action = np.append(action, [[0]], 1).astype(np.float32)
                records, _ = env.step({'action': action})
                steps += 1
            assert steps == 50
            assert not records.is_terminal[0]
            assert taken_logs(env)['success'] == skilled

    @pytest.mark.medium
    @pytest.mark.parametrize(
        'name', ['HandReach-v3', 'AntMaze_UMaze-v5', 'AdroitHandDoor-v1', 'FrankaKitchen-v1']
    )
    def test_families(self, name):
        prints = []
        for _ in range(2):
            with make(f'robotics/{name}', seed=3) as env:
                prints.append(play(env, 30))
        assert prints[0] == prints[1]

    @pytest.mark.medium
    def test_kitchen_logs_its_tasks(self):
        with make('robotics/FrankaKitchen-v1', repeat=4) as env:
            steps, _ = play_to_the_end(env)
            assert steps == 70  # of 280
            assert taken_logs(env) == {'tasks': 0.0}

    def test_render(self, picture):
        with make('robotics/FetchReach-v4', render=True) as env:
            env.reset()
            assert env.render().std() > 5


class TestVizdoom:
    @pytest.fixture(autouse=True)
    def package(self, monkeypatch, tmp_path):
        pytest.importorskip('vizdoom')
        monkeypatch.chdir(tmp_path)

    def test_specs_and_names(self):
        with make('vizdoom/basic') as env:
            assert shapes(env) == {'image': (64, 64, 3), 'variables': (1,)}
            assert env.action_specs['action'].classes == (4,)
            assert env.messages == []
            records = env.reset()
            assert records.observation['image'].std() > 5
            assert records.observation['variables'][0] == 50  # bullets
        with make('vizdoom/predict_position', kwargs={'combine': True}, image_size=128) as env:
            assert shapes(env) == {'image': (128, 128, 3)}
            assert env.action_specs['action'].classes == (2, 2, 2)
        with pytest.raises(UserError, match='did you mean .*deadly_corridor'):
            make('vizdoom/deadly_coridor')

    @pytest.mark.parametrize('repeat', [1, 7])
    def test_time_limit_truncates(self, repeat):
        with make('vizdoom/basic', repeat=repeat) as env:
            records, steps, total = env.reset(), 0, 0.0
            while not records.is_last[0]:
                records, _ = env.step(discrete(0))
                steps += 1
                total += records.reward[0]
            assert not records.is_terminal[0]
            assert total == -FRAMES  # a point for each
            assert steps == math.ceil(FRAMES / repeat)
            assert records.observation['image'].std() > 5

    def test_death_terminates(self):
        with make('vizdoom/take_cover', repeat=4) as env:
            records = env.reset()
            while not records.is_last[0]:
                records, _ = env.step(discrete(0))
            assert records.is_terminal[0]

    @pytest.mark.medium
    def test_every_scenario(self):
        from dreamerv3_jax.envs import vizdoom

        for name in vizdoom.SCENARIOS:
            with make(f'vizdoom/{name}', kwargs={'combine': True}, repeat=4) as env:
                play(env, 20)

    @pytest.mark.skipif(sys.platform != 'linux', reason='needs Linux')
    def test_the_game_ends_with_a_process_that_is_killed(self):
        here = Path(__file__).parent
        code = (
            'from test_suites import make\n'
            'env = make("vizdoom/basic")\n'
            'env.reset()\n'
            'print(flush=True)\n'
            'input()\n'
        )
        with subprocess.Popen(
            [sys.executable, '-c', code],
            env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(here.parent), str(here)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout.readline() == b'\n'
            threads = Path(f'/proc/{process.pid}/task').glob('*/children')
            games = [Path('/proc', game) for path in threads for game in path.read_text().split()]
            assert [b'vizdoom' in (game / 'cmdline').read_bytes() for game in games] == [True]
            process.kill()
        deadline = time.monotonic() + 10

        def runs(game):
            try:
                return (game / 'cmdline').read_bytes()
            except OSError:
                return b''

        while runs(games[0]):
            assert time.monotonic() < deadline, 'the game outlives its process'
            time.sleep(0.05)

    def test_leaves_nothing_behind(self, monkeypatch, tmp_path):
        own = tmp_path / 'own'
        own.mkdir()
        monkeypatch.setattr('tempfile.tempdir', str(own))
        with make('vizdoom/basic', render=True) as env:
            env.reset()
            env.step(discrete(1))
            assert env.render().shape == (120, 160, 3)
            assert len(list(own.iterdir())) == 1
        assert list(own.iterdir()) == []
        assert [path.name for path in Path().iterdir()] == ['own']
