"""Open-loop prediction: what it may know, what it may not, and the film of it."""

import functools

import gymnasium
import jax
import numpy as np
import pytest
import tiny_agent
import tiny_runs

import dreamerv3_jax
from dreamerv3_jax import evaluation, prediction, rssm
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.prediction import Prediction
from dreamerv3_jax.types import StoredLatent

SPACES = (
    gymnasium.spaces.Dict(
        {
            'left': gymnasium.spaces.Box(0, 255, (48, 64, 3), np.uint8),
            'right': gymnasium.spaces.Box(0, 255, (48, 64), np.uint8),
            'speed': gymnasium.spaces.Box(-1, 1, (1,), np.float32),
        }
    ),
    gymnasium.spaces.Discrete(4),
)
B, T, OBSERVED = tiny_runs.SEQUENCES, tiny_runs.STEPS, 3


pytestmark = pytest.mark.usefixtures('quick_compilation')


class Steps(gymnasium.Env):
    """Its picture is as bright as ten times the number of the step; episodes have three steps."""

    metadata = {'render_modes': ['rgb_array'], 'render_fps': 20}

    def __init__(self, render_mode=None):
        self.observation_space = gymnasium.spaces.Box(0, 255, (48, 48, 1), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._step = 0
        return np.zeros((48, 48, 1), np.uint8), {}

    def step(self, action):
        self._step += 1
        return np.full((48, 48, 1), 10 * self._step, np.uint8), 1.0, self._step == 3, False, {}


@functools.cache
def make_agent():
    return Agent.from_spaces(*SPACES, tiny_runs.agent_config())


@functools.cache
def params():
    """Pictures that differ visibly."""
    return tiny_agent.perturbed(jax.device_get(make_agent().init(0).params), seed=1, scale=0.5)


@functools.cache
def batch():
    """The second half of the sequences begins an episode at step 3 of the T, unseen."""
    agent = make_agent()
    return tiny_runs.random_batch(agent.observation_specs, agent.action_specs, seed=0)


@functools.cache
def compiled():
    agent = make_agent()
    return jax.jit(
        functools.partial(
            prediction.open_loop,
            agent.networks,
            key=None,  # the most probable latents
            observed=OBSERVED,
            observation_specs=agent.observation_specs,
            action_specs=agent.action_specs,
            config=agent.config,
        )
    )


def predict(batch_):
    return jax.device_get(compiled()(params(), batch_))


def changed(tree, name, at, change):
    """The batch with one entry changed in all sequences, at the given steps of T + 1."""
    value = tree[name].copy()
    value[:, at] = change(value[:, at])
    return tree | {name: value}


@pytest.mark.medium
def test_pictures_of_all_images():
    found, truth = predict(batch()), batch().observation
    assert {name: x.truth.shape for name, x in found.items()} == {
        'left': (B, T, 48, 64, 3),
        'right': (B, T, 48, 64, 1),
    }
    for name, images in found.items():
        assert {x.dtype for x in images} == {np.dtype(np.uint8)}
        np.testing.assert_array_equal(images.truth, truth[name][:, 1:])
        error = images.prediction.astype(int) - images.truth
        np.testing.assert_array_equal(images.difference, np.floor((error + 255) / 2))
        assert images.prediction.std() > 5


@pytest.mark.medium
def test_the_first_steps_are_reconstructions():
    """Those of the states that the update infers from all observations."""
    agent, all_params, steps = make_agent(), params(), batch()

    @jax.jit
    def reconstruct(all_params, steps):
        later = jax.tree.map(lambda x: x[:, 1:], steps.observation)
        start = rssm.restore_latent(
            StoredLatent(steps.deter, steps.stoch), agent.config, np.float32
        )
        action = jax.nn.one_hot(steps.action['action'][:, :-1, 0], 4)
        tokens = agent.networks.encoder(all_params['encoder'], later)
        latent = rssm.observe(
            agent.networks.dynamics,
            all_params['dynamics'],
            start,
            action,
            tokens,
            steps.is_first[:, 1:],
            None,
            unimix=agent.config.unimix,
        ).latent
        return agent.networks.decoder(all_params['decoder'], latent.deter, rssm.flat(latent.stoch))

    expected, found = reconstruct(all_params, steps), predict(steps)
    for name, images in found.items():
        error = np.abs(images.prediction - 255 * np.asarray(expected[name])).max((0, 2, 3, 4))
        assert (error[:OBSERVED] < 0.51).all(), error  # by rounding
        assert (error[OBSERVED:] > 0.51).all(), error


@pytest.mark.medium
def test_what_the_prediction_depends_on():
    """On what was observed and on the actions before a step, not on what is seen later."""
    steps = batch()
    before = predict(steps)
    unseen = slice(OBSERVED + 1, None)
    observation = steps.observation
    for name in observation:
        observation = changed(observation, name, unseen, np.zeros_like)
    after = predict(steps._replace(observation=observation))
    for name, images in after.items():
        np.testing.assert_array_equal(images.prediction, before[name].prediction)
        assert (images.truth[:, OBSERVED:] == 0).all()

    def difference(**changes):
        found = predict(steps._replace(**changes))['left'].prediction
        return (found != before['left'].prediction).any((2, 3, 4))  # [B, T]

    # The action of step 6 of T + 1 leads to that of index 6 of T.
    found = difference(action=changed(steps.action, 'action', 6, lambda x: (x + 1) % 4))
    assert not found[:, :6].any() and found[:, 6:].all()
    found = difference(observation=changed(steps.observation, 'left', OBSERVED, lambda x: 255 - x))
    assert not found[:, : OBSERVED - 1].any() and found[:, OBSERVED - 1].any()
    # What begins anew knows nothing of what was before.
    assert steps.is_first[1:, OBSERVED + 1].all() and not steps.is_first[0].any()
    found = difference(deter=-steps.deter)
    assert found[:, :OBSERVED].all() and found[0].all() and not found[1:, OBSERVED:].any()


@pytest.mark.medium
def test_agent_compiles_once():
    agent = make_agent()
    for seed in (0, 1):
        found = agent.open_loop(params(), batch(), observed=OBSERVED, seed=(seed, 0))
        assert found['right'].prediction.shape == (B, T, 48, 64, 1)
    assert agent._open_loop._cache_size() == 1


def test_video_by_hand():
    """One column for each sequence, and three rows for each image."""

    def image(value, channels):
        return np.broadcast_to(np.uint8(value)[..., None, None, None], (2, 3, 1, 1, channels))

    number = 10 * np.arange(2)[:, None] + np.arange(3)  # sequence, step
    film = prediction.video(
        {
            'a': Prediction(image(number, 3), image(number + 100, 3), image(number + 200, 3)),
            'b': Prediction(image(number + 50, 1), image(number + 150, 1), image(number + 7, 1)),
        }
    )
    assert film.shape == (3, 6, 2, 3) and film.dtype == np.uint8
    assert film[1, :, :, 0].tolist() == [
        [1, 11], [101, 111], [201, 211], [51, 61], [151, 161], [8, 18],
    ]  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize('autoreset', ['next_step', 'same_step'])
def test_run(autoreset, shared_agents, tmp_path):
    """Each sequence goes on from the reset, and truth is what the environment shows."""
    pytest.importorskip('imageio')
    config = tiny_runs.run_config('test_prediction:Steps', env__autoreset=autoreset)
    with tiny_runs.ticked(config, tmp_path / 'run', 2) as trainer:
        trainer.save()
    found = dreamerv3_jax.open_loop(
        tmp_path / 'run', sequences=3, length=6, observed=2, seed=4, video=tmp_path / 'film.gif'
    )
    (images,) = found.values()
    assert images.prediction.shape == (3, 6, 48, 48, 1)
    np.testing.assert_array_equal(images.truth[..., 0, 0, 0], [[10, 20, 30, 0, 10, 20]] * 3)
    again = dreamerv3_jax.open_loop(tmp_path / 'run', sequences=3, length=6, observed=2, seed=4)
    np.testing.assert_array_equal(again['observation'].prediction, images.prediction)
    from PIL import Image

    with Image.open(tmp_path / 'film.gif') as film:
        assert film.n_frames > 1 and film.size == (2 * 3 * 48, 2 * 3 * 48)  # enlarged


def test_mistakes(shared_agents, tmp_path):
    for wrong in (dict(sequences=0), dict(observed=0), dict(length=5, observed=5)):
        with pytest.raises(UserError, match='nothing to predict in'):
            evaluation.open_loop(tmp_path, **wrong)
    with pytest.raises(UserError, match='holds no run'):
        evaluation.open_loop(tmp_path)
    with tiny_runs.ticked(tiny_runs.run_config('toy_envs:Counter'), tmp_path, 1) as trainer:
        trainer.save()
    with pytest.raises(UserError, match='observes no pictures'):
        evaluation.open_loop(tmp_path)
