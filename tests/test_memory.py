"""Long runs and many evaluations keep nothing: memory, processes, threads, files, programs."""

import gc
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny_runs

from dreamerv3_jax import startup
from dreamerv3_jax.evaluation import evaluate
from experiments import memory_flat

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs Linux'),
    pytest.mark.usefixtures('quick_compilation'),
]


@pytest.mark.medium
def test_memory_is_flat_once_a_run_is_warm(tmp_path, quick_compilation):
    """In a small process, of which a leak of one picture per step would be over two percent."""
    variables = tiny_runs.quick_variables(quick_compilation)
    variables |= {'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'}
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def check_memory(folder):
    config = tiny_runs.run_config('toy_envs:Camera', env__num_envs=8, replay__capacity=400)
    config.replay.train_ratio = 0.32  # an update every hundred steps
    config.run.update(steps=4400, checkpoint_every=1.0, log_every=0.1)
    found = memory_flat.measure(config, folder)
    assert len(found) == memory_flat.POINTS + 1
    assert found[0][1] < 1e9
    assert memory_flat.is_flat(found), found
    leaking = [(steps, size + (steps - found[0][0]) * 64 * 64 * 3) for steps, size in found]
    assert memory_flat.growth(leaking) > 0.02, found


def test_growth_is_what_goes_on():
    """Not a step at one time, nor hidden by what is given back."""

    def growth(*sizes):
        return memory_flat.growth(list(enumerate(sizes)))

    assert growth(100, 101, 102, 103, 104, 105, 106) == pytest.approx(3 * (106 / 104 - 1))
    assert growth(100, 100, 130, 130, 130, 130, 130) == 0.0
    assert growth(100, 101, 51, 52, 53, 54, 55) == pytest.approx(0.03)
    assert growth(*[7] * 51) == 0.0
    assert memory_flat.rise([(0, 100), (1, 50), (2, 60), (3, 55)]) == pytest.approx(0.2)
    assert not memory_flat.is_flat([(0, 100), (1, 100), (2, 106), (3, 106)])


@pytest.mark.slow
def test_memory_is_flat_for_200_000_steps():
    subprocess.run([sys.executable, '-m', 'experiments.memory_flat'], cwd=ROOT, check=True)


def held():
    """Numbers of what this process holds."""
    gc.collect()
    return {
        'processes': len(multiprocessing.active_children()),
        'threads': len(os.listdir('/proc/self/task')),
        'files': len(os.listdir('/proc/self/fd')),
        'programs': len(jax.devices()[0].client.live_executables()),
        'arrays': len(jax.live_arrays()),
    }


@pytest.mark.parametrize(
    'count', [pytest.param(2, marks=pytest.mark.medium), pytest.param(50, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('vectorization', ['sync', 'async'])
def test_evaluations_leave_nothing_behind(count, vectorization, tmp_path):
    """With an agent of its own each, which compiles its own policy."""
    config = tiny_runs.run_config('toy_envs:Counter', env__vectorization=vectorization)
    with tiny_runs.ticked(config, tmp_path, 3) as trainer:
        trainer.save()
    del trainer
    evaluate(tmp_path, episodes=2)
    before = held()
    for _ in range(count):
        evaluate(tmp_path, episodes=2)
    assert before['processes'] == 0
    deadline = time.monotonic() + 120
    while left := {name: (before[name], n) for name, n in held().items() if n > before[name]}:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)  # threads need a moment to end


if __name__ == '__main__':
    startup.tune_cpu()
    check_memory(Path(sys.argv[1]))
