"""A run that is killed: the short form of `experiments/kill_run.py`."""

from pathlib import Path

import numpy as np
import pytest
import tiny_runs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    'on_disk',
    [pytest.param(True, marks=pytest.mark.medium), pytest.param(False, marks=pytest.mark.slow)],
)
def test_kills(on_disk, tmp_path, quick_compilation, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from experiments import kill_run

    for name, value in tiny_runs.quick_variables(quick_compilation).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
    moments = ('checkpoint', 'start')
    kill_run.survive(tmp_path / 'run', kills=2, seed=0, on_disk=on_disk, moments=moments)


def test_a_torn_record_would_be_seen(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from experiments import kill_run

    steps = [0, 1, 2, 0, 1]
    arrays = {
        'count': [5],
        'data/observation/observation': [[[7, 1 + (n > 2), step] for n, step in enumerate(steps)]],
        'data/reward': [[step / 2 for step in steps]],
        'data/is_first': [[step == 0 for step in steps]],
        'data/is_last': [[False, False, True, False, False]],
        'data/is_terminal': [[False, False, True, False, False]],
    }

    def copied():
        return {name: np.array(values) for name, values in arrays.items()}

    kill_run.check_replay(copied(), length=5)
    for name in ('data/reward', 'data/is_first', 'data/is_last'):
        torn = copied()
        torn[name][0, 1] = 1
        with pytest.raises(AssertionError):
            kill_run.check_replay(torn, length=5)
    misplaced = {
        name: np.roll(values, 1, axis=1) if values.ndim > 1 else values
        for name, values in copied().items()
    }
    with pytest.raises(AssertionError):
        kill_run.check_replay(misplaced, length=5)
