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
    assert (
        learned(tmp_path, '--config=quickstart', f'--config.seed={seed}') >= 195
    )  # the registered threshold


@pytest.mark.slow
@pytest.mark.parametrize(
    ('task', 'steps', 'target'),
    [('memory', 80_000, 0.9), ('catch', 60_000, 0.9)],  # by chance 0 and -0.6, at best 1
)
def test_bsuite_task_is_solved(task, steps, target, tmp_path):
    pytest.importorskip('bsuite')
    options = ['--config=gymnasium:nano', f'--config.env.id=experiments.bsuite_tasks:{task}']
    options += ['--config.env.num_envs=16', '--config.env.vectorization=sync']
    options += ['--config.replay.train_ratio=32', f'--config.run.steps={steps}']
    assert learned(tmp_path, *options) >= target
