"""Whole runs: what is stored, when it is trained on, and that a run goes on where it stopped."""

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import gymnasium
import jax
import numpy as np
import pytest
import tiny_runs
import toy_envs
from tiny_runs import SEQUENCES, STEPS

from dreamerv3_jax import checkpoint, envs, evaluation, loop, policy, run_folder, update
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.errors import Failure, UserError
from dreamerv3_jax.interrupts import Interrupted
from dreamerv3_jax.loop import Trainer

COUNTER = 'toy_envs:Counter'
BATCH_STEPS = SEQUENCES * STEPS


pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture
def fresh_agents():
    """For tests that have to begin with nothing compiled."""


@pytest.fixture(autouse=True)
def shared_agents(monkeypatch, request):
    if 'fresh_agents' not in request.fixturenames:
        tiny_runs.share_agents(monkeypatch)


def counter_config(**changes):
    return tiny_runs.run_config(COUNTER, **changes)


def stored(trainer):
    """Everything in the replay, [streams, records, ...] by name."""
    arrays = trainer._replay.state()['arrays']
    return {name.removeprefix('data/'): array.copy() for name, array in arrays.items()}


def due(steps, first_steps, ratio):
    """How many updates there must have been."""
    return 1 + int((steps - first_steps) * Fraction(str(ratio)) / BATCH_STEPS)


# Content of the replay.


@pytest.mark.parametrize(
    ('autoreset', 'end'),
    [('next_step', 'terminated'), ('next_step', 'truncated'), ('same_step', 'terminated')],
)
def test_replay_holds_the_true_stream(autoreset, end, tmp_path):
    """Both ways to reset store the same stream: 0, 1, 2, 3 (last), 0, 1, ... with its actions."""
    config = counter_config(env__autoreset=autoreset, env__kwargs={'length': 3, 'end': end})
    with tiny_runs.ticked(config, tmp_path, 11) as trainer:
        data, counters = stored(trainer), trainer.counters
    records = {'next_step': 11, 'same_step': 14}[autoreset]  # three ends came on top of 11 records
    assert data['count'].tolist() == [records, records]
    step, episode = np.arange(records) % 4, np.arange(records) // 4 + 1
    np.testing.assert_array_equal(data['is_first'], [step == 0] * 2)
    np.testing.assert_array_equal(data['is_last'], [step == 3] * 2)
    terminal = (step == 3) & (end == 'terminated')
    np.testing.assert_array_equal(data['is_terminal'], [terminal] * 2)
    np.testing.assert_array_equal(data['observation/count'], [np.stack([episode, step], 1)] * 2)
    action = data['action/action'][..., 0]
    assert set(action[:, step != 3].ravel().tolist()) == {0, 1, 2}
    assert not action[:, step == 3].any()
    before = np.roll(action, 1, 1)
    np.testing.assert_array_equal(
        data['observation/action'][..., 0], np.where(step == 0, 3, before)
    )
    np.testing.assert_array_equal(data['reward'], np.where(step == 0, 0, 10 * step + before))
    # Resets are no steps of the agent: 3 of 4 records in one way, every tick in the other.
    steps = 2 * {'next_step': 9, 'same_step': 11}[autoreset]
    assert (counters['ticks'], counters['steps'], counters['frames']) == (11, steps, steps)
    assert counters['episodes'] == 2 * 3


def test_action_repeat_counts_frames(tmp_path):
    config = counter_config(env__repeat=2, env__kwargs={'length': 4})
    with tiny_runs.ticked(config, tmp_path, 5) as trainer:
        data, counters = stored(trainer), trainer.counters
    assert data['observation/count'][0, :, 1].tolist() == [0, 2, 4, 0, 2]
    assert (counters['steps'], counters['frames']) == (8, 16)


def test_stored_latents_are_those_of_the_policy(tmp_path):
    config = counter_config()
    with tiny_runs.ticked(config, tmp_path, 12) as trainer:
        data, specs = stored(trainer), (trainer._env.observation_specs, trainer._env.action_specs)
    agent = Agent(*specs, config.agent)
    params, state = agent.init(config.seed).params, agent.initial_policy_state(2)
    for tick in range(12):
        observation = {name: data[f'observation/{name}'][:, tick] for name in specs[0]}
        is_first = data['is_first'][:, tick]
        state, actions, latent = agent.policy(
            params, state, observation, is_first, (config.seed, tick)
        )
        np.testing.assert_array_equal(data['deter'][:, tick], latent.deter)
        np.testing.assert_array_equal(data['stoch'][:, tick], latent.stoch)
        taken = np.where(data['is_last'][:, tick, None], 0, actions['action'])
        np.testing.assert_array_equal(data['action/action'][:, tick], taken)
    assert data['has_latent'].all()


class Spy:
    """Follows a trainer through its agent and its replay, and keeps its own copy of the latents."""

    def __init__(self, trainer, monkeypatch):
        self.trainer = trainer
        self.latents = {}  # by name, [2, records, ...]
        self.policy_calls = 0
        self._params = trainer._learner.state.params
        self._act, self._update = trainer._agent.policy, trainer._agent.update
        self._sample = trainer._replay.sample
        self._drawn, self._made = [], []  # batches not yet used, and updates not written back
        monkeypatch.setattr(trainer._agent, 'policy', self.policy)
        monkeypatch.setattr(trainer._agent, 'update', self.update)
        monkeypatch.setattr(trainer._replay, 'sample', self.sample)

    def policy(self, params, *args, **options):
        newest = {name: self._params[name] for name in params}
        jax.tree.map(np.testing.assert_array_equal, params, newest)
        self.policy_calls += 1
        result = self._act(params, *args, **options)
        for name, value in result[2]._asdict().items():
            self.latents.setdefault(name, []).append(np.array(value))
        return result

    def sample(self):
        """Is called while an update is under way; those before have to be written back by now."""
        self.write_back(but=1)
        batch, index = self._sample()
        self._drawn.append(index)
        for name in ('deter', 'stoch'):
            before = np.stack(self.latents[name], 1)[index.stream, index.first]
            np.testing.assert_array_equal(batch[name], before)
        data = stored(self.trainer)
        for row, (stream, first) in enumerate(zip(*index, strict=True)):
            count = data['observation/count'][stream, first : first + STEPS + 1]
            np.testing.assert_array_equal(batch['observation/count'][row], count)
        assert not batch['is_first'][batch['observation/count'][..., 1] != 0].any()
        return batch, index

    def update(self, state, batch):
        result = self._update(state, batch)
        self._params = result[0].params
        self._made.append((self._drawn.pop(0), jax.tree.map(np.array, result[1])))
        return result

    def write_back(self, but=0):
        """Does what the trainer must have done by now."""
        while len(self._made) > but:
            index, latents = self._made.pop(0)
            for row, (stream, first) in enumerate(zip(*index, strict=True)):
                for step in range(STEPS):
                    for name, value in latents._asdict().items():
                        self.latents[name][first + 1 + step][stream] = value[row, step]


@pytest.mark.parametrize(('nodes', 'on_disk', 'share'), [
    (['here', 'here', 'there'], False, 2 / 3), (['here', 'here', 'there'], True, 1),
])  # fmt: skip
def test_hosts_need_memory_of_their_machine_and_one_disk(
    nodes, on_disk, share, tmp_path, monkeypatch
):
    checked, config = [], counter_config(replay__on_disk=on_disk)
    monkeypatch.setattr(
        loop, 'check_memory', lambda _, *arguments, resumed: checked.append((*arguments, resumed))
    )
    monkeypatch.setattr(loop.platform, 'node', lambda: 'here')
    monkeypatch.setattr(
        loop.hosts, 'gather', lambda own: nodes if own == 'here' else [own] * len(nodes)
    )
    folder = tmp_path / 'run' / 'replay' if on_disk else None
    for resumed in (False, True):
        with Trainer(config, tmp_path / 'run', 'tiny') as trainer:
            trainer.save()
        assert checked.pop() == (config.replay.capacity, folder, share, resumed)


def test_a_host_that_fails_tells_the_others(tmp_path, monkeypatch):
    told, error = [], UserError('It broke.')
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer, monkeypatch.context() as patch:
        patch.setattr(loop.hosts, 'count', lambda: 2)
        patch.setattr(loop.agreement, 'agree', lambda own: told.append(own) or own)
        with pytest.raises(UserError, match='It broke'), trainer._environments():
            raise error
        assert told[-1].failed and error in loop.hosts._all_know
        patch.setattr(loop.agreement, 'agree', lambda own: own._replace(failed=1))
        with pytest.raises(Failure, match='Another host cannot go on') as others:
            trainer._agree()
        assert others.value in loop.hosts._all_know
    loop.hosts._all_know.clear()


def test_a_signal_during_a_reset_ends_the_tick(tmp_path, monkeypatch):
    """Other hosts, who hear of it right after, would else go on without the one that was told."""
    with Trainer(counter_config(), tmp_path, 'tiny') as trainer:
        reset = trainer._env.reset

        def told():
            trainer._interrupts.received.append(signal.SIGTERM)
            return reset()

        monkeypatch.setattr(trainer._env, 'reset', told)
        trainer.tick()
        assert trainer.counters['ticks'] == 0


@pytest.mark.medium
def test_training_ticks(tmp_path, monkeypatch):
    """Parameters, latents and the number of updates are right after every single tick."""
    ratio, first_steps, updates = 20.5, None, []
    config = counter_config(replay__train_ratio=ratio)
    with Trainer(config, tmp_path, 'tiny') as trainer:
        spy = Spy(trainer, monkeypatch)
        for _ in range(45):
            trainer.tick()
            steps = trainer.counters['steps']
            if first_steps is None and len(trainer._replay) > BATCH_STEPS:
                first_steps = steps
            expected = 0 if first_steps is None else due(steps, first_steps, ratio)
            updates.append(trainer.counters['updates'])
            assert updates[-1] == expected == int(trainer._learner.state.updates)
        trainer._learner.finish()
        spy.write_back()
        data = stored(trainer)
    assert spy.policy_calls == 45 and max(np.diff(updates)) == 2 and updates[-1] > 20
    for name, value in spy.latents.items():
        np.testing.assert_array_equal(data[name], np.stack(value, 1))


@pytest.mark.medium
def test_an_update_starts_before_the_environments_do(tmp_path, monkeypatch):
    """It is the devices' next work; the others that are due come once the environments step."""
    order = []
    with Trainer(counter_config(replay__train_ratio=20.5), tmp_path, 'tiny') as trainer:

        def noted(name, function):
            return lambda *args: (order.append(name), function(*args))[1]

        parts = ((trainer._agent, 'update'), (trainer._env, 'start'), (trainer._replay, 'add'))
        for owner, name in parts:
            monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
        while trainer.counters['updates'] < 20:
            trainer.tick()
    seen = ' '.join(order)
    assert 'add update start add update' in seen and 'start update' not in seen


@pytest.mark.medium
def test_a_device_of_its_own_acts_by_parameters_one_update_old(tmp_path, monkeypatch):
    config = counter_config(mesh__acting=True, replay__train_ratio=10.0)
    with Trainer(config, tmp_path, 'tiny') as trainer:
        agent, states = trainer._agent, [jax.device_get(trainer._learner.state.params)]
        policy, update = agent.policy, agent.update

        def spied_update(state, batch):
            result = update(state, batch)
            states.append(jax.device_get(result[0].params))
            return result

        def spied_policy(params, *args, **options):
            assert {x.device for x in jax.tree.leaves(params)} == {jax.local_devices()[-1]}
            expected = {name: states[max(0, len(states) - 2)][name] for name in params}
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)
            return policy(params, *args, **options)

        monkeypatch.setattr(agent, 'update', spied_update)
        monkeypatch.setattr(agent, 'policy', spied_policy)
        while trainer.counters['updates'] < 10:
            trainer.tick()
        assert len(states) == 11
        assert trainer._policy_state.latent.deter.device == jax.local_devices()[-1]
        trainer.save()  # a run that goes on has the newest parameters only
        assert trainer._learner._acting_params is None


@pytest.mark.medium
def test_compiles_once(tmp_path, monkeypatch, fresh_agents):
    traces = []

    def count(module, name):
        function = getattr(module, name)

        @functools.wraps(function)
        def counted(*args, **options):
            traces.append(name)
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)

    count(update, 'compute_gradients')
    count(update, 'apply_gradients')
    count(policy, 'act')
    loop.train(counter_config(run__steps=60), tmp_path, 'tiny')
    assert sorted(traces) == ['act', 'apply_gradients', 'compute_gradients']


# Whole runs.


@pytest.mark.usefixtures('shared_agents')
def test_devices_with_a_queue_do_the_same(tmp_path):
    """Accelerators are given the next update before the one whose parameters act is awaited."""
    found, update, wait = [], Agent.update, jax.block_until_ready
    for queues in (False, True):
        made, ahead = [], []  # metrics of updates; how many were started after one that is awaited

        def noted_update(*arguments, made=made):
            result = update(*arguments)
            made.append(result[2])
            return result

        def noted_wait(awaited, made=made, ahead=ahead):
            ahead.extend(len(made) - 1 - k for k, metrics in enumerate(made) if metrics is awaited)
            return wait(awaited)

        with (
            Trainer(counter_config(), tmp_path / str(queues), 'tiny') as trainer,
            pytest.MonkeyPatch.context() as patch,
        ):
            agent, trainer._learner._queues = trainer._agent, queues
            patch.setattr(agent, 'update', functools.partial(noted_update, agent))
            patch.setattr(jax, 'block_until_ready', noted_wait)
            for _ in range(30):
                trainer.tick()
            # None is begun where no step was made, as all environments began new episodes.
            assert len(made) > 5 and max(ahead, default=0) == int(queues)
            trainer._learner.finish()
            found.append((jax.device_get(trainer._learner.state.params), stored(trainer)))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.medium
def test_runs_are_deterministic(tmp_path, fresh_agents):
    config = tiny_runs.run_config('Pendulum-v1', run__steps=90, replay__train_ratio=128.0)
    finals = []
    for name in ('one', 'other'):
        with Trainer(config, tmp_path / name, 'tiny') as trainer:
            trainer.run()
            finals.append((jax.tree.map(np.array, trainer._learner.state), stored(trainer)))
    one, other = (tiny_runs.read_metrics(tmp_path / name) for name in ('one', 'other'))
    assert one == other and one[-1]['count/updates'] > 200
    losses = [line['train/loss/total'] for line in one if 'train/loss/total' in line]
    assert len(losses) > 20 and np.isfinite(losses).all()
    jax.tree.map(np.testing.assert_array_equal, *finals)
    action = finals[0][1]['action/action']
    assert action.dtype == np.float32 and np.abs(action).max() > 1  # stored as sampled


@pytest.mark.medium
@pytest.mark.parametrize('on_disk', [False, True])
def test_resume(on_disk, tmp_path, capsys):
    folder = tmp_path / 'run'
    config = counter_config(replay__on_disk=on_disk, run__steps=60)
    with Trainer(config, folder, 'tiny') as trainer:
        trainer.run()
        before, data = dict(trainer.counters), stored(trainer)
        state, ratio = (
            jax.tree.map(np.array, trainer._learner.state),
            trainer._learner.ratio.state(),
        )
    assert 60 <= before['frames'] < 62 and before['updates'] > 20
    rings = {path.name for path in (folder / 'replay').glob('*')} if on_disk else set()
    assert ('deter.ring' in rings) == on_disk
    lines = (folder / 'metrics.jsonl').read_text()
    with (folder / 'metrics.jsonl').open('a') as file:  # of a crash after the last checkpoint
        file.write('{"step": 999, "time": 1.0}\n{"step": 10')
    capsys.readouterr()

    config.run.steps = 100
    with Trainer(config, folder, 'tiny') as trainer:
        assert trainer.counters == before
        assert trainer._learner.ratio.state() == ratio
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer._learner.state), state)
        for name, value in stored(trainer).items():
            np.testing.assert_array_equal(value, data[name])
        assert (folder / 'metrics.jsonl').read_text() == lines
        trainer.run()
        after = trainer.counters
        # One update per step, before and after.
        assert after['updates'] - before['updates'] == after['steps'] - before['steps']
    assert f'Going on at {before["frames"]} frames and {before["updates"]} updates' in (
        capsys.readouterr().out
    )
    assert (folder / 'metrics.jsonl').read_text().startswith(lines)
    metrics = tiny_runs.read_metrics(folder)
    updates = [line['count/updates'] for line in metrics]
    steps = [line['step'] for line in metrics]
    assert steps == sorted(steps) and updates == sorted(updates) and updates[-1] == after['updates']

    loop.train(config, folder, 'tiny')  # the same again
    assert 'The run is complete; go on with --config.run.steps above' in capsys.readouterr().out
    assert tiny_runs.read_metrics(folder) == metrics


def test_replay_on_disk_is_the_same(tmp_path):
    found = []
    for name, on_disk in (('memory', False), ('disk', True)):
        config = counter_config(replay__on_disk=on_disk)
        with tiny_runs.ticked(config, tmp_path / name, 6) as trainer:
            found.append(stored(trainer))
        assert any((tmp_path / name).rglob('deter*.ring')) == on_disk
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name])


@pytest.mark.medium
def test_resume_without_replay(tmp_path):
    config = counter_config(run__checkpoint_replay=False)
    with tiny_runs.ticked(config, tmp_path, 5) as trainer:
        trainer.save()
    with Trainer(config, tmp_path, 'tiny') as trainer:
        assert trainer.counters['ticks'] == 5 and len(trainer._replay) == 0
        before = trainer.counters['updates']
        while not trainer._replay.can_sample:
            trainer.tick()
        trainer.tick()  # what was missed meanwhile is not made up for at once
        assert 0 < trainer.counters['updates'] - before <= 4


@pytest.mark.medium
def test_an_interrupt_ends_the_updates_of_a_tick(tmp_path):
    config = counter_config(replay__train_ratio=256.0)
    with Trainer(config, tmp_path, 'tiny') as trainer:
        while not trainer.counters['updates']:
            trainer.tick()
        trainer._interrupts.received.append(2)
        before = trainer.counters['updates']
        with pytest.raises(Interrupted):  # rather than wait for the environments
            trainer.tick()
        assert trainer.counters['updates'] == before
        trainer._interrupts.received.clear()
        trainer.tick()  # the updates of both ticks
        missed = trainer.counters['updates'] - before
        trainer.tick()
        assert missed > trainer.counters['updates'] - before - missed > 0


def test_what_a_checkpoint_counts_is_in_the_metrics(tmp_path):
    """Or it would be lost with the lines that come after the checkpoint, if the run is killed."""
    config = counter_config(run__checkpoint_every=1e-9, run__log_every=1e9, run__steps=60)
    with Trainer(config, tmp_path, 'tiny') as trainer:
        trainer.run()
    before = [line for line in tiny_runs.read_metrics(tmp_path) if line['step'] < 60]
    assert len(before) > 10 and before[-1]['count/episodes'] > 0
    first = next(line for line in before if line['count/updates'] > 0)
    assert 'train/loss/total' in first  # of the update that was under way, too


def test_a_run_without_checkpoint_starts_anew(tmp_path):
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.log()
    assert tiny_runs.read_metrics(tmp_path)[0]['step'] > 0
    with Trainer(counter_config(seed=1), tmp_path, 'tiny') as trainer:
        assert tiny_runs.read_metrics(tmp_path) == [] and trainer.counters['ticks'] == 0


def test_a_run_whose_checkpoints_were_taken_away_is_not_begun_anew(tmp_path):
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.log()
        trainer.save()
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    (tmp_path / 'checkpoints').rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='holds a run without its checkpoints; bring them back to'):
        Trainer(counter_config(), tmp_path, 'tiny')
    assert before and (tmp_path / 'metrics.jsonl').read_bytes() == before
    (tmp_path / 'elsewhere').rename(tmp_path / 'checkpoints')
    with Trainer(counter_config(), tmp_path, 'tiny') as trainer:
        assert trainer.counters['ticks'] == 3


def test_a_run_whose_checkpoints_were_deleted_begins_anew_beside_its_metrics(tmp_path):
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.log()
        trainer.save()
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    shutil.rmtree(tmp_path / 'checkpoints' / '3')
    with Trainer(counter_config(), tmp_path, 'tiny') as trainer:
        assert trainer.counters['ticks'] == 0
    assert before and (tmp_path / 'metrics-before-1.jsonl').read_bytes() == before


def test_settings_are_checked_in_python_too(tmp_path):
    config = counter_config()
    config.replay.trainratio = 512.0
    with pytest.raises(UserError, match='did you mean config.replay.train_ratio'):
        loop.train(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_too_little_memory_names_smaller_sizes(tmp_path, monkeypatch):
    def tick(trainer):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

    monkeypatch.setattr(Trainer, 'tick', tick)
    words = 'too small for these networks, or another process holds it; choose a smaller'
    with pytest.raises(UserError, match=words):
        loop.train(counter_config(), tmp_path, 'tiny')


def test_save_before_the_first_step(tmp_path, capsys):
    with tiny_runs.ticked(counter_config(), tmp_path, 0) as trainer:
        trainer.save()
    with Trainer(counter_config(), tmp_path, 'tiny') as trainer:
        assert trainer.counters['ticks'] == 0
    assert 'Going on at 0 frames' in capsys.readouterr().out


def test_every_start_plays_other_episodes(tmp_path):
    found = []
    for _ in range(2):
        with tiny_runs.ticked(tiny_runs.run_config('Pendulum-v1'), tmp_path, 3) as trainer:
            trainer.save()
            found.append(stored(trainer)['observation/observation'])
    assert found[1].shape[1] == 6
    np.testing.assert_array_equal(found[1][:, :3], found[0])
    assert np.all(found[1][:, 3] != found[0][:, 0])


@pytest.mark.medium
@pytest.mark.parametrize('vectorization', ['sync', 'async', 'native'])
def test_seeds_follow_from_the_checkpoint_that_is_taken(vectorization, tmp_path):
    """Not from the damaged one before it: going on from there once more is the same run."""
    config = counter_config(env__id='CartPole-v1', env__vectorization=vectorization)
    for _ in range(2):
        with tiny_runs.ticked(config, tmp_path, 3) as trainer:
            trainer.save()
    (tmp_path / 'checkpoints' / '6' / 'replay' / 'count.npy').write_bytes(b'')
    found = []
    for _ in range(2):
        with tiny_runs.ticked(config, tmp_path, 3) as trainer:
            assert trainer.counters['ticks'] == 6
            found.append(stored(trainer)['observation/observation'])
    np.testing.assert_array_equal(*found)


def test_other_settings_are_refused(tmp_path):
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.save()
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    config = counter_config(
        seed=1, agent__units=16, env__kwargs={'length': 3}, run__steps=50, run__log_every=3.0
    )
    with pytest.raises(UserError) as error:
        loop.train(config, tmp_path, 'tiny')
    assert str(error.value) == (
        f'{tmp_path} holds a run with other settings (agent.units: 8 then, 16 now; '
        'env.kwargs.length: absent then, 3 now; seed: 0 then, 1 now); choose another folder with '
        '--config.logdir, or the same settings.'
    )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    changes = dict(run__steps=50, mesh__fsdp=2, logdir='x', env__timeout=9.0)
    run_folder.check(tmp_path, counter_config(**changes))


def test_other_spaces_are_refused(tmp_path, monkeypatch):
    """The environment may have changed behind the same settings."""
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.save()
    build = toy_envs.Counter.__init__

    def build_other(self, **kwargs):
        build(self, **kwargs)
        self.observation_space['count'] = gymnasium.spaces.Box(-1, 1, (3,))
        self.observation_space.spaces['new'] = gymnasium.spaces.Discrete(2)
        self.action_space = gymnasium.spaces.Discrete(2)

    monkeypatch.setattr(toy_envs.Counter, '__init__', build_other)
    words = (
        f'{tmp_path} holds a run with other spaces (action.action.classes: [3] then, [2] now; '
        'observation.count.shape: [2] then, [3] now; observation.new.classes: absent then, [2] now;'
        ' observation.new.kind: absent then, discrete now; observation.new.shape: absent then, [1] '
        'now); take an environment with the same spaces, or another run.'
    )
    for play in (
        lambda: loop.train(counter_config(), tmp_path, 'tiny'),
        lambda: evaluation.evaluate(tmp_path, episodes=1),
    ):
        with pytest.raises(UserError) as error:
            play()
        assert str(error.value) == words
    (tmp_path / 'spaces.json').write_text('{')
    with pytest.raises(UserError, match='spaces.json is damaged'):
        loop.train(counter_config(), tmp_path, 'tiny')


def test_who_waited_while_another_process_trained_sees_its_run(tmp_path, monkeypatch):
    """The folder is locked before it is looked at: nobody starts anew over a fresh checkpoint."""
    tmp_path.joinpath('run').mkdir()
    make = envs.make

    def train_elsewhere(config, seed, part):
        with pytest.raises(UserError, match='is in use by process'):
            run_folder.Lock(tmp_path / 'run')
        return make(config, seed)

    monkeypatch.setattr(envs, 'make', train_elsewhere)
    with Trainer(counter_config(), tmp_path / 'run', 'tiny'):
        pass


def test_who_found_no_folder_does_not_begin_over_another_run(tmp_path, monkeypatch):
    make = envs.make

    def train_elsewhere(config, seed, part):
        monkeypatch.setattr(envs, 'make', make)
        with tiny_runs.ticked(counter_config(), tmp_path / 'run', 3) as trainer:
            trainer.save()
        return make(config, seed)

    monkeypatch.setattr(envs, 'make', train_elsewhere)
    with pytest.raises(UserError, match='Another process has begun a run in .* meanwhile'):
        Trainer(counter_config(), tmp_path / 'run', 'tiny')
    with Trainer(counter_config(), tmp_path / 'run', 'tiny') as trainer:
        assert trainer.counters['ticks'] == 3


def test_checkpoints_without_their_settings_are_refused(tmp_path):
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.save()
    (tmp_path / 'config.json').unlink()
    with pytest.raises(UserError, match='config.json cannot be read'):
        Trainer(counter_config(seed=1), tmp_path, 'tiny')


def test_what_fails_to_start_leaves_nothing_open(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(envs.vector.InProcess, 'close', lambda self: closed.append(self))
    monkeypatch.setattr(loop, 'MetricWriter', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        Trainer(counter_config(), tmp_path, 'tiny')
    assert error and len(closed) == 1
    run_folder.Lock(tmp_path)


def test_settings_of_an_older_version(tmp_path):
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.save()
    path = tmp_path / 'config.json'
    settings = json.loads(path.read_text())
    del settings['env']['timeout'], settings['checksum']
    path.write_text(json.dumps(settings))
    assert run_folder.read_config(tmp_path).env.timeout == counter_config().env.timeout
    run_folder.check(tmp_path, counter_config())


def test_settings_are_on_the_disk_when_the_run_begins(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, 'fsync', lambda file: synced.append(os.readlink(f'/proc/self/fd/{file}'))
    )
    with Trainer(counter_config(), tmp_path, 'tiny'):
        names = [
            f'{tmp_path}{name}' for name in ('/config.json.draft', '', '/spaces.json.draft', '')
        ]
        assert synced == names


def test_changed_settings_are_damaged(tmp_path):
    with tiny_runs.ticked(counter_config(), tmp_path, 3) as trainer:
        trainer.save()
    path = tmp_path / 'config.json'
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match='config.json is damaged: it is not what was written'):
        run_folder.read_config(tmp_path)


def test_a_second_process_is_refused_and_a_dead_one_forgotten(tmp_path):
    code = (
        'import pathlib, sys, time\n'
        'from dreamerv3_jax import run_folder\n'
        'lock = run_folder.Lock(pathlib.Path(sys.argv[1]))\n'
        'print("locked", flush=True)\n'
        'time.sleep(60)\n'
    )
    config = counter_config()
    with subprocess.Popen(
        [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == 'locked\n'
        with pytest.raises(UserError, match=f'is in use by process {other.pid} of .*; stop it, or'):
            loop.train(config, tmp_path, 'tiny')
        assert [path.name for path in tmp_path.iterdir()] == ['lock']
        other.kill()
    lock = run_folder.create(tmp_path, config, {}, {})
    with pytest.raises(UserError, match=f'in use by process {os.getpid()} of'):
        run_folder.Lock(tmp_path)
    lock.close()
    run_folder.Lock(tmp_path)


def test_settings_survive(tmp_path):
    config = counter_config(env__kwargs={'sizes': (1, 2), 'names': {'a': None}})
    run_folder.create(tmp_path, config, {}, {})
    run_folder.check(tmp_path, config)
    assert run_folder.read_config(tmp_path).env.kwargs.names.a is None
    with pytest.raises(UserError, match='env.kwargs takes numbers, text, lists'):
        run_folder.create(tmp_path, counter_config(env__kwargs={'x': {1, 2}}), {}, {})
    run_folder.check(tmp_path, config)
    (tmp_path / 'config.json').write_text('{"seed": 1')
    with pytest.raises(UserError, match='config.json is damaged'):
        run_folder.check(tmp_path, config)
    with pytest.raises(UserError, match='holds no run: config.json cannot be read'):
        run_folder.read_config(tmp_path / 'other')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='Cannot write to'):
        run_folder.create(tmp_path / 'file', config, {}, {})


def test_messages(tmp_path, capsys):
    folder = tmp_path / 'run'
    config = counter_config(replay__train_ratio=64.0, env__kwargs={'length': 3})
    with Trainer(config, folder, 'mine') as trainer:
        step_bytes = sum(
            array.nbytes // array.shape[1] // 2
            for name, array in trainer._replay._by_stream().items()
        )
        counts = trainer._agent.parameter_counts()
    text = capsys.readouterr().out
    for words in (
        f'{folder} (preset mine, seed 0)',
        'toy_envs:Counter, 2 in parallel, repeat 1',
        'action: 4 choices, count: 2 numbers',
        'action: 3 choices',
        f'{sum(counts.values()):,} (own widths)',
        f'dynamics {counts["dynamics"]:,}',
        '8 cpu',
        'mesh data=1 fsdp=1',
        f'2,000 steps x {step_bytes:,} bytes = 0.00 GB of memory',
        'one update every 0.5 steps (train ratio 64), until 100 frames',
    ):
        assert words in text, words
    assert (folder / 'config.json').exists()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'mesh__data': 3}, 'A batch of 4 sequences does not divide among 3 devices'),
        ({'mesh__data': 9}, 'needs 9 devices and there are 8'),
        ({'mesh__data': -1, 'mesh__fsdp': 3}, 'mesh.fsdp=3 does not divide the 8 devices'),
        ({'replay__capacity': 10**13}, 'set --config.replay.capacity='),
        ({'env__id': 'toy_envs:fails'}, 'no such robot'),
    ],
)
def test_mistakes_leave_no_folder(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        loop.train(counter_config(**changes), tmp_path / 'run', 'tiny')
    assert not (tmp_path / 'run').exists()


def test_failing_environment(tmp_path):
    config = counter_config(env__kwargs={'length': 9, 'fail_at': 4})
    with pytest.raises(UserError, match='the robot fell over'):
        tiny_runs.ticked(config, tmp_path, 20)


def test_restarted_environments_are_counted_and_their_episodes_cut(tmp_path, capsys):
    kwargs = {'length': 9, 'fail_at': 4, 'once': str(tmp_path / 'failed')}
    with tiny_runs.ticked(counter_config(env__kwargs=kwargs), tmp_path / 'run', 12) as trainer:
        trainer.log(final=True)
        data = stored(trainer)
        assert trainer.counters['restarts'] == 1
    assert 'the robot fell over' in capsys.readouterr().out
    assert tiny_runs.read_metrics(tmp_path / 'run')[-1]['count/restarts'] == 1
    steps = data['observation/count'][0, :12, 1].tolist()
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert np.flatnonzero(data['is_first'][0, :12]).tolist() == [0, 4]


def test_no_sequence_joins_what_an_environment_did_before_and_after_it_failed(tmp_path):
    config = counter_config(env__num_envs=16, env__kwargs={'length': 30}, replay__train_ratio=0.5)
    with Trainer(config, tmp_path, 'tiny') as trainer:
        for tick in range(21):
            if tick in (7, 11):
                env = trainer._env._streams[5]._env
                env._fail_at = env._step + 1
            trainer.tick()
        assert trainer.counters['restarts'] == 2
        cuts = 0
        for _ in range(100):
            batch, index = trainer._replay.sample()
            step = batch['observation/count'][..., 1]
            cut = step[:, 1:] != step[:, :-1] + 1
            np.testing.assert_array_equal(cut, batch['is_last'][:, :-1])
            np.testing.assert_array_equal(cut, batch['is_first'][:, 1:])
            assert not batch['is_terminal'].any() and (index.stream[cut.any(1)] == 5).all()
            cuts += cut.sum()
        assert cuts > 5


def test_an_environment_that_only_fails_stops_the_run_in_the_end(tmp_path):
    config = counter_config(env__num_envs=16, env__kwargs={'length': 9})
    words = (
        'Environment 5 of toy_envs:Counter failed: ValueError: the robot fell over .* again 3 times'
    )
    with Trainer(config, tmp_path, 'tiny') as trainer, pytest.raises(Failure, match=words):
        for _ in range(20):
            trainer._env._streams[5]._env._fail_at = 2
            trainer.tick()
    assert trainer.counters['restarts'] == 3


# Updates that are not finite.


def spoil(trainer, monkeypatch, spoilt):
    """Makes the updates of these numbers, from 1, come back as skipped because of a loss."""
    original, numbers = trainer._agent.update, itertools.count(1)

    def update(state, batch):
        state, latents, metrics = original(state, batch)
        if next(numbers) in spoilt:
            nan = np.float32(np.nan)
            metrics |= {'loss/reward': nan, 'loss/total': nan, 'optimizer/skipped': np.float32(1)}
            latents = jax.tree.map(lambda x: np.full_like(x, 77), latents)
        return state, latents, metrics

    monkeypatch.setattr(trainer._agent, 'update', update)


@pytest.mark.medium
def test_skipped_updates_are_counted_and_leave_the_replay_alone(tmp_path, monkeypatch, capsys):
    with Trainer(counter_config(), tmp_path, 'tiny') as trainer:
        spoil(trainer, monkeypatch, spoilt={3, 4, 6})
        while trainer.counters['updates'] < 8:
            trainer.tick()
        trainer.log(final=True)
        trainer.save()
        assert trainer.counters['skipped'] == 3
        assert not (stored(trainer)['deter'] == 77).any()
        assert not (stored(trainer)['stoch'] == 77).any()
    lines = [line for line in capsys.readouterr().out.splitlines() if 'is skipped' in line]
    assert [line.split(' is skipped, as ')[0] for line in lines] == ['Update 3', 'Update 6']
    assert all('as loss/reward is not finite; nothing has changed' in line for line in lines)
    written = tiny_runs.read_metrics(tmp_path)[-1]
    assert written['train/optimizer/skipped'] == 3 / 8 and written['count/skipped'] == 3
    assert np.isfinite(written['train/loss/reward'])
    with Trainer(counter_config(), tmp_path, 'tiny') as trainer:
        assert trainer.counters['skipped'] == 3


def test_every_loss_is_named(tmp_path, capsys):
    with tiny_runs.ticked(counter_config(), tmp_path, 0) as trainer:
        names = sorted(update.loss_scales(trainer._agent.observation_specs, trainer._agent.config))
        for name in [*names, None]:
            losses = {f'loss/{other}': 0.0 if other != name else np.nan for other in names}
            trainer._learner._count_skipped(
                losses | {'loss/total': np.nan, 'optimizer/skipped': 1.0}
            )
            trainer.counters['skipped_in_a_row'] = 0
        assert trainer.counters['skipped'] == len(names) + 1 == 10
    out = capsys.readouterr().out
    for name in [*(f'loss/{name}' for name in names), 'the gradient']:
        assert f'is skipped, as {name} is not finite; nothing has changed.' in out


@pytest.mark.medium
@pytest.mark.parametrize('seconds', [1e-9, 1e9])  # found at a checkpoint, and in a tick
def test_what_led_to_an_error_is_in_the_metrics(seconds, tmp_path, monkeypatch):
    config = counter_config(run__checkpoint_every=seconds, run__log_every=1e9, run__steps=10_000)
    with Trainer(config, tmp_path, 'tiny') as trainer:
        spoil(trainer, monkeypatch, spoilt=range(5, 100))
        with pytest.raises(Failure, match='10 updates in a row were skipped'):
            trainer.run()
    assert tiny_runs.read_metrics(tmp_path)[-1]['count/skipped'] == 10


@pytest.mark.medium
def test_too_many_skipped_updates_stop_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    config = counter_config(run__checkpoint_every=1e-9, run__steps=10_000)
    with Trainer(config, tmp_path, 'tiny') as trainer:
        spoil(trainer, monkeypatch, spoilt=range(5, 100))
        with pytest.raises(Failure, match='10 updates in a row were skipped, as loss/reward is'):
            trainer.run()
        assert trainer.counters['updates'] == 14
    with Trainer(config, tmp_path, 'tiny') as trainer:
        assert 4 <= trainer.counters['updates'] < 14
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(trainer._learner.state))


@pytest.mark.medium
def test_a_full_disk_costs_checkpoints_only(small_disk, capsys):
    folder = small_disk.folder / 'run'
    config = counter_config(run__checkpoint_every=1e-9, run__steps=10_000)

    def checkpoints():
        return sorted(path.name for path in (folder / 'checkpoints').iterdir())

    with tiny_runs.ticked(config, folder, 20) as trainer:
        trainer.save()
        before = checkpoints()
        small_disk.fill()
        for _ in range(5):
            trainer.tick()
            trainer._try_to_save()
        assert before == checkpoints() == ['20']  # and nothing half done
        with pytest.raises(UserError, match='Cannot write the checkpoint'):
            trainer.save()  # as at the end of the run
    out = capsys.readouterr().out
    text = 'No space left on device; make room for it, those before it are kept. Training goes on; '
    assert out.count(f'{text}the next attempt is in') == 5
    small_disk.empty()
    with Trainer(config, folder, 'tiny') as trainer:
        assert trainer.counters['ticks'] == 20
        trainer.tick()
        trainer._try_to_save()
    assert checkpoints() == ['20', '21']


def test_a_complete_run_leaves_the_replay_out_where_there_is_no_room(small_disk, capsys):
    folder = small_disk.folder / 'run'
    config = counter_config(run__steps=20, replay__capacity=100_000, replay__on_disk=False)
    with Trainer(config, folder, 'tiny') as trainer:
        fill = np.zeros(4_000_000, np.uint8)  # more than the disk holds
        state = trainer._learner.feed.state
        trainer._learner.feed.state = lambda: {**state(), 'arrays': state()['arrays'] | {'x': fill}}
        trainer.run()
    out = capsys.readouterr().out
    assert 'No space left on device' in out and 'Saving without the replay, to collect anew' in out
    assert 'Done.' in out
    with Trainer(
        counter_config(run__steps=40, replay__capacity=100_000), folder, 'tiny'
    ) as trainer:
        assert trainer.counters['frames'] >= 20 and not trainer._replay.can_sample
        trainer.run()


def test_a_folder_that_another_run_has_made_anew_is_left_alone(tmp_path):
    folder = tmp_path / 'run'
    with tiny_runs.ticked(counter_config(), folder, 3) as trainer:
        trainer.save()
        shutil.rmtree(folder)
        with Trainer(counter_config(), folder, 'tiny') as other:
            other.save()
            trainer.tick()
            with pytest.raises(Failure, match='was deleted while this run was writing to it'):
                trainer._try_to_save()
        assert checkpoint.latest_step(folder / 'checkpoints') == 0


def test_a_disk_that_fails_costs_checkpoints_only(tmp_path, capsys):
    config = counter_config(run__checkpoint_every=1e-9)
    with tiny_runs.ticked(config, tmp_path, 3) as trainer:
        trainer.save()
        (tmp_path / 'checkpoints').rename(tmp_path / 'elsewhere')
        (tmp_path / 'checkpoints').write_text('')  # where the folder was
        trainer.tick()
        trainer._try_to_save()
        (tmp_path / 'checkpoints').unlink()
        (tmp_path / 'elsewhere').rename(tmp_path / 'checkpoints')
        trainer.tick()
        trainer._try_to_save()
    assert capsys.readouterr().out.count('Training goes on; the next attempt is in') == 1
    with Trainer(config, tmp_path, 'tiny') as trainer:
        assert trainer.counters['ticks'] == 5


# Ctrl-C, and SIGTERM before a machine is taken away.


def test_termination_on_a_full_disk_has_its_exit_code(small_disk, monkeypatch, capsys):
    tick = Trainer.tick

    def tick_and_terminate(trainer):
        tick(trainer)
        small_disk.fill()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, 'tick', tick_and_terminate)
    with Trainer(counter_config(), small_disk.folder / 'run', 'tiny') as trainer:
        with pytest.raises(SystemExit) as error:
            trainer.run()
        assert error.value.code == 143 and trainer.counters['ticks'] == 1
    assert 'checkpoints/1: No space left on device; make room for it' in capsys.readouterr().out


def flags(config, prefix='config'):
    for name, value in config.items():
        if hasattr(value, 'items'):
            yield from flags(value, f'{prefix}.{name}')
        elif name != 'size':
            yield f'--{prefix}.{name}={value}'


@pytest.mark.medium
@pytest.mark.parametrize(
    ('number', 'code', 'vectorization'),
    [(signal.SIGINT, 130, 'sync'), (signal.SIGTERM, 143, 'async')],
)
def test_interruption(number, code, vectorization, tmp_path, quick_compilation):
    """A real process, a real signal: it stops at once, and the same command goes on from there."""
    folder = tmp_path / 'run'
    config = counter_config(
        size='cpu', run__steps=1_000_000, logdir=str(folder), env__vectorization=vectorization
    )
    command = [sys.executable, '-m', 'dreamerv3_jax', 'train', '--config=quickstart']
    variables = tiny_runs.quick_variables(quick_compilation) | {
        'PYTHONPATH': os.path.dirname(__file__),
    }
    process = subprocess.Popen(
        [*command, *flags(config)],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: (folder / 'metrics.jsonl').exists(), process)
        wait_for(lambda: '"train/' in (folder / 'metrics.jsonl').read_text(), process)
        os.killpg(process.pid, number)  # the workers of the environments too
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, out + err
    assert err == ''
    assert 'Stopping after this update, to save a checkpoint' in out
    updates = tiny_runs.read_metrics(folder)[-1]['count/updates']
    assert checkpoint.latest_step(folder / 'checkpoints')
    with Trainer(config, folder, 'tiny') as trainer:
        assert trainer.counters['updates'] == updates == int(trainer._learner.state.updates) > 0
        assert len(trainer._replay) > BATCH_STEPS


def wait_for(condition, process):
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
