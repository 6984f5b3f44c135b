import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import ml_collections
import numpy as np
import pytest
import toy_envs

from dreamerv3_jax import envs
from dreamerv3_jax.envs import native, processes, registry, vector
from dreamerv3_jax.envs.native import Native
from dreamerv3_jax.envs.processes import Processes
from dreamerv3_jax.envs.vector import InProcess
from dreamerv3_jax.errors import Failure, UserError
from dreamerv3_jax.interrupts import Interrupted, Interrupts

COUNTER = 'toy_envs:Counter'
ZEROS = {'action': np.zeros((1, 1), np.int32)}  # for any number of environments
TWO_ZEROS = {'action': np.zeros((2, 1), np.int32)}


def make(env_id=COUNTER, seed=0, render=False, restart=True, **changes):
    settings = dict(
        id=env_id,
        kwargs={},
        num_envs=2,
        repeat=1,
        image_size=0,
        vectorization='sync',
        autoreset='next_step',
        timeout=120.0,
    )
    config = ml_collections.ConfigDict({**settings, **changes})
    return envs.make(config, seed, render=render, restart=restart)


def draw(rng, count):
    return {'action': rng.integers(0, 3, (count, 1)).astype(np.int32)}


def stream_of(env, ticks, seed=1):
    """Plays with random actions; returns what each stream saw, and the action it was given for it.

    An element is (count, observed action, reward, first, last, terminal, action chosen next).
    """
    rng = np.random.default_rng(seed)
    streams = [[] for _ in range(env.num_envs)]

    def append(records, row, stream, action):
        observation = records.observation
        streams[stream].append(
            (
                *observation['count'][row].tolist(),
                *observation['action'][row].tolist(),
                *(float(values[row]) for values in records[1:]),
                action,
            )
        )

    records = env.reset()
    for _ in range(ticks):
        actions = draw(rng, env.num_envs)
        for stream in range(env.num_envs):
            append(records, stream, stream, int(actions['action'][stream, 0]))
        records, finals = env.step(actions)
        if finals is not None:
            for row, stream in enumerate(finals.streams):
                append(finals.records, row, stream, None)
    return streams


def hand_stepped(end, seeds, ticks, same_step, seed=1):
    """The same as `stream_of`, from plain gymnasium environments and no vectorisation."""
    rng = np.random.default_rng(seed)
    toys = [toy_envs.Counter(end=end) for _ in seeds]
    streams = []
    seen = []
    for toy, own_seed in zip(toys, seeds, strict=True):
        observation, _ = toy.reset(seed=own_seed)
        seen.append((observation, 0.0, True, False, False))
        streams.append([])
    for _ in range(ticks):
        actions = draw(rng, len(seeds))['action'][:, 0].tolist()
        for number, (toy, action) in enumerate(zip(toys, actions, strict=True)):
            observation, *rest = seen[number]
            element = (*observation['count'], observation['action'], *map(float, rest))
            streams[number].append((*element, action))
            if rest[2]:
                seen[number] = (toy.reset()[0], 0.0, True, False, False)
                continue
            observation, reward, terminated, truncated, _ = toy.step(action)
            seen[number] = (observation, reward, False, terminated or truncated, terminated)
            if same_step and (terminated or truncated):
                flags = (reward, False, True, terminated)
                element = (*observation['count'], observation['action'], *map(float, flags))
                streams[number].append((*element, None))
                seen[number] = (toy.reset()[0], 0.0, True, False, False)
    return streams


def seeds_of(env):
    """Reads the seeds that the streams of an in-process environment are about to use."""
    return [stream._seed for stream in env._streams]


@pytest.mark.parametrize('end', ['terminated', 'truncated'])
@pytest.mark.parametrize('autoreset', ['next_step', 'same_step'])
@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_streams_equal_hand_stepped_environments(end, autoreset, vectorization):
    with make() as env:
        seeds = seeds_of(env)
    expected = hand_stepped(end, seeds, 40, autoreset == 'same_step')
    with make(
        kwargs={'end': end}, autoreset=autoreset, vectorization=vectorization, num_envs=2
    ) as env:
        assert stream_of(env, 40) == expected
    terminal = [element[6] for stream in expected for element in stream]
    last = [element[5] for stream in expected for element in stream]
    assert sum(last) > 10
    assert terminal == (last if end == 'terminated' else [0.0] * len(last))


@pytest.mark.parametrize('mode', ['NextStep', 'SameStep'])
@pytest.mark.parametrize('end', ['terminated', 'truncated'])
def test_native_streams_equal_hand_stepped_environments(mode, end):
    env = make(
        'ToyCounter-v0', vectorization='native', kwargs={'autoreset': mode, 'end': end}, num_envs=3
    )
    assert isinstance(env, Native)
    first = env._seed
    expected = hand_stepped(end, range(first, first + 3), 40, mode == 'SameStep')
    assert stream_of(env, 40) == expected
    env.close()


def test_native_reset_ticks_mean_nothing_else():
    with make('ToyCounter-v0', vectorization='native', kwargs={'junk': True}) as env:
        expected = hand_stepped('terminated', range(env._seed, env._seed + 2), 40, False)
        assert stream_of(env, 40) == expected


@pytest.mark.parametrize(
    ('odd', 'sentence'),
    [
        ('rewards', r'returned rewards of shape \(2, 1\), not \(2,\)\.'),
        ('flags', r'returned flags of shape \(2, 1\), not \(2,\)\.'),
        ('logs', "returned a log 'log/x' that is not of each environment"),
        ('keys', None),
    ],
)
def test_native_environments_that_return_something_odd(odd, sentence):
    kwargs = {'odd': odd, 'length': 1}
    with make('ToyCounter-v0', vectorization='native', kwargs=kwargs, num_envs=2) as env:
        env.reset()
        if sentence is None:
            assert env.step({'action': np.zeros((2, 1), np.int32)})[0].is_last.all()
            return
        with pytest.raises(Failure, match=sentence):
            env.step({'action': np.zeros((2, 1), np.int32)})


def test_native_needs_resets_and_no_repeat():
    with pytest.raises(UserError, match='does not reset itself'):
        make('ToyCounter-v0', vectorization='native', kwargs={'autoreset': 'Disabled'})
    with pytest.raises(UserError, match=r'env.repeat=1'):
        make('ToyCounter-v0', vectorization='native', repeat=2)
    with pytest.raises(UserError, match='vector entry point'):
        make('Acrobot-v1', vectorization='native')


def test_native_cartpole_learns_of_its_time_limit():
    env = make('CartPole-v1', vectorization='native', kwargs={'max_episode_steps': 4})
    env.reset()
    flags = []
    for _ in range(6):
        records, finals = env.step({'action': np.array([[0], [1]], np.int32)})
        assert finals is None
        flags.append([*map(bool, (values[0] for values in records[2:])), float(records.reward[0])])
    step, last, first = [0, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 0]
    assert flags == [step, step, step, last, first, step]
    env.close()


def test_specs():
    with make() as env:
        assert env.num_envs == 2
        assert [spec.kind for spec in env.observation_specs.values()] == ['discrete', 'continuous']
        assert list(env.observation_specs) == ['action', 'count']
        assert env.action_specs['action'].classes == (3,)
        records = env.reset()
    dtypes = [values.dtype for values in (*records.observation.values(), *records[1:])]
    assert dtypes == [np.int32, np.float32, np.float32, bool, bool, bool]


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_records_are_not_overwritten(vectorization):
    with make(vectorization=vectorization, kwargs={'length': 9}) as env:
        first = env.reset()
        second, _ = env.step({'action': np.ones((2, 1), np.int32)})
        env.step({'action': np.ones((2, 1), np.int32)})
    assert first.observation['count'][:, 1].tolist() == [0, 0]
    assert first.is_first.all()
    assert second.observation['count'][:, 1].tolist() == [1, 1]
    assert second.reward.tolist() == [11, 11]


def test_environments_in_processes_step_while_nobody_waits():
    with make('toy_envs:Slow', vectorization='async') as env:
        env.reset()
        env.start({'action': np.zeros((2, 2), np.float32)})
        assert all(connection.poll(60) for connection in env._connections)
        records, _ = env.finish()
        (picture,) = records.observation.values()
        assert picture.min() == 7


def test_final_observation_survives_an_environment_that_reuses_its_array():
    class Reuser(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-9, 9, (1,))
        action_space = gymnasium.spaces.Discrete(2)
        array = np.zeros(1, np.float32)

        def reset(self, *, seed=None, options=None):
            self.array[:] = 0
            return self.array, {}

        def step(self, action):
            self.array += 1
            return self.array, 1.0, True, False, {}

    toy_envs.Reuser = Reuser
    with make('toy_envs:Reuser', autoreset='same_step') as env:
        env.reset()
        records, finals = env.step({'action': np.zeros((2, 1), np.int32)})
    assert records.observation['observation'].tolist() == [[0], [0]]
    assert finals.records.observation['observation'].tolist() == [[1], [1]]
    assert finals.streams.tolist() == [0, 1]
    assert finals.records.is_terminal.all()


def test_repeat_is_counted_exactly_and_ends_with_the_episode():
    # Five frames, two per step: 10+1 and 20+1, 30+2 and 40+2, then 50+0 alone.
    with make(kwargs={'length': 5}, repeat=2, num_envs=1) as env:
        env.reset()
        seen = []
        for action in (1, 2, 0, 0, 1):
            records, _ = env.step({'action': np.array([[action]], np.int32)})
            count = records.observation['count'][0, 1]
            seen.append((count, records.reward[0], records.is_first[0], records.is_last[0]))
        toy = env._streams[0]._env.unwrapped
    assert seen == [(2, 32, 0, 0), (4, 74, 0, 0), (5, 50, 0, 1), (0, 0, 1, 0), (2, 32, 0, 0)]
    assert toy.frames == 7


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_frame_rate_is_of_steps_of_the_agent(vectorization):
    with make(repeat=4, vectorization=vectorization) as env:
        assert env.frame_rate == 20 / 4
    with make('toy_envs:Camera', vectorization=vectorization) as env:  # does not say
        assert env.frame_rate == 30


def test_seeds():
    def play(seed, **changes):
        with make(seed=seed, **changes) as env:
            return stream_of(env, 30)

    assert play(3) == play(3) == play(3, vectorization='async')
    assert play(3) != play(4)
    first, second = play(3, num_envs=2)
    assert [element[:2] for element in first] != [element[:2] for element in second]
    assert play(3, num_envs=5)[:1] != play(4, num_envs=5)[:1]
    with make(num_envs=50) as env:
        assert len(set(seeds_of(env))) == 50


def test_logs_are_means_over_episodes():
    with make(kwargs={'length': 2}) as env:
        env.reset()
        for _ in range(5):  # two ticks and a reset, then the second episode
            env.step({'action': np.zeros((2, 1), np.int32)})
        # The run has a length too.
        assert toy_envs.taken_logs(env) == {'log/length': 2.0, 'episode': 1.5}
        assert toy_envs.taken_logs(env) == {}
    with make(kwargs={'length': 1}, autoreset='same_step', vectorization='async') as env:
        env.reset()
        env.step({'action': np.zeros((2, 1), np.int32)})
        assert toy_envs.taken_logs(env) == {'log/length': 1.0, 'episode': 1.0}


@pytest.mark.parametrize('mode', ['NextStep', 'SameStep'])
def test_logs_of_environments_that_come_vectorised(mode):
    kwargs = {'length': 2, 'autoreset': mode}
    with make('ToyCounter-v0', vectorization='native', kwargs=kwargs) as env:
        env.reset()
        env.step(TWO_ZEROS)
        assert toy_envs.taken_logs(env) == {}
        env.step(TWO_ZEROS)
        assert toy_envs.taken_logs(env) == {'log/length': 2.0, 'episode': 1.0}


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_render(vectorization):
    with make(vectorization=vectorization, render=True, kwargs={'length': 9}) as env:
        env.reset()
        env.step({'action': np.zeros((2, 1), np.int32)})
        assert (env.render() == np.ones((4, 6, 3), np.uint8)).all()
    with make(vectorization=vectorization) as env:
        env.reset()
        assert env.render() is None
    with make('toy_envs:Camera', render=True) as env:  # cannot draw, and has no such argument
        env.reset()
        assert env.render() is None


def test_auto_puts_images_into_processes():
    for env_id, num_envs, kind in [
        ('CartPole-v1', 2, InProcess),
        ('toy_envs:Camera', 2, Processes),
        ('toy_envs:Camera', 1, InProcess),
    ]:
        with make(env_id, num_envs=num_envs, vectorization='auto') as env:
            assert type(env) is kind
            assert env.reset().is_first.all()
            assert env.reset().is_first.size == num_envs


def test_images_and_actions_pass_through_processes():
    with make('toy_envs:Camera', vectorization='async', num_envs=3, image_size=48) as env:
        assert env.observation_specs['observation'].shape == (48, 48, 3)
        assert 'resized' in env.messages[0]
        assert not env.reset().observation['observation'].any()
        actions = np.array([[1, 1], [0.5, -1], [-9, 0]], np.float32)
        records, _ = env.step({'action': actions})
    assert (records.observation['observation'] == 7).all()
    assert records.reward.tolist() == [4, -1, -2]


def test_modules_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / 'my_robot.py').write_text(
        'import gymnasium, toy_envs\n'
        'def robot(length): return toy_envs.Counter(length=length)\n'
        "gymnasium.register('MyRobot-v0', entry_point=robot, kwargs={'length': 1})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    for env_id in ('my_robot:robot', 'my_robot:MyRobot-v0'):
        for vectorization in ('sync', 'async'):
            with make(env_id, vectorization=vectorization, kwargs={'length': 3}) as env:
                env.reset()
                last = [env.step(draw(np.random.default_rng(0), 2))[0].is_last for _ in range(3)]
            assert np.array(last)[:, 0].tolist() == [False, False, True]


def test_script_without_main_guard(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import ml_collections\n'
        'from dreamerv3_jax import envs\n'
        'print("once")\n'
        'config = ml_collections.ConfigDict(dict(id="CartPole-v1", kwargs={}, num_envs=2,\n'
        '    repeat=1, image_size=0, vectorization="async", autoreset="next_step",\n'
        '    timeout=60.0))\n'
        'env = envs.make(config, 0)\n'
        'print(env.reset().is_first.all())\n'
    )  # and without close
    root = str(Path(__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, 'PYTHONPATH': root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == 'once\nTrue\n', result.stderr
    assert result.stderr == ''


def test_close_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.os, 'access', lambda *_: False)  # no memory file system
    monkeypatch.setattr(processes.tempfile, 'tempdir', str(tmp_path))
    env = make(vectorization='async')
    workers, block = list(env._workers), env._block
    assert all(worker.is_alive() for worker in workers)
    env.reset()
    env.close()
    env.close()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert block.closed


def test_workers_end_with_their_parent():
    code = (
        'import os, test_envs\n'
        'env = test_envs.make(vectorization="async")\n'
        'print(*[worker.pid for worker in env._workers], flush=True)\n'
        'os._exit(1)\n'
    )
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / 'tests')])
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2, result.stderr
    deadline = time.monotonic() + 10
    while any(Path(f'/proc/{pid}/cmdline').exists() and _runs(pid) for pid in pids):
        assert time.monotonic() < deadline, 'a worker outlives its parent'
        time.sleep(0.05)


@pytest.mark.medium
@pytest.mark.parametrize('failure', ['hang', 'hang in C'])
def test_a_worker_that_hangs_ends_with_its_parent(failure, tmp_path):
    code = (
        'import os, sys, time, test_envs\n'
        'from dreamerv3_jax.envs.processes import Processes\n'
        'kwargs = dict(fail_at=1, failure=sys.argv[2], length=9, once=sys.argv[1])\n'
        'env = test_envs.make(vectorization="async", num_envs=1, kwargs=kwargs)\n'
        'env.reset()\n'
        'env._actions["action"][:] = 0\n'
        'env._connections[0].send("step")\n'
        'while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n'
        'print(env._workers[0].pid, flush=True)\n'
        'os._exit(1)\n'
    )
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'hung'), failure],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(here.parent), str(here)])},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    deadline = time.monotonic() + 60
    while _runs(int(result.stdout)):
        assert time.monotonic() < deadline, 'a worker outlives its parent'
        time.sleep(0.05)


def _runs(pid):
    try:
        return b'multiprocessing' in Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
        return False


def test_workers_that_start_ignore_interrupts():
    code = (
        'import os, signal, time, test_envs\n'
        'from dreamerv3_jax.envs import processes\n'
        'start = processes._start\n'
        'def start_and_interrupt(*arguments):\n'
        '    connection, worker = start(*arguments)\n'
        '    for _ in range(10):\n'
        '        os.kill(worker.pid, signal.SIGINT)\n'
        '        time.sleep(0.01)\n'
        '    return connection, worker\n'
        'processes._start = start_and_interrupt\n'
        'with test_envs.make(vectorization="async") as env:\n'
        '    assert env.reset().is_first.all()\n'
        'os.kill(os.getpid(), signal.SIGINT)\n'  # the mask is no longer there
    )
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(here.parent), str(here)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr.count('Traceback') == 1 and result.returncode == -signal.SIGINT


def test_parts_on_many_hosts_are_those_of_one():
    config = ml_collections.ConfigDict(
        dict(
            id=COUNTER, kwargs={}, num_envs=4, repeat=1, image_size=0, vectorization='sync',
            autoreset='next_step', timeout=120.0,
        )
    )  # fmt: skip

    def lives(part):
        with envs.make(config, 0, part=part) as env:
            return [stream._seed for stream in env._streams]

    whole = lives((0, 1))
    assert len(set(whole)) == 4 and lives((0, 2)) + lives((1, 2)) == whole


def test_workers_keep_off_the_accelerator_and_ignore_interrupts(monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    with make(vectorization='async') as env:
        assert os.environ['JAX_PLATFORMS'] == 'tpu'
        assert 'OMP_NUM_THREADS' not in os.environ
        pid = env._workers[0].pid
        variables = Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')
        assert b'JAX_PLATFORMS=cpu' in variables
        assert b'OMP_NUM_THREADS=1' in variables
        os.kill(pid, signal.SIGINT)
        assert env.reset().is_first.all()


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_failing_environment_gives_one_sentence(vectorization):
    kwargs = {'length': 5, 'fail_at': 2}
    env = make(vectorization=vectorization, kwargs=kwargs, restart=False)
    env.reset()
    env.step(ZEROS)
    with pytest.raises(UserError) as caught:
        env.step(ZEROS)
    message = str(caught.value)
    assert 'Environment 0 of toy_envs:Counter failed: ValueError: the robot fell over' in message
    assert 'toy_envs.py, line' in message
    assert '\n' not in message
    env.close()


def test_async_failure_keeps_the_traceback():
    kwargs = {'length': 5, 'fail_at': 1}
    with make(vectorization='async', kwargs=kwargs, restart=False) as env:
        env.reset()
        with pytest.raises(UserError) as caught:
            env.step(ZEROS)
    assert 'in step' in caught.value.__notes__[0]
    assert env._workers == []


FAILURES = {
    'raise': 'Environment . of toy_envs:Counter failed: ValueError: the robot fell over .*line',
    'wrong shape': "an observation 'count' of shape .3,. where its space has .2,.; correct the",
    'wrong dtype': "an observation 'count' of <U2, which are no numbers",
    'nan observation': "returned an observation 'count' that is not finite; repair or clip it.",
    'nan reward': 'Environment . of toy_envs:Counter returned a reward that is not finite',
    'infinite reward': 'Environment . of toy_envs:Counter returned a reward that is not finite',
    'two rewards': r'toy_envs:Counter returned a reward of shape \(2,\); return one number\.',
    'odd action': "returned an observation 'action' outside of its space",
    'huge action': "returned an observation 'action' outside of its space",
    'half an action': "an observation 'action' of float64 where its space has int64; correct the",
    'quit': 'Environment . of toy_envs:Counter (failed: SystemExit|died: .* exit code 3)',
    'exit': 'died: its process ended with exit code 7',
    'hang': 'did not answer for 2 seconds',
}


@pytest.mark.parametrize('autoreset', ['next_step', 'same_step'])
@pytest.mark.parametrize(
    ('vectorization', 'what'),
    [('sync', what) for what in FAILURES if what not in ('exit', 'hang')]
    + [('async', what) for what in FAILURES if what != 'hang']
    + [pytest.param('async', 'hang', marks=pytest.mark.medium)],
)
def test_an_environment_that_fails_is_built_again(autoreset, vectorization, what, tmp_path):
    """The others go on, and the episode that was cut does not run on into the next one."""
    kwargs = {'length': 6, 'fail_at': 3, 'failure': what, 'once': str(tmp_path / 'failed')}
    changes = dict(kwargs=kwargs, autoreset=autoreset, num_envs=3)
    with make(vectorization=vectorization, **changes) as env:
        env.reset()
        env.step(ZEROS)
        env.step(ZEROS)
        if what == 'hang':  # the one step; to start processes takes longer at times
            patient, rebuild = env._settings, env._rebuild

            def rebuild_patiently(*arguments):
                env._settings = patient
                return rebuild(*arguments)

            env._rebuild = rebuild_patiently
            env._settings = dataclasses.replace(env._settings, timeout=2.0)
        env.start(ZEROS)
        records, finals = env.finish()
        (row,) = np.flatnonzero(records.is_first)
        count = records.observation['count']
        assert count[row].tolist() == [1, 0] and (np.delete(count, row, 0) == [1, 3]).all()
        assert records.reward[row] == 0 and not records.is_last[row]
        assert finals is None
        assert re.search(FAILURES[what], env.messages[0]), env.messages
        assert len(env.messages) == 1 and env.messages[0].endswith('. It is started again.')
        assert (env.pop_restarts(), env.pop_restarts()) == (1, 0)
        for step in range(1, 6):
            records, _ = env.step(ZEROS)
            assert records.observation['count'][row].tolist() == [1, step]


@pytest.mark.parametrize('repeat', [1, 2])
def test_a_reward_may_be_an_array_of_one(repeat, monkeypatch):
    step = toy_envs.Counter.step

    def step_with_array(env, action):
        observation, reward, *rest = step(env, action)
        return observation, np.full((1, 1), reward), *rest

    monkeypatch.setattr(toy_envs.Counter, 'step', step_with_array)
    with make(kwargs={'length': 6}, repeat=repeat) as env:
        env.reset()
        records, _ = env.step(ZEROS)
        assert records.reward.tolist() == [10 * repeat * (repeat + 1) / 2] * 2
        assert env.messages == []


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_one_that_fails_leaves_the_ends_of_others_where_they_belong(vectorization, tmp_path):
    kwargs = {'length': 3, 'fail_at': 3, 'once': str(tmp_path / 'failed')}
    changes = dict(autoreset='same_step', num_envs=3, kwargs=kwargs)
    with make(vectorization=vectorization, **changes) as env:
        env.reset()
        env.step(ZEROS)
        env.step(ZEROS)
        records, finals = env.step(ZEROS)  # one fails, as two others end
        (row,) = np.flatnonzero(records.observation['count'][:, 0] == 1)
        assert finals.streams.tolist() == [stream for stream in range(3) if stream != row]
        assert finals.records.observation['count'].tolist() == [[1, 3], [1, 3]]
        assert env.pop_restarts() == 1


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
@pytest.mark.parametrize(
    ('what', 'words'), [('raise', 'the robot does not get up'), ('quit', FAILURES['quit'])]
)
def test_an_environment_that_cannot_begin_is_built_again(vectorization, what, words, tmp_path):
    kwargs = {'length': 6, 'fail_at': 0, 'failure': what, 'once': str(tmp_path / 'failed')}
    with make(vectorization=vectorization, kwargs=kwargs) as env:
        records = env.reset()
        assert records.is_first.all() and env.pop_restarts() == 1
        assert re.search(words, env.messages[0])
        records, finals = env.step(ZEROS)
        assert finals is None and (records.observation['count'] == [1, 1]).all()


def test_exit_while_it_is_built_again_is_a_failure_too(monkeypatch):
    with make(kwargs={'length': 6, 'fail_at': 1}) as env:
        env.reset()
        monkeypatch.setattr(vector, 'open_stream', lambda *_: sys.exit(0))
        with pytest.raises(UserError, match='SystemExit: 0 .* started again 3 times before'):
            env.step(ZEROS)


def test_exit_at_reset_does_not_cost_the_last_record():
    with make(kwargs={'length': 2}, autoreset='same_step', num_envs=1) as env:
        env.reset()
        env.step(ZEROS)
        inner = env._streams[0]._env.unwrapped
        inner._failure, inner._fail_at = 'quit', 0
        records, _ = env.step(ZEROS)
        assert records.is_last.all() and records.is_terminal.all()
        assert records.observation['count'].tolist() == [[1, 2]]


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_who_fails_again_and_again_is_given_up(vectorization):
    kwargs = {'length': 9, 'fail_at': 2}
    with make(vectorization=vectorization, kwargs=kwargs) as env:
        env.reset()
        for _ in range(7):  # both fail at the second step of every life
            env.step(ZEROS)
        with pytest.raises(Failure, match=r'fell over .* It was started again 3 times before\.$'):
            env.step(ZEROS)
        assert env.pop_restarts() == 6


def test_who_fails_after_many_steps_is_built_again_any_number_of_times(monkeypatch):
    monkeypatch.setattr(vector, 'ENOUGH_STEPS', 1)
    with make(kwargs={'length': 9, 'fail_at': 2}) as env:
        env.reset()
        for _ in range(10):
            env.step(ZEROS)
        assert env.pop_restarts() == 10


def observed(env, ticks, before_tick=lambda: None):
    """All that is observed, [ticks, N, 2], and where an episode begins, [ticks, N]."""
    found = [env.reset()]
    for _ in range(ticks):
        before_tick()
        found.append(env.step({'action': np.zeros((env.num_envs, 1), np.int32)})[0])
    return np.stack([x.observation['count'] for x in found]), np.stack([x.is_first for x in found])


@pytest.mark.parametrize('what', ['raise', 'nan observation', 'wrong shape', 'quit'])
def test_one_bad_environment_of_sixteen_does_not_stop_the_others(what, monkeypatch):
    monkeypatch.setattr(vector, 'ENOUGH_STEPS', 1)
    bad, others = 5, np.arange(16) != 5
    with make(num_envs=16) as env:
        expected = observed(env, 30)
    with make(num_envs=16, kwargs={'failure': what}) as env:

        def spoil():
            env._streams[bad]._env.unwrapped._fail_at = 2

        found = observed(env, 30, spoil)
        assert env.pop_restarts() > 5
        assert all('Environment 5 of toy_envs:Counter' in text for text in env.messages)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[:, others], other[:, others])
    assert set(found[0][:, bad, 1]) == {0, 1}  # it never came to its second step


@pytest.mark.medium
def test_a_killed_worker_does_not_stop_the_others():
    with make(num_envs=4) as env:
        expected = observed(env, 6)
    with make(num_envs=4, vectorization='async') as env:
        kills = iter([False, False, True, False, False, False])

        def kill():
            if next(kills):
                os.kill(env._workers[1].pid, signal.SIGKILL)

        found = observed(env, 6, kill)
        assert env.pop_restarts() == 1 and 'exit code -9' in env.messages[0]
    others = np.arange(4) != 1
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[:, others], other[:, others])
    assert found[0][3, 1].tolist() == [1, 0] and found[1][3, 1]


def test_killed_workers():
    """The kernel kills with SIGKILL what takes too much memory."""
    with make(vectorization='async', kwargs={'length': 9}) as env:
        env.reset()
        for row, number in ((1, signal.SIGKILL), (0, signal.SIGTERM)):
            env.step(ZEROS)
            os.kill(env._workers[row].pid, number)
            records, _ = env.step(ZEROS)
            assert records.is_first.tolist() == [row == 0, row == 1]
            assert f'Environment {row} of toy_envs:Counter died: its process' in env.messages[-1]
            assert f'exit code {-number};' in env.messages[-1]


@pytest.mark.parametrize('built', [False, True])
def test_termination_of_all_processes_ends_the_run(built, monkeypatch):
    """An environment gets the signal before who trains does, in a step or while it is built."""
    kwargs = {'length': 9, 'fail_at': 1} if built else {'length': 9}
    with make(vectorization='async', kwargs=kwargs) as env:
        env.reset()
        start = processes._start

        def terminate(worker):
            worker.terminate()
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

        def start_and_terminate(settings, row):
            connection, worker = start(settings, row)
            terminate(worker)
            return connection, worker

        monkeypatch.setattr(processes, '_start', start_and_terminate)
        interrupts = Interrupts(lambda: None)
        with interrupts.collected():
            if not built:
                terminate(env._workers[1])
            with pytest.raises(Interrupted), interrupts.raised():
                env.step(ZEROS)
        assert env.pop_restarts() == built


def test_every_life_has_its_own_seed(monkeypatch):
    seeds = []
    original = vector.open_stream

    def open_stream(settings, row):
        seeds.append((row, settings.seeds[row]))
        return original(settings, row)

    monkeypatch.setattr(vector, 'open_stream', open_stream)
    with make(kwargs={'length': 9, 'fail_at': 1}) as env:
        env.reset()
        for _ in range(3):
            env.step(ZEROS)
            assert env.pop_restarts() == 2
    assert len(set(seeds)) == len(seeds) == 2 + 6


@pytest.mark.parametrize(
    ('vectorization', 'failure', 'words'),
    [('sync', 'quit', 'SystemExit'), ('async', 'exit', 'its process ended')],
)
def test_an_environment_that_ends_while_evaluated_is_no_mistake(vectorization, failure, words):
    kwargs = {'length': 9, 'fail_at': 1, 'failure': failure}
    with make(vectorization=vectorization, kwargs=kwargs, restart=False) as env:
        env.reset()
        with pytest.raises(Failure, match=words):
            env.step(ZEROS)


def test_an_environment_that_cannot_even_be_closed(monkeypatch):
    def close(self):
        raise ConnectionError('the simulator is gone')

    monkeypatch.setattr(toy_envs.Counter, 'close', close)
    with make(kwargs={'length': 9, 'fail_at': 1}, restart=False) as env:
        env.reset()
        with pytest.raises(Failure, match='the robot fell over') as caught:
            env.step(ZEROS)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ('env_id', 'vectorization'),
    [('Unclosable', 'auto'), ('ToyUnclosable-v0', 'native')],
)
def test_environments_that_cannot_be_closed_end_all_the_same(env_id, vectorization, capfd):
    env_id = env_id if vectorization == 'native' else f'toy_envs:{env_id}'
    with make(env_id, vectorization=vectorization) as env:
        assert env.reset().is_first.all()
        workers = getattr(env, '_workers', [])
    assert bool(workers) == (vectorization != 'native')
    assert all(worker.exitcode == 0 for worker in workers)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('vectorization', ['auto', 'sync', 'async'])
def test_environments_without_spaces(vectorization):
    with pytest.raises(UserError, match="toy_envs:Spaceless: AttributeError.* 'observation_space'"):
        make('toy_envs:Spaceless', vectorization=vectorization)


def test_environments_without_spaces_that_come_vectorised(monkeypatch):
    closed = []

    def no_space(space):
        raise AttributeError('no attribute single_action_space')

    monkeypatch.setattr(native, 'ActionAdapter', no_space)
    monkeypatch.setattr(toy_envs.UnclosableVector, 'close_extras', lambda *_: closed.append(True))
    with pytest.raises(UserError, match='ToyUnclosable-v0: AttributeError: no attribute single'):
        make('ToyUnclosable-v0', vectorization='native')
    assert closed


def test_pictures_of_environments_that_come_vectorised():
    with make('ToyCounter-v0', vectorization='native', render=True) as env:
        env.reset()
        assert env.render().shape == (4, 6, 3)
    with make('ToyUnclosable-v0', vectorization='native', render=True) as env:  # takes no mode
        env.reset()
        assert env.render() is None


def test_an_id_without_version_is_the_newest_one():
    assert registry._registered('CartPole').id == 'CartPole-v1'
    assert registry._draws('CartPole') and not registry._draws('NoSuchThing')


def test_arguments_are_those_that_are_read_from_a_run():
    config = ml_collections.ConfigDict({'sizes': (1, [2, (3,)]), 'more': {'size': (4, 5)}})
    assert envs._plain(config) == {'sizes': [1, [2, [3]]], 'more': {'size': [4, 5]}}


def test_processes_that_the_system_does_not_start(monkeypatch):
    started, start = [], processes._start

    def start_two(settings, row):
        if row == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        started.append(start(settings, row))
        return started[-1]

    monkeypatch.setattr(processes, '_start', start_two)
    words = r'Of 3 processes of environments 2 could be started \(Too many open files\); lower'
    with pytest.raises(UserError, match=words):
        make(vectorization='async', num_envs=3)
    assert [worker.exitcode is None for _, worker in started] == [False, False]


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_the_end_of_an_episode_survives_a_reset_that_fails(vectorization, tmp_path):
    """It is told as under 'next_step', and the reset is tried once more."""
    kwargs = {'length': 2, 'fail_at': 0, 'once': str(tmp_path / 'failed')}
    (tmp_path / 'failed').touch()
    changes = dict(autoreset='same_step', num_envs=1, vectorization=vectorization)
    with make(kwargs=kwargs, **changes) as env:
        env.reset()
        env.step(ZEROS)
        (tmp_path / 'failed').unlink()
        records, finals = env.step(ZEROS)
        assert finals is None and records.is_last.all() and records.is_terminal.all()
        assert records.reward == 20
        records, _ = env.step(ZEROS)
        assert records.is_first.all() and env.pop_restarts() == 0


def test_patience_has_no_limit():
    with make(vectorization='async', num_envs=1, timeout=1e300) as env:
        assert env.reset().is_first.all()


def test_stuck_worker_is_killed(monkeypatch):
    monkeypatch.setattr(processes, '_SHUTDOWN_SECONDS', 0.2)
    env = make(vectorization='async', num_envs=1)
    worker = env._workers[0]
    os.kill(worker.pid, signal.SIGSTOP)
    env.close()
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize('vectorization', ['sync', 'async'])
@pytest.mark.parametrize(
    ('env_id', 'kwargs', 'message'),
    [
        ('CartPol-v1', {}, 'There is no environment .* Did you mean .*CartPole-v1'),
        ('dmcontrol/walker_walk', {}, 'There is no environment .* dmc/walker_walk'),
        ('toy_envs:Countre', {}, 'no function .Countre.'),
        ('toy_envs:Nothing-v0', {}, 'There is no environment'),
        ('no_such_module:thing', {}, 'No module named .no_such_module'),
        ('toy_envs:varying', {}, 'toy_envs:varying makes environments with different spaces'),
        ('toy_envs:fails', {}, 'RuntimeError: no such robot'),
        ('toy_envs:not_an_environment', {}, 'returned str, which is no gymnasium.Env'),
        (COUNTER, {'lenght': 3}, "unexpected keyword argument 'lenght'"),
        ('CartPole-v1', {'gravity': 3}, "unexpected keyword argument 'gravity'"),
    ],
)
def test_environments_that_cannot_be_made(env_id, kwargs, message, vectorization):
    with pytest.raises(UserError, match=message) as caught:
        make(env_id, kwargs=kwargs, vectorization=vectorization)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'env_id': ''}, 'Name the environment'),
        ({'num_envs': 0}, 'env.num_envs must be at least 1'),
        ({'repeat': 0}, 'env.repeat must be at least 1'),
        ({'image_size': 50, 'env_id': 'toy_envs:Camera'}, 'multiple of 16'),
        ({'vectorization': 'parallel'}, 'env.vectorization is one of'),
        ({'autoreset': 'never'}, 'env.autoreset is one of'),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize('suite', sorted(registry.SUITES))
def test_missing_extra_is_named(suite, monkeypatch):
    monkeypatch.setattr(registry.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=re.escape(registry.SUITES[suite].install)):
        make(f'{suite}/anything')


def test_missing_package_of_gymnasium(monkeypatch):
    def broken(**_):
        raise gymnasium.error.DependencyNotInstalled('pip install box3d')

    monkeypatch.setattr(toy_envs, 'fails', broken)
    with pytest.raises(UserError, match='needs another package: pip install box3d'):
        make('toy_envs:fails')


def test_older_versions_are_made_without_a_warning():
    with make('CartPole-v0') as env:  # warnings are errors
        assert list(env.observation_specs) == ['observation']
