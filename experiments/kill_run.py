"""Kills a training run at random moments, and looks each time at what is left of it.

python -m experiments.kill_run [--kills=30] [--seed=0] [--on-disk]

A process that trains is killed (SIGKILL) while it starts, while it writes a checkpoint or at any
time; then the same command goes on, and is killed again. After each kill the run is opened as that
command does: the newest complete checkpoint must be taken, nothing older than the checkpoint
interval may be lost, and every record of the replay must be whole and in its place.
"""

import argparse
import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from dreamerv3_jax import checkpoint, startup
from dreamerv3_jax.configs import gymnasium as preset

ROOT = Path(__file__).parents[1]
INTERVAL = 2.0  # seconds between checkpoints
SLACK = 5.0  # seconds that a checkpoint may take on a busy machine
PATIENCE = 180.0  # seconds that a start may take
MOMENTS = ('start', 'checkpoint', 'any')


class Clock(gymnasium.Env):
    """Observes a number of its own, its episode and its step; pays half the step."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 2**20, (3,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self._episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        if not self._episode:
            self._life = int(self.np_random.integers(2**20))
        self._episode, self._step = self._episode + 1, 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self._step += 1
        ended = bool(self.np_random.random() < 0.05)
        return self._observation(), self._step / 2, ended, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self._life, self._episode, self._step], np.float32)


def get_config(size: str = 'nano') -> Any:
    """A tiny agent that trains without end; the replay wraps around soon."""
    config = preset.get_config(size)
    config.env.update(id='experiments.kill_run:Clock', vectorization='sync')
    config.agent.update(deter=32, hidden=8, units=8, depth=2, stoch=4, classes=4, bins=15)
    config.replay.update(capacity=2000, batch_size=4, batch_length=16, train_ratio=16.0)
    config.run.update(steps=10**9, log_every=0.1, checkpoint_every=INTERVAL)
    return config


def survive(
    folder: Path, kills: int, seed: int, on_disk: bool, moments: Sequence[str] = MOMENTS
) -> None:
    """Raises AssertionError where something is lost; prints a line for every kill."""
    rng = np.random.default_rng(seed)
    command = [sys.executable, '-m', 'dreamerv3_jax', 'train']
    command += [f'--config={Path(__file__)}', f'--config.logdir={folder}']
    command += [f'--config.replay.on_disk={on_disk}']
    for number in range(kills):
        moment = moments[number % len(moments)]
        before = newest_complete(folder)
        with (folder.parent / 'printed').open('w') as printed:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed
            )
            try:
                wait(process, folder, moment, before, rng)
                assert process.poll() is None, (folder.parent / 'printed').read_text()
            finally:
                process.kill()
                process.wait(timeout=PATIENCE)
        kept = check(folder, on_disk, before)
        print(f'{number + 1:3}  killed at {moment:10}  goes on at step {kept:,}', flush=True)
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    wait(process, folder, 'any', newest_complete(folder), rng)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM


def wait(
    process: Any, folder: Path, moment: str, before: int | None, rng: np.random.Generator
) -> None:
    """Waits for the moment to kill."""

    def wait_for(condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition() and process.poll() is None:
            assert time.monotonic() < deadline, f'nothing to wait for within {PATIENCE} seconds'
            time.sleep(0.005)

    if moment == 'start' and before is not None:
        # Before that it imports, and holds nothing.
        wait_for(lambda: f'process {process.pid} ' in (folder / 'lock').read_text())
        time.sleep(rng.uniform(0, 5))
        return
    wait_for(lambda: newest_complete(folder) not in (before, None))
    if moment == 'checkpoint':
        wait_for(lambda: any((folder / 'checkpoints').glob('*.orbax-checkpoint-tmp*')))
        time.sleep(rng.uniform(0, 0.1))
    else:
        time.sleep(rng.uniform(0, 2 * INTERVAL))


def newest_complete(folder: Path) -> int | None:
    """Step of the newest checkpoint that is whole, down to its checksums, which come last."""
    sums = (folder / 'checkpoints').glob(f'[0-9]*/{checkpoint.CHECKSUMS}')
    return max((int(path.parent.name) for path in sums), default=None)


def check(folder: Path, on_disk: bool, before: int | None) -> int:
    """Opens a copy of the run; returns the step that it goes on from."""
    from dreamerv3_jax.loop import Trainer

    newest = newest_complete(folder)
    if newest is None:
        return 0
    assert before is None or newest >= before
    with tempfile.TemporaryDirectory(dir=folder.parent) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        config = get_config()
        config.replay.on_disk = on_disk
        logged = [json.loads(line) for line in complete_lines(folder / 'metrics.jsonl')]
        with contextlib.redirect_stdout(io.StringIO()), Trainer(config, Path(copy), '') as trainer:
            steps = trainer.counters['steps']
            state = trainer._replay.state()
            assert newest == trainer.counters['ticks'], 'the newest checkpoint was not taken'
            times = [row['time'] for row in logged if row['step'] > steps]
            lost = max(times) - min(times) if times else 0.0
            assert lost < INTERVAL + SLACK, f'the last {lost:.1f} seconds of training are lost'
            check_replay(state['arrays'], state['metadata']['steps per stream'])
    return steps


def complete_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]


def check_replay(arrays: dict[str, np.ndarray], length: int) -> None:
    """Every record must be whole, and follow the one before it."""
    for stream, count in enumerate(arrays['count']):
        rows = np.arange(max(count - length, 0), count) % length

        def ring(name: str, stream: int = stream, rows: np.ndarray = rows) -> np.ndarray:
            return arrays[f'data/{name}'][stream][rows]

        observation, is_first, is_last = map(
            ring, ('observation/observation', 'is_first', 'is_last')
        )
        life, episode, step = observation.T
        assert (is_first == (step == 0)).all() and not (is_first & is_last).any()
        np.testing.assert_array_equal(ring('reward'), step / 2)
        np.testing.assert_array_equal(ring('is_terminal'), is_last)
        joined = ~is_first[1:]
        assert (np.diff(step)[joined] == 1).all() and (np.diff(episode)[joined] == 0).all()
        same_life = np.diff(life) == 0
        assert same_life[joined].all() and not (joined & is_last[:-1]).any()
        assert (np.diff(episode)[same_life & ~joined] == 1).all()
        assert is_last[:-1][same_life & ~joined].all()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--on-disk', action='store_true', help='keep the replay on disk')
    options = parser.parse_args()
    startup.prepare()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        survive(Path(folder) / 'run', options.kills, options.seed, options.on_disk)
    print(f'Survived {options.kills} kills in {time.monotonic() - started:.0f} seconds.')


if __name__ == '__main__':
    main()
