"""Damaged files of a run: the checkpoint before is taken, or one sentence says what is wrong."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs

from dreamerv3_jax import checkpoint
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.loop import Trainer

BESIDE = ('config.json', 'spaces.json', 'metrics.jsonl')  # of what a run reads again


@pytest.mark.parametrize(
    'cases', [pytest.param(60, marks=pytest.mark.medium), pytest.param(200, marks=pytest.mark.slow)]
)
def test_damages(cases, quick_compilation, tmp_path):
    """In a process of its own, as orbax leaves much behind where it cannot read a file."""
    here = Path(__file__).parent
    variables = tiny_runs.quick_variables(quick_compilation)
    variables |= {'PYTHONPATH': f'{here.parent}{os.pathsep}{here}'}
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(cases)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'Traceback' not in result.stderr


def contents(trainer):
    """All that a run goes on from."""
    replay = trainer._learner.feed.state()
    return jax.tree.map(
        np.array,
        (trainer._learner.state, replay['arrays'], dict(trainer.counters)),
        is_leaf=np.isscalar,
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


def make_run(config, run):
    """A run with two checkpoints; returns what they hold."""
    saved = []
    with Trainer(config, run, 'tiny') as trainer:
        for _ in range(2):
            for _ in range(25):
                trainer.tick()
            trainer._learner.finish()
            trainer.log()
            trainer.save()
            saved.append(contents(trainer))
    return saved


def try_damages(folder, cases):
    config = tiny_runs.run_config('toy_envs:Counter', run__steps=1000)
    run, copy, rng = folder / 'run', folder / 'copy', np.random.default_rng(0)
    before, newest = make_run(config, run)
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger(checkpoint.__name__).addHandler(handler)
    last = run / 'checkpoints' / str(checkpoint.latest_step(run / 'checkpoints'))
    inside = [path.relative_to(run) for path in sorted(last.rglob('*')) if path.is_file()]
    others = [path.relative_to(run) for path in sorted((run / 'checkpoints').rglob('*'))]
    others = [path for path in others if (run / path).is_file() and path not in inside]
    beside = list(map(Path, BESIDE))
    outcomes = dict.fromkeys(('newest', 'before', 'refused'), 0)
    for number in range(cases):
        shutil.copytree(run, copy)
        files = (others, inside, beside, inside)[number % 4]
        file = files[rng.integers(len(files))]
        case = f'{damage(copy / file, rng)} {file}'
        warnings.clear()
        try:
            with Trainer(config, copy, 'tiny') as trainer:
                found = contents(trainer)
        except UserError as error:
            assert str(error).endswith('.') and '\n' not in str(error), case
            assert str(copy) in str(error) and file.name in BESIDE, case
            outcome = 'refused'
        else:
            outcome = 'newest' if is_equal(found, newest) else 'before'
            if outcome == 'before':
                assert is_equal(found, before) and file in inside, case
                assert len(warnings) == 1 and str(copy / last.relative_to(run)) in warnings[0], case
                assert file.name in warnings[0], (case, warnings)
            else:
                assert not warnings, case
        outcomes[outcome] += 1
        shutil.rmtree(copy)
    assert outcomes['before'] > cases / 4 and outcomes['refused'] > cases / 20, outcomes


if __name__ == '__main__':
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.share_agents(patch)
        try_damages(Path(sys.argv[1]), int(sys.argv[2]))
