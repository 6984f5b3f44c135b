"""Every suite by the whole path: play, replay, updates, checkpoint, evaluation. Slow.

python -m pytest -m slow tests/test_training_runs.py
"""

import json
import math
import os
import re
from pathlib import Path

import doubles
import pytest
from test_contract import CASES
from test_learning import command

from dreamerv3_jax import presets
from dreamerv3_jax.envs.registry import SUITES

STEPS = 500  # as in the contract, so that episodes end
UPDATES = 200  # at least; one for every two steps, after those that fill the first batch
SMALL = {
    'env.num_envs': 2,
    'replay.batch_size': 2,
    'replay.batch_length': 16,
    'replay.train_ratio': 16,
    'replay.capacity': 2000,
    'run.log_every': 1,
}


def suite_of(preset):
    return SUITES.get(presets.load_config(preset).env.id.partition('/')[0])


PRESETS = [name for name in presets.names() if suite_of(name)]


def test_every_suite_has_a_preset():
    suites = {suite_of(preset).title for preset in PRESETS}
    assert suites == {suite.title for suite in SUITES.values()}


@pytest.mark.slow
@pytest.mark.parametrize('preset', PRESETS)
def test_short_run(preset, tmp_path):
    suite = suite_of(preset)
    if not suite.installed:
        pytest.skip(f'{suite.title} is not installed: {suite.install}')
    check_run(preset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('preset', doubles.MODULES)
def test_short_run_of_a_stand_in(preset, tmp_path, monkeypatch):
    """What has to be built by hand goes the whole path too, without its world."""
    doubles.install(tmp_path)
    here = Path(__file__).parent
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(map(str, [tmp_path, here.parent, here])))
    check_run(preset, tmp_path / 'run')


def check_run(preset, logdir):
    env, settings = presets.load_config(preset).env, {**SMALL, 'logdir': logdir}
    suite = suite_of(preset)
    # The contract knows what makes episodes of the suite short.
    case = next(case for case in CASES if SUITES.get(case.id.partition('/')[0]) is suite)
    settings |= {f'env.kwargs.{name}': value for name, value in case.kwargs.items()}
    repeat = max(env.repeat, case.repeat)
    settings |= {'env.id': case.id, 'env.repeat': repeat, 'run.steps': STEPS * repeat}
    options = [f'--config.{name}={value}' for name, value in settings.items()]
    command('train', f'--config={preset}:nano', *options)
    lines = [json.loads(line) for line in (logdir / 'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['count/updates'] >= UPDATES
    assert lines[-1]['count/episodes'] >= 1
    assert lines[-1]['count/skipped'] == lines[-1]['count/restarts'] == 0
    losses = [value for name, value in lines[-1].items() if 'loss/' in name]
    assert losses and all(value is not None and math.isfinite(value) for value in losses)
    played = command('evaluate', logdir, '--episodes=2')
    assert math.isfinite(float(re.search(r'mean return (\S+)', played)[1]))
