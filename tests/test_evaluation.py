"""Evaluation and the player, on an environment whose returns are known."""

import contextlib
import subprocess
import sys
import types

import gymnasium
import jax
import numpy as np
import pytest
import scipy.stats
import tiny_runs
import toy_envs

import dreamerv3_jax
from dreamerv3_jax import envs, evaluation, run_folder, video_file
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.evaluation import Player, evaluate
from dreamerv3_jax.spaces import ActionAdapter, ArraySpec, ObservationAdapter

CHOICES = 3


class Blind(toy_envs.Counter):
    """Draws no pictures."""

    def __init__(self) -> None:
        super().__init__(length=2)


pytestmark = pytest.mark.usefixtures('quick_compilation', 'shared_agents')


def make_run(folder, **changes):
    """An untrained run; the actor of scale 0 finds all actions equal, and the first is its mode."""
    config = tiny_runs.run_config('toy_envs:Counter', agent__actor_output_scale=0.0, **changes)
    with tiny_runs.ticked(config, folder, 3) as trainer:
        trainer.save()
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory, quick_compilation):
    """One that is only read."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.share_agents(patch)
        return make_run(tmp_path_factory.mktemp('evaluation') / 'run', env__num_envs=3)


def lengths_of(run, seed, quota):
    """Lengths of the first episodes of each environment, which do not depend on the actions."""
    config = run_folder.read_config(run)
    found = [[] for _ in quota]
    with envs.make(config.env, run_folder.derived_seed(seed, 2**31)) as env:
        records, finals = env.reset(), None
        while any(len(one) < least for one, least in zip(found, quota, strict=True)):
            for streams, part in evaluation._in_order(records, finals):
                for stream in streams[part.is_last]:
                    row = list(streams).index(stream)
                    found[stream].append(int(part.observation['count'][row, 1]))
            actions = {'action': np.zeros((len(quota), 1), np.int32)}
            records, finals = env.step(actions)
    return sorted(sum([one[:least] for one, least in zip(found, quota, strict=True)], []))


def test_another_environment(run):
    env = run_folder.read_config(run).env
    env.kwargs.length = 2
    assert evaluate(run, episodes=4, env=env)['lengths'] == [2] * 4
    assert env.num_envs == 3 and 'length' not in run_folder.read_config(run).env.kwargs
    env.id = 'CartPole-v1'
    env.kwargs = {}
    with pytest.raises(UserError, match='other spaces'):
        evaluate(run, episodes=4, env=env)


@pytest.mark.parametrize('autoreset', ['next_step', 'same_step'])
def test_returns_and_lengths(autoreset, tmp_path):
    """Each environment plays its share, however short the episodes of the others are."""
    run = make_run(tmp_path, env__num_envs=3, env__autoreset=autoreset)
    result = evaluate(run, episodes=11, seed=5)
    lengths, returns = np.array(result['lengths']), np.array(result['returns'])
    assert sorted(lengths.tolist()) == lengths_of(run, 5, quota=[4, 4, 3])
    # The mode is action 0, so that step n pays 10 n.
    np.testing.assert_array_equal(returns, 10 * lengths * (lengths + 1) / 2)
    assert result['mean'] == returns.mean()
    low, high = scipy.stats.t.interval(0.95, 10, loc=returns.mean(), scale=scipy.stats.sem(returns))
    np.testing.assert_allclose(result['ci95'], (high - low) / 2)


def test_confidence_interval_by_hand(run):
    """Of 2 values it is t = 12.7062 times half of their difference."""
    for seed in range(9):
        result = evaluate(run, episodes=2, seed=seed)
        difference = abs(result['returns'][0] - result['returns'][1])
        np.testing.assert_allclose(result['ci95'], 12.706204736 * difference / 2, rtol=1e-6)
        if difference:
            break
    else:
        pytest.fail('all episodes are equal')
    assert np.isnan(evaluate(run, episodes=1)['ci95'])


def test_samples_differ_from_the_mode(run):
    options = dict(episodes=6, seed=1)
    mode, sample = evaluate(run, **options), evaluate(run, **options, sample=True)
    assert mode == evaluate(run, **options)
    assert sample == evaluate(run, **options, sample=True)
    # The same episodes; the sampled actions 0, 1, 2 pay themselves on top.
    extra = np.array(sorted(sample['returns'])) - sorted(mode['returns'])
    assert sum(mode['lengths']) == sum(sample['lengths'])
    assert 0 < extra.sum() <= 2 * sum(mode['lengths'])
    assert evaluate(run, episodes=6, seed=2)['returns'] != mode['returns']


def test_player(run):
    """As a library, one environment or many."""
    env = toy_envs.Counter(length=4)
    observations, actions = (
        ObservationAdapter(env.observation_space),
        ActionAdapter(env.action_space),
    )
    player = Player(str(run), observations.specs, actions.specs)
    observation, ended, total, is_first = env.reset(seed=0)[0], False, 0.0, True
    while not ended:
        flat = {name: value[None] for name, value in observations.convert(observation).items()}
        action = actions.convert(player.act(flat, np.array([is_first])), 0)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended, is_first = total + reward, terminated or truncated, False
    assert total == 10 + 20 + 30 + 40

    count, rng = 64, np.random.default_rng(0)
    flat = tiny_runs.random_arrays(observations.specs, (count,), rng)
    first = np.ones(count, bool)
    found = {}
    for sample in (False, True):
        many = [
            Player(run, observations.specs, actions.specs, count=count, seed=seed, sample=sample)
            for seed in (0, 0, 1)
        ]
        found[sample] = [one.act(flat, first)['action'][:, 0].tolist() for one in many]
        again = many[0].act(flat, first)['action'][:, 0].tolist()
        assert found[sample][0] == found[sample][1]
        assert (again == found[sample][0]) == (not sample)
    assert {*found[False][0], *found[False][2]} == {0}
    assert found[True][0] != found[True][2]
    assert np.bincount(found[True][0], minlength=CHOICES).min() > count / CHOICES / 2
    assert {len(x.devices()) for x in jax.tree.leaves(many[0]._params)} == {1}


def test_the_newest_checkpoint_is_played(tmp_path):
    config = tiny_runs.run_config('toy_envs:Counter', agent__actor_output_scale=0.0)
    with tiny_runs.ticked(config, tmp_path, 1) as trainer:
        for best in (1, 2):
            trainer.tick()
            params = dict(trainer._learner.state.params)
            bias = jax.nn.one_hot(best, CHOICES)
            params['actor'] = params['actor'] | {
                'logits_action': params['actor']['logits_action'] | {'bias': bias}
            }
            trainer._learner.state = trainer._learner.state.replace(params=params)
            trainer.save()
    result = evaluate(tmp_path, episodes=4)
    lengths = np.array(result['lengths'])
    expected = 10 * lengths * (lengths + 1) / 2 + 2 * lengths
    np.testing.assert_array_equal(result['returns'], expected)


@pytest.mark.parametrize('ending', ['mp4', 'gif'])
def test_video(ending, run, tmp_path):
    pytest.importorskip('imageio_ffmpeg')
    path = tmp_path / 'new folder' / f'film.{ending}'
    result = evaluate(run, episodes=1, video=path)
    # In another process, because the reader forks, which JAX warns of.
    code = """if True:
        import sys, imageio.v3 as iio
        about = iio.immeta(sys.argv[1])
        print(about.get('fps') or 1000 / about['duration'], *iio.imread(sys.argv[1]).shape)
    """
    read = subprocess.run(
        [sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=True
    )
    rate, frames, *shape = map(float, read.stdout.split())
    assert rate == 20 and result['filmed'] == 1  # as the environment says
    assert frames == result['lengths'][0] + 1  # with the first and the last observation
    assert shape == [4 * 43, 6 * 43, 3]  # 4 x 6 pixels, enlarged to more than 256


def test_the_episode_of_the_video_is_named(run, tmp_path):
    pytest.importorskip('imageio')
    import PIL.Image

    result = evaluate(run, episodes=9, seed=4, video=tmp_path / 'film.gif')
    assert result['filmed'] > 1  # another environment was done before
    with PIL.Image.open(tmp_path / 'film.gif') as film:
        assert film.n_frames == result['lengths'][result['filmed'] - 1] + 1


def test_a_gif_that_grows_too_large_is_refused(tmp_path, monkeypatch):
    pytest.importorskip('imageio')
    monkeypatch.setattr(video_file, 'MOST_GIF_BYTES', 2 * 172 * 258 * 3)
    with pytest.raises(UserError, match=r'film.gif is too long for a .gif, .* write .* as .mp4'):
        with video_file.Film(tmp_path / 'film.gif') as film:
            film.frame_rate = 20.0
            for _ in range(3):
                film.add(np.zeros((4, 6, 3), np.uint8))
    with video_file.Film(tmp_path / 'film.gif') as film:
        film.frame_rate = 20.0
        for _ in range(2):
            film.add(np.zeros((4, 6, 3), np.uint8))
    assert (tmp_path / 'film.gif').stat().st_size > 100


def test_a_video_that_is_not_whole_is_told(small_disk):
    pytest.importorskip('imageio_ffmpeg')
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    path = small_disk.folder / 'film.mp4'
    for room in True, False:
        if not room:
            small_disk.fill(pages_left=2)
        with (
            contextlib.nullcontext() if room else pytest.raises(UserError, match='is the disk full')
        ):
            with video_file.Film(path) as film:
                film.frame_rate = 20.0
                for picture in noise:
                    film.add(picture)
        if room:
            data = path.read_bytes()
            assert len(data) > 3 * 4096
            for size in (0, 40, len(data) // 2, len(data) - 1):
                path.write_bytes(data[:size])
                assert not video_file._complete(path)
            path.unlink()


@pytest.mark.parametrize('name', ['file/film.mp4', 'folder.gif'])
def test_video_that_cannot_be_written(run, tmp_path, name):
    pytest.importorskip('imageio_ffmpeg')
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.gif').mkdir()
    episodes = []
    with pytest.raises(UserError, match=f'Cannot write the video .*{name}'):
        evaluate(run, episodes=9, video=tmp_path / name, report=lambda *x: episodes.append(x))
    assert len(episodes) < 9, 'it was told after all of them'


def test_an_error_beside_a_video_that_cannot_be_written(tmp_path):
    """What went wrong first is what is told."""
    pytest.importorskip('imageio')
    (tmp_path / 'folder.gif').mkdir()
    with pytest.raises(ZeroDivisionError), video_file.Film(tmp_path / 'folder.gif') as film:
        film.frame_rate = 30.0
        film.add(np.zeros((5, 7, 3), np.uint8))
        raise ZeroDivisionError


def test_pictures_of_any_size(tmp_path):
    pytest.importorskip('imageio_ffmpeg')
    for shape in ((5, 7, 3), (301, 201, 3)):
        with video_file.Film(tmp_path / 'film.mp4') as film:
            film.add(np.zeros(shape, np.uint8))
        assert (tmp_path / 'film.mp4').stat().st_size > 500


def test_pictures_from_observations():
    specs = {'state': ArraySpec('continuous', (2,)), 'view': ArraySpec('image', (4, 5, 1))}
    env = types.SimpleNamespace(render=lambda: None, observation_specs=specs)
    records = envs.empty_records(specs, 2)
    records.observation['view'][:] = [[[[7]]], [[[9]]]]
    picture = video_file.picture(env, records)
    assert picture.shape == (4, 5, 3) and (picture == 7).all()


def test_no_pictures(tmp_path):
    pytest.importorskip('imageio_ffmpeg')
    config = tiny_runs.run_config('test_evaluation:Blind', agent__actor_output_scale=0.0)
    with tiny_runs.ticked(config, tmp_path / 'run', 1) as trainer:
        trainer.save()
    with pytest.raises(UserError, match='draws no pictures'):
        evaluate(tmp_path / 'run', episodes=1, video=tmp_path / 'film.mp4')
    assert not (tmp_path / 'film.mp4').exists()


def test_missing_package(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'imageio', None)
    with pytest.raises(UserError, match=r'in the clone, pip install -e "\.\[video\]"'):
        evaluate(run, episodes=1, video=tmp_path / 'film.mp4')


def test_missing_run(tmp_path):
    for function in (lambda: evaluate(tmp_path, episodes=1), lambda: Player(tmp_path, {}, {})):
        with pytest.raises(UserError, match='holds no run: config.json cannot be read'):
            function()
    with tiny_runs.ticked(tiny_runs.run_config('toy_envs:Counter'), tmp_path, 1):
        pass
    with pytest.raises(UserError, match='holds no checkpoint yet'):
        evaluate(tmp_path, episodes=1)
    assert not (tmp_path / 'checkpoints').exists() or not list((tmp_path / 'checkpoints').iterdir())


def test_other_spaces(run):
    specs = tiny_runs.specs(gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(CHOICES))
    with pytest.raises(
        UserError, match='with other spaces .*observation.count.shape: .2. then, absent'
    ):
        Player(run, *specs)


def test_library_names():
    assert dreamerv3_jax.evaluate is evaluate and dreamerv3_jax.Player is Player
