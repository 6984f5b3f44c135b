"""Suites that speak dm_env: bsuite, and the manipulation tasks of dm_control."""

import gzip
import struct

import numpy as np
import pytest
from test_suites import check_seeds, discrete, inner, make, random_actions
from toy_envs import taken_logs

from dreamerv3_jax.errors import UserError


def still(env):
    """Returns actions that do nothing."""
    return {'action': np.zeros((env.num_envs, *env.action_specs['action'].shape), np.float32)}


class TestBehaviourSuite:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('bsuite')

    @pytest.mark.medium
    def test_every_family_runs(self, mnist):
        from bsuite import sweep

        families = dict.fromkeys(name.partition('/')[0] for name in sweep.SWEEP)
        assert len(families) == 23
        rng = np.random.default_rng(0)
        for family in families:
            with make(f'bsuite/{family}/0', kwargs={'mnist': mnist}) as env:
                records, ends = env.reset(), 0
                for _ in range(1100):
                    assert records.observation['observation'].dtype == np.float32
                    assert not (records.is_first & (records.reward != 0)).any()
                    assert not (records.is_terminal & ~records.is_last).any()
                    ends += records.is_last.sum()
                    records, _ = env.step(random_actions(env, rng))
                assert env.messages == []
            assert ends > 0, family

    def test_specs(self):
        for name, size, actions in (
            ('catch/0', 50, 3),
            ('bandit/0', 1, 11),
            ('deep_sea/20', 2500, 2),
            ('memory_size/16', 42, 2),
        ):
            with make(f'bsuite/{name}') as env:
                assert env.observation_specs['observation'].shape == (size,)
                assert env.action_specs['action'].classes == (actions,)

    def test_unknown_names(self):
        with pytest.raises(UserError, match='did you mean .*catch/1'):
            make('bsuite/catch/111')
        with pytest.raises(UserError, match='did you mean .*memory_len/1'):
            make('bsuite/memory_length/1')
        with pytest.raises(UserError, match='names are <family>/<number>'):
            make('bsuite/xyz')

    def test_the_end_of_a_task_terminates_and_logs_what_is_scored(self):
        with make('bsuite/memory_len/0') as env:
            for episode in range(1, 4):
                bit = env.reset().observation['observation'][0, 2]
                env.step(discrete(0))
                records, _ = env.step(discrete(int(bit > 0)))  # repeats the bit
                assert records.is_last[0]
                assert records.is_terminal[0]
                assert records.reward[0] == 1.0
                logs = taken_logs(env)
                assert logs['total_perfect'] == episode
                assert logs['total_regret'] == 0.0
            bit = env.reset().observation['observation'][0, 2]
            env.step(discrete(0))
            assert env.step(discrete(int(bit < 0)))[0].reward[0] == -1.0
            assert taken_logs(env)['total_regret'] == 2.0

    def test_repeat(self):
        with make('bsuite/catch/0', repeat=4) as env:
            env.reset()
            lasts = [env.step(discrete(1))[0].is_last[0] for _ in range(3)]
        assert lasts == [False, False, True]  # nine steps

    @pytest.mark.parametrize('name', ['catch/0', 'bandit_noise/0', 'deep_sea_stochastic/0'])
    def test_seeds(self, name):
        check_seeds(f'bsuite/{name}', steps=60)

    def test_seeds_leave_the_task_as_its_number_says(self):
        def rewards(seed):
            with make('bsuite/bandit/0', seed=seed) as env:
                found = []
                for action in range(11):
                    env.reset()
                    found.append(env.step(discrete(action))[0].reward[0])
            return found

        assert rewards(1) == rewards(2)
        assert len(set(rewards(1))) == 11

    def test_mnist_reads_local_files(self, mnist, monkeypatch):
        with make('bsuite/mnist/0', kwargs={'mnist': mnist}) as env:
            for _ in range(5):
                image = env.reset().observation['observation'][0]
                assert image.shape == (784,)
                label = round(image[0] * 255) % 10  # as the fixture drew it
                records, _ = env.step(discrete(label))
                assert records.reward[0] == 1.0
                assert records.is_terminal[0]
        monkeypatch.setenv('BSUITE_MNIST', mnist)
        check_seeds('bsuite/mnist_noise/0', steps=20)

    def test_mnist_without_files(self, tmp_path, monkeypatch):
        monkeypatch.delenv('BSUITE_MNIST', raising=False)
        with pytest.raises(UserError, match='train-images-idx3-ubyte.gz.*no folder lacks'):
            make('bsuite/mnist/0')
        (tmp_path / 'train-images-idx3-ubyte.gz').touch()
        with pytest.raises(UserError, match='lacks train-labels-idx1-ubyte.gz, t10k-images'):
            make('bsuite/mnist_scale/3', kwargs={'mnist': str(tmp_path)})


@pytest.fixture(scope='module')
def mnist(tmp_path_factory):
    """A folder with files in the form of MNIST; every pixel of an image is its label plus 10 n."""
    folder = tmp_path_factory.mktemp('mnist')
    labels = np.arange(40, dtype=np.uint8) % 10
    brightness = labels + 10 * (np.arange(40, dtype=np.uint8) // 10)
    images = np.broadcast_to(brightness[:, None, None], (40, 28, 28))
    for part in ('train', 't10k'):
        with gzip.open(folder / f'{part}-labels-idx1-ubyte.gz', 'wb') as file:
            file.write(struct.pack('>II', 2049, 40) + labels.tobytes())
        with gzip.open(folder / f'{part}-images-idx3-ubyte.gz', 'wb') as file:
            file.write(struct.pack('>IIII', 2051, 40, 28, 28) + images.tobytes())
    return str(folder)


class TestManipulation:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip('dm_control')

    def test_specs(self):
        with make('manipulation/reach_site') as env:
            shapes = {name: spec.shape for name, spec in env.observation_specs.items()}
            assert shapes['target_position'] == (3,)
            assert shapes['jaco_arm/joints_pos'] == (12,)
            assert {spec.kind for spec in env.observation_specs.values()} == {'continuous'}
            assert env.action_specs['action'].shape == (9,)
            assert env.messages == []
            assert env.frame_rate == pytest.approx(25)
            observation, _ = inner(env).reset(seed=0)
            assert inner(env).observation_space.contains(observation)

    @pytest.mark.medium
    def test_every_task_starts(self):
        from dm_control import manipulation

        names = [name.removesuffix('_features') for name in manipulation.ALL if 'feat' in name]
        assert len(names) == 13
        for name in names:
            with make(f'manipulation/{name}') as env:
                assert env.reset().is_first.all()
                env.step(still(env))

    def test_unknown_names(self):
        with pytest.raises(UserError, match='did you mean .*reach_site'):
            make('manipulation/reach_sight')
        with pytest.raises(UserError, match='did you mean .*reach_site'):
            make('manipulation/reach_site_features')
        with pytest.raises(UserError, match="'stack_3_bricks_random_order' from pictures"):
            make('manipulation/stack_3_bricks_random_order', kwargs={'vision': True})

    def test_time_limit_truncates(self):
        with make('manipulation/reach_site', repeat=3) as env:
            env.reset()
            for step in range(84):  # 250 steps
                records, _ = env.step(still(env))
                assert records.is_last[0] == (step == 83)
            assert not records.is_terminal[0]
            assert env.step(still(env))[0].is_first[0]

    def test_poses_that_were_tried_are_not_told(self, caplog):
        with make('manipulation/reach_site') as env:
            for _ in range(20):
                env.reset()
        assert not caplog.records

    def test_vision(self, picture):
        kwargs = {'vision': True}
        with make('manipulation/reach_duplo', kwargs=kwargs) as env:
            assert env.observation_specs['front_close'].shape == (64, 64, 3)
            assert not any(name.startswith('duplo') for name in env.observation_specs)
            assert 'jaco_arm/joints_pos' in env.observation_specs
            assert env.messages == []
            image = env.reset().observation['front_close'][0]
            assert image.std() > 5
            camera = {'camera_id': 'front_close', 'height': 64, 'width': 64}
            np.testing.assert_array_equal(image, inner(env)._env.physics.render(**camera))
            observation, _ = inner(env).reset(seed=0)
            assert inner(env).observation_space.contains(observation)
        with make('manipulation/reach_site', kwargs=kwargs, image_size=48) as env:
            assert env.reset().observation['front_close'].shape == (1, 48, 48, 3)

    def test_render(self, picture):
        with make('manipulation/reach_site', render=True) as env:
            env.reset()
            assert env.render().shape == (240, 320, 3)

    def test_pictures_without_a_library(self, monkeypatch):
        make('manipulation/reach_site').close()
        monkeypatch.setenv('MUJOCO_GL', 'disabled')
        with pytest.raises(UserError, match='libegl1'):
            make('manipulation/reach_site', kwargs={'vision': True})
