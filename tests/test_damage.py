"""Damaged files of a run: the checkpoint before is taken, or one sentence says what is wrong."""

import gc
import shutil

import jax
import numpy as np
import pytest
import tiny_runs

from dreamerv3_jax import checkpoint
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.loop import Trainer

CASES = 200
# What a run reads again; the rest of its files are written only.
READ = ('checkpoints/*/**/*', 'config.json', 'spaces.json', 'metrics.jsonl')


@pytest.fixture(scope='module', autouse=True)
def compiled(tmp_path_factory):
    with tiny_runs.quick_compilation(tmp_path_factory.getbasetemp() / 'compiled'):
        yield


@pytest.fixture(autouse=True)
def shared_agents(monkeypatch):
    tiny_runs.share_agents(monkeypatch)


def contents(trainer):
    """All that a run goes on from."""
    replay = trainer._replay.state()
    return jax.tree.map(
        np.array, (trainer._state, replay['arrays'], dict(trainer.counters)), is_leaf=np.isscalar
    ), replay['metadata']


def is_equal(found, expected):
    (trees, metadata), (expected_trees, expected_metadata) = found, expected
    equal = jax.tree.map(np.array_equal, trees, expected_trees)
    return metadata == expected_metadata and all(jax.tree.leaves(equal))


def damage(path, rng):
    """Truncates, changes or deletes a file; returns what was done."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(['cut', 'change', 'delete'] if data else ['delete'])
    if kind == 'cut':
        path.write_bytes(data[: rng.integers(len(data))])
    elif kind == 'change':
        place = rng.integers(len(data))
        data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
    else:
        path.unlink()
    return kind


@pytest.mark.medium
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of orbax's threads
def test_damages(tmp_path, caplog, capsys):
    config = tiny_runs.run_config('toy_envs:Counter', run__steps=1000)
    run, copy, rng = tmp_path / 'run', tmp_path / 'copy', np.random.default_rng(0)
    saved = []
    with Trainer(config, run, 'tiny') as trainer:
        for _ in range(2):
            for _ in range(25):
                trainer.tick()
            trainer._finish_update()
            trainer.log()
            trainer.save()
            saved.append(contents(trainer))
    files = [path.relative_to(run) for shape in READ for path in sorted(run.glob(shape))]
    files = [path for path in files if (run / path).is_file()]
    assert len(files) > 20
    newest = str(checkpoint.latest_step(run / 'checkpoints'))
    outcomes = dict.fromkeys(('newest', 'before', 'refused'), 0)
    for _ in range(CASES):
        shutil.copytree(run, copy)
        file = files[rng.integers(len(files))]
        case = f'{damage(copy / file, rng)} {file}'
        caplog.clear()
        try:
            with Trainer(config, copy, 'tiny') as trainer:
                found = contents(trainer)
        except UserError as error:
            assert str(error).endswith('.') and '\n' not in str(error), case
            assert str(copy) in str(error), case
            outcomes['refused'] += 1
        else:
            warnings = [record.getMessage() for record in caplog.records]
            if is_equal(found, saved[1]):
                assert not warnings, case
                outcomes['newest'] += 1
            else:
                assert is_equal(found, saved[0]), case
                assert newest in file.parts, case
                assert len(warnings) == 1 and str(copy / 'checkpoints' / newest) in warnings[0]
                outcomes['before'] += 1
        shutil.rmtree(copy)
    gc.collect()  # of what orbax's threads left, while it is no warning
    assert outcomes['before'] > CASES / 5 and outcomes['refused'] > 2, outcomes
