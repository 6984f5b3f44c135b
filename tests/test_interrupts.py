"""Ctrl-C and SIGTERM, in real processes: a run is saved in time, and the second one ends it."""

import doctest
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs

from dreamerv3_jax import checkpoint, interrupts

SCRIPT = """
import json, pathlib, sys, time
import tiny_runs
from dreamerv3_jax import checkpoint, cli, loop

def slow_save(self, directory, args):
    pathlib.Path(sys.argv[1], 'saving').touch()
    time.sleep(1000)

changes = json.loads(sys.argv[2])
if changes.pop('slow_save', False):
    checkpoint._ArrayFiles.save = slow_save
    loop.Agent.compile_update = lambda *_: None  # it is killed before the first
changes |= {'logdir': sys.argv[1] + '/run', 'run__steps': 1_000_000, 'replay__train_ratio': 1.0}
config = tiny_runs.run_config('toy_envs:Counter', **changes)
cli.build_config = lambda *_: (config, 'tiny')
sys.exit(cli.main(['train']))
"""


@pytest.fixture
def start(tmp_path, quick_compilation):
    """Starts a run with these changes of its settings; returns the process."""
    processes = []

    def start(**changes):
        here = Path(__file__).parent
        variables = tiny_runs.quick_variables(quick_compilation)
        variables |= {'PYTHONPATH': f'{here.parent}{os.pathsep}{here}'}
        process = subprocess.Popen(
            [sys.executable, '-c', SCRIPT, str(tmp_path), json.dumps(changes)],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(path, process):
    deadline = time.monotonic() + 180
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ends_within(seconds, process):
    started = time.monotonic()
    out, err = process.communicate(timeout=180)
    assert time.monotonic() - started < seconds, out + err
    assert err == ''
    return process.returncode


@pytest.mark.medium
@pytest.mark.parametrize(
    ('number', 'code', 'vectorization'),
    [(signal.SIGTERM, 143, 'async'), (signal.SIGINT, 130, 'sync')],
)
def test_an_environment_that_hangs_does_not_delay_saving(
    number, code, vectorization, start, tmp_path
):
    hung = tmp_path / 'hung'
    kwargs = {'length': 99, 'fail_at': 40, 'failure': 'hang', 'once': str(hung)}
    process = start(env__vectorization=vectorization, env__kwargs=kwargs)
    wait_for(hung, process)
    process.send_signal(number)
    assert ends_within(30, process) == code
    assert checkpoint.latest_step(tmp_path / 'run' / 'checkpoints') == 40


@pytest.mark.medium
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_even_saving(number, start, tmp_path):
    process = start(slow_save=True, run__checkpoint_every=1e-9)
    wait_for(tmp_path / 'saving', process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    assert ends_within(10, process) == -number
    assert checkpoint.latest_step(tmp_path / 'run' / 'checkpoints') is None


def test_a_signal_just_before_something_that_hangs_is_raised():
    interrupts_ = interrupts.Interrupts(lambda: None)
    with interrupts_.collected():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(interrupts.Interrupted), interrupts_.raised():
            raise AssertionError('it may hang here')


def test_two_signals_at_once_exit_with_the_code_of_the_first():
    interrupts_ = interrupts.Interrupts(lambda: None)
    interrupts_._receive(signal.SIGTERM, None)
    interrupts_._receive(signal.SIGINT, None)
    assert interrupts_.exception().code == 143


def test_jobs_in_the_background_go_on_ignoring_interrupts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.Interrupts(lambda: None).collected():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_example():
    results = doctest.testmod(interrupts)
    assert results.attempted and not results.failed
