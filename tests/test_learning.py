"""It learns: whole runs by the commands of the README, from nothing to the target. Slow.

python -m pytest -m slow tests/test_learning.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def command(*arguments):
    """Runs `dreamerv3-jax` as the user does; returns what it printed."""
    result = subprocess.run(
        [sys.executable, '-m', 'dreamerv3_jax', *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def learned(folder, *options):
    """Trains, then returns the mean return of 20 episodes with the most probable actions."""
    command('train', *options, f'--config.logdir={folder}')
    return float(re.search(r'mean return (\S+)', command('evaluate', folder))[1])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_quickstart_is_solved(seed, tmp_path):
    # The registered threshold; random play lasts some 50 steps.
    assert learned(tmp_path, '--config=quickstart', f'--config.seed={seed}') >= 195


@pytest.mark.slow
def test_memory_is_learned(tmp_path):
    pytest.importorskip('bsuite')
    options = ['--config=gymnasium:cpu', '--config.env.id=experiments.bsuite_tasks:memory']
    options += ['--config.env.num_envs=16', '--config.env.vectorization=sync']
    options += ['--config.replay.train_ratio=32', '--config.run.steps=110000']
    assert learned(tmp_path, *options) >= 0.9  # by chance 0, at best 1
