"""What every suite owes the agent, tried on the real packages: one contract for all of them.

A suite that is not installed is skipped by name; the summary of the tests has the command that
installs it.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_suites import make, random_actions

from dreamerv3_jax.envs.registry import SUITES
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.spaces import ObservationAdapter

STREAMS = 2
FRAMES = 3  # of an action, where repeats are counted


class Case(NamedTuple):
    """An environment, with what makes its episodes end within its ticks."""

    id: str
    kwargs: dict[str, Any] = {}
    repeat: int = 1
    limit: int = 0  # steps after which the time limit then cuts; 0 where it never does
    dies: bool = True  # whether some episodes end by themselves
    package: str = ''  # of gymnasium's own, what has to be installed
    marks: tuple[Any, ...] = ()

    def __str__(self):
        return '-'.join([self.id, *self.kwargs])

    @property
    def ticks(self):
        """Enough for deaths to happen, or for two episodes of each stream if all are cut."""
        return 250 if self.dies or not self.limit else 2 * self.limit + 5


GYMNASIUM = [
    Case('Hover-v0', {'max_episode_steps': 40}, limit=40),
    Case('CartPole-v1', {'max_episode_steps': 25}, limit=25),
    Case('LunarLander-v3', {'max_episode_steps': 80}, limit=80, package='Box2D'),
    Case('Hopper-v5', {'max_episode_steps': 25}, limit=25, package='mujoco'),
]
SPECIAL = [
    Case('atari/pong', repeat=20),
    Case('craftax/classic', {'length': 61}, limit=61, dies=False),
    Case('crafter/reward', {'length': 61}, limit=61),
    Case('dmc/walker_walk', repeat=10, limit=100, dies=False),
    Case('dmc/cartpole_balance', {'vision': True}, repeat=50, limit=20, dies=False),
    Case('manipulation/reach_site', repeat=4, limit=63, dies=False),
    Case('memorymaze/9x9', repeat=10, limit=100, dies=False, marks=(pytest.mark.slow,)),
    Case('metaworld/reach', repeat=10, limit=50, dies=False),
    Case('minecraft/diamond', {'length': 61}, limit=61, dies=False),
    Case('minigrid/Empty-Random-5x5-v0', limit=100),
    Case('procgen/starpilot'),
    Case('robotics/FetchReach-v4', limit=50, dies=False),
    Case('vizdoom/basic', repeat=4, limit=75),
]
PLAIN = [
    Case(f'{prefix}/{suite.examples[0]}')
    for prefix, suite in SUITES.items()
    if prefix not in {case.id.partition('/')[0] for case in SPECIAL}
]
CASES = [*GYMNASIUM, *SPECIAL, *PLAIN]


@pytest.fixture(params=[pytest.param(case, id=str(case), marks=case.marks) for case in CASES])
def case(request, tmp_path, monkeypatch):
    case = request.param
    suite = SUITES.get(case.id.partition('/')[0])
    if suite and not suite.installed:
        pytest.skip(f'{suite.title} is not installed: {suite.install}')
    if case.package and importlib.util.find_spec(case.package) is None:
        pytest.skip(f'{case.package} is not installed')
    if case.package == 'Box2D':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of SWIG: as errors they crash the interpreter
            importlib.import_module('Box2D')
    if 'vision' in case.kwargs:
        request.getfixturevalue('picture')
    if case.id.startswith('procgen/'):
        request.getfixturevalue('qt')
    monkeypatch.chdir(tmp_path)  # some packages write files
    return case


def open_case(case, **changes):
    settings = {'kwargs': case.kwargs, 'repeat': case.repeat, 'num_envs': STREAMS, **changes}
    return make(case.id, **settings)


def play(env, ticks):
    """Returns all records under the same random actions."""
    rng = np.random.default_rng(0)
    history = [env.reset()]
    for _ in range(ticks):
        records, finals = env.step(random_actions(env, rng))
        assert finals is None
        history.append(records)
    assert env.pop_restarts() == 0, env.messages
    return history


def digests(history):
    """Returns a fingerprint of each tick, so that a difference shows when it begins."""
    found = []
    for records in history:
        arrays = [*records.observation.values(), *records[1:]]
        found.append(hashlib.sha256(b''.join(map(np.ndarray.tobytes, arrays))).hexdigest()[:12])
    return found


def watch_spaces(monkeypatch):
    """Returns the list of what is observed outside of its declared space, from now on."""
    outside = []
    convert = ObservationAdapter.convert

    def watched(adapter, observation, batch_shape=()):
        for name, path, leaf, _ in adapter._leaves:
            value = observation
            for key in path:
                value = value[key]
            rows = value if batch_shape else [value]
            outside.extend((name, row) for row in rows if not leaf.contains(row))
        return convert(adapter, observation, batch_shape)

    monkeypatch.setattr(ObservationAdapter, 'convert', watched)
    return outside


def check_arrays(history, specs):
    for records in history:
        assert set(records.observation) == set(specs)
        for name, spec in specs.items():
            values = records.observation[name]
            assert (values.shape, values.dtype) == ((STREAMS, *spec.shape), spec.dtype)
            assert np.isfinite(values).all()
            if spec.kind == 'discrete':
                assert (values >= 0).all() and (values < spec.classes).all()
            if spec.kind == 'image':
                for image in values[records.is_first]:
                    assert image.std() > 1, f'the first frame of {name!r} is blank'
        assert (records.reward.dtype, records.reward.shape) == (np.float32, (STREAMS,))
        assert np.isfinite(records.reward).all()


def check_episodes(history, limit):
    """Returns the lengths of episodes that were cut, and how many others ended."""
    reward, first, last, terminal = map(np.array, list(zip(*history, strict=True))[1:])
    assert first[0].all()
    np.testing.assert_array_equal(first[1:], last[:-1])  # after an end, and else never
    assert not (first & last).any() and not (terminal & ~last).any()
    assert (reward[first] == 0).all()
    lengths, deaths = [], []
    for stream in range(STREAMS):
        ends = np.flatnonzero(last[:, stream])
        lengths += (ends - np.flatnonzero(first[:, stream])[: len(ends)]).tolist()
        deaths += terminal[ends, stream].tolist()
    assert len(lengths) >= 2, 'too few episodes end'
    cut = {length for length, death in zip(lengths, deaths, strict=True) if not death}
    assert cut <= {limit}, 'episodes are cut where there is no time limit'
    assert max(lengths) <= (limit or len(history)), 'the time limit is overrun'
    return cut, sum(deaths)


@pytest.mark.medium
def test_contract(case, monkeypatch, quick_compilation):
    outside = watch_spaces(monkeypatch)
    with open_case(case, seed=1, vectorization=vectorization(case)) as env:
        other = digests(play(env, 25))
    with open_case(case, vectorization=vectorization(case)) as env:
        specs = env.observation_specs
        history = play(env, case.ticks)
    assert not outside, outside[0]
    check_arrays(history, specs)
    cut, deaths = check_episodes(history, case.limit)
    assert bool(cut) == bool(case.limit)
    assert bool(deaths) == case.dies
    assert elsewhere(case, quick_compilation) == {'digests': digests(history), 'left': []}
    assert other != digests(history[:26]), 'the seed has no effect'


@pytest.mark.medium
@pytest.mark.usefixtures('quick_compilation')
def test_action_repeat(case, monkeypatch):
    """Compares with the action given anew at every frame, up to the end of the episode."""
    if case.id.startswith('vizdoom/'):
        hold_weapons_still(monkeypatch)
    options = {'num_envs': 1, 'vectorization': vectorization(case)}
    try:
        repeated = open_case(case, **options, repeat=FRAMES)
    except UserError as error:
        assert vectorization(case) == 'native' and 'env.repeat' in str(error)
        return
    rng = np.random.default_rng(0)
    with repeated, open_case(case, **options, repeat=1) as single:
        records, frame, frames = repeated.reset(), single.reset(), 0
        for _ in range(60):
            assert records.is_first == frame.is_first
            assert records.is_last == frame.is_last
            assert records.is_terminal == frame.is_terminal
            for name, values in records.observation.items():
                # Where an episode ends early in a repeat, Atari has no two frames of it to pool.
                if not records.is_last:
                    np.testing.assert_array_equal(values, frame.observation[name])
            actions = random_actions(repeated, rng)
            ended = records.is_last[0]
            records, _ = repeated.step(actions)
            total = 0.0
            for _ in range(1 if ended else FRAMES):
                frame, _ = single.step(actions)
                total += float(frame.reward[0])
                frames += not ended
                if frame.is_last:
                    break
            np.testing.assert_allclose(records.reward[0], total, rtol=1e-5, atol=1e-6)
    assert frames > 60


def hold_weapons_still(monkeypatch):
    """Doom smooths their sway from one drawn picture to the next, and repeats draw others."""
    import vizdoom

    start = vizdoom.DoomGame.init

    def init(game):
        game.add_game_args('+movebob 0')
        start(game)

    monkeypatch.setattr(vizdoom.DoomGame, 'init', init)


def vectorization(case):
    """Within this process, by the package's own vectorisation where it has one."""
    suite = SUITES.get(case.id.partition('/')[0])
    return 'native' if suite and suite.vector else 'sync'


def elsewhere(case, folder):
    """Plays the same in another process, where sets and memory are in another order.

    Environments are in processes of their own there, where the trainer would put them.
    """
    code = (
        'import test_contract\n'
        'padding = [object() for _ in range(1001)]\n'
        'if __name__ == "__main__":\n'
        f'    test_contract.report({case[:-1]!r})\n'
    )
    script = Path('elsewhere.py')
    script.write_text(code)
    import tiny_runs  # and JAX with it, which that process does without

    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / 'tests')])
    variables = tiny_runs.quick_variables(folder) | {'PYTHONPATH': path, 'PYTHONHASHSEED': '7'}
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def report(case):
    """Prints the fingerprints, and the processes that are left when all is closed."""
    if sys.platform == 'linux':  # what orphans leave behind becomes a child of this process
        ctypes.CDLL(None).prctl(36, 1)
    case = Case(*case)
    with open_case(case, vectorization='auto') as env:
        found = digests(play(env, case.ticks))
    threads = Path('/proc/self/task').glob('*/children')  # Linux only
    running = [child for thread in threads for child in thread.read_text().split()]
    commands = [Path(f'/proc/{child}/cmdline').read_text() for child in running]
    # Python's own tracker of shared memory stays for the next one.
    left = [command for command in commands if command and 'resource_tracker' not in command]
    print(json.dumps({'digests': found, 'left': left}))
