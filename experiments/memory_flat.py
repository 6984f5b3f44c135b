"""Is the memory of a long run flat? Trains from pixels long after the replay is full.

python -m experiments.memory_flat [STEPS]

This is the real loop, checkpoints included, for 200,000 steps of the environments with a tiny agent
and few updates. It fails where the resident memory goes on growing, by more than 2%, or once rises
by more than 5%. Linux only.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from dreamerv3_jax import startup
from dreamerv3_jax.presets import load_config

CAPACITY = 20_000
POINTS = 50
# How often the replay was filled when memory is first looked at. The first updates, logs and
# checkpoints take what later ones find.
WARM = 3


def config(steps: int) -> Any:
    """One update for every 100 steps."""
    settings = load_config('gymnasium:nano')
    settings.env.update(id='Hover-v0', num_envs=16, vectorization='sync')
    settings.agent.update(deter=32, hidden=8, units=8, depth=2, stoch=4, classes=4, bins=15)
    settings.replay.update(capacity=CAPACITY, batch_size=4, batch_length=16, train_ratio=0.64)
    settings.run.update(steps=steps, log_every=1.0, checkpoint_every=15.0)
    return settings


def measure(settings: Any, folder: Path) -> list[tuple[int, int]]:
    """Returns steps and resident bytes at points from `WARM` on to the end of a run."""
    from dreamerv3_jax.loop import Trainer

    found: list[tuple[int, int]] = []
    with Trainer(settings, folder, 'memory_flat') as trainer:
        tick, capacity, total = trainer.tick, settings.replay.capacity, settings.run.steps
        distance = (total - WARM * capacity) // POINTS

        def measured_tick() -> None:
            tick()
            steps = trainer.counters['steps']
            if steps < WARM * capacity:
                return
            if not found:
                trainer.save()  # the first one takes memory that later ones find
            if not found or steps >= found[-1][0] + distance:
                found.append((steps, resident_bytes()))

        trainer.tick = measured_tick  # type: ignore[method-assign]
        trainer.run()
    return found


def resident_bytes() -> int:
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def growth(found: list[tuple[int, int]]) -> float:
    """How much memory grows from the first point to the last, as a share; once is not growth.

    A leak goes on, so this is three times the least rise of a third of the points. The rise of a
    third is the largest between two of its points: what the compiler took may be given back at any
    time, and would hide a rise from the first to the last.
    """
    third = (len(found) - 1) / 3
    parts = (found[round(i * third) : round((i + 1) * third) + 1] for i in range(3))
    return 3 * min(map(rise, parts))


def is_flat(found: list[tuple[int, int]]) -> bool:
    """Whether memory neither goes on growing nor rises once by what is more than noise."""
    return growth(found) < 0.02 and rise(found) < 0.05


def rise(found: list[tuple[int, int]]) -> float:
    """Largest rise between two points, as a share of the earlier one."""
    sizes = [size for _, size in found]
    least = itertools.accumulate(sizes, min)
    return max(size / before - 1 for size, before in zip(sizes, least, strict=True))


def main() -> None:
    steps = int(float(sys.argv[1])) if len(sys.argv) > 1 else 200_000
    if steps < 2 * WARM * CAPACITY:
        sys.exit(f'Memory is looked at from {WARM * CAPACITY:,} steps on; give twice as many.')
    startup.prepare()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config(steps), Path(folder))
    for at, size in found:
        print(f'{at:>9,} steps  {size / 1e6:8.1f} MB')
    print(
        f'grew by {growth(found):.2%}, and rose by {rise(found):.2%} at most, after the replay had '
        f'been filled {WARM} times'
    )
    sys.exit(not is_flat(found))


if __name__ == '__main__':
    main()
