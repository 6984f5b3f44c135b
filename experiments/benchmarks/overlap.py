"""Measures how long an accelerator would wait for the loop; writes overlap.md beside this file.

python -m experiments.benchmarks.overlap [--ticks=300] [--output=FILE]

The loop is the real one, in the order that it has on a CPU (an accelerator is given the next update
before the one before is awaited), with pictures of 64x64x3, a size1m policy, and 16 environments in
processes of their own whose steps sleep for 5 ms. The update is not real: it sleeps, as the host
does while an accelerator computes, for a time that is given, and so leaves the cores to the loop as
an accelerator would. It begins when acting is done, as an accelerator does one thing after the
other. There is one update for each tick.

A tick can take no less than acting and then the longer of update and environments. Acting is timed
in the loop, as a processor that has waited for an update is slower than one that acts all the time:
from when the policy is called until its actions are there, which a thread waits for. The other two
are timed alone, in the same process; the update from when the actions are there, as it was started
before. What a tick takes beyond that is the loop's own: to store, to draw and send a batch, to
write latents back, to count. Of each there is the median.
"""

import argparse
import concurrent.futures
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks import measure
from experiments.machine import measured_on

NAME = 'experiments.benchmarks.overlap'
ENVIRONMENTS, STEP = 16, 0.005  # seconds
UPDATES = (0.01, 0.02, 0.05, 0.1)  # seconds


def slow_environment() -> Any:
    """An environment that shows pictures, and whose steps take 5 ms, in which it does nothing."""
    import gymnasium

    class Slow(gymnasium.Env):
        observation_space, action_space = measure.spaces('images 64x64x3')

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self._observation, self._steps = self.observation_space.sample(), 0
            return self._observation, {}

        def step(self, action: Any) -> Any:
            time.sleep(STEP)
            self._steps += 1
            return self._observation, 1.0, False, self._steps == 500, {}

    return Slow()


def make_agent_class(seconds: list[float]) -> type:
    """An agent whose updates sleep for the first number in a list, one after the other."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dreamerv3_jax import Agent
    from dreamerv3_jax.types import StoredLatent

    def compute(updates: Any, _: Any) -> Any:
        time.sleep(seconds[0])
        return np.int32(updates + 1)

    def seconds_since(start: float, awaited: Any) -> float:
        jax.block_until_ready(awaited)
        return time.perf_counter() - start

    class Asleep(Agent):
        waiter = concurrent.futures.ThreadPoolExecutor(1)

        def compile_update(self, batch_size: int, batch_length: int) -> None:
            shape = (batch_size, batch_length)

            def update(updates: Any, acted: Any) -> Any:
                count = jax.ShapeDtypeStruct((), np.int32)
                updates = jax.pure_callback(compute, count, updates, acted)
                deter = jnp.zeros((*shape, self.config.deter)) + 0.0 * updates
                stoch = jnp.zeros((*shape, self.config.stoch), np.uint8) + np.uint8(0) * updates
                metrics = {'optimizer/skipped': 0.0 * updates}
                return updates, StoredLatent(deter, stoch.astype(np.uint8)), metrics

            self.asleep = jax.jit(update)

        def policy(self, *arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            acted = super().policy(*arguments, **named)
            self.acted = acted[1]
            self.acting_took = self.waiter.submit(seconds_since, start, self.acted)
            return acted

        def update(self, state: Any, batch: Any) -> Any:
            updates, latents, metrics = self.asleep(state.updates, self.acted)
            return state.replace(updates=updates), latents, metrics

    return Asleep


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(seconds: Callable[[], float], count: int) -> float:
    """Median of the seconds that calls return, after some that warm up."""
    return statistics.median([seconds() for _ in range(count + 5)][5:])


def run(ticks: int) -> list[tuple[float, ...]]:
    """Seconds of update, acting, environments and the whole tick, for each time of an update."""
    import jax

    from dreamerv3_jax import load_config, loop

    config = load_config('gymnasium:size1m')
    config.env.update(id=f'{NAME}:slow_environment', num_envs=ENVIRONMENTS, vectorization='async')
    config.replay.update(capacity=20_000, train_ratio=1024 / ENVIRONMENTS)  # one update a tick
    config.mesh.data = 1
    seconds, rows = [0.0], []
    loop.Agent = make_agent_class(seconds)
    with (
        tempfile.TemporaryDirectory() as folder,
        loop.Trainer(config, pathlib.Path(folder), 'overlap') as trainer,
    ):
        agent, env = trainer._agent, trainer._env
        agent.compile_update(config.replay.batch_size, config.replay.batch_length)
        while trainer.counters['updates'] < 5:
            trainer.tick()
        chosen = jax.device_get(agent.acted)
        acting: list[float] = []

        def step() -> float:
            return seconds_of(lambda: env.step(chosen))

        def update() -> float:
            records = trainer._records
            agent.policy(
                trainer._learner.acting_params,
                trainer._policy_state,
                records.observation,
                records.is_first,
                (0, 0),
            )
            updated = agent.asleep(trainer._learner.state.updates, agent.acted)
            jax.block_until_ready(agent.acted)
            return seconds_of(lambda: jax.block_until_ready(updated))

        def tick() -> float:
            taken = seconds_of(trainer.tick)
            acting.append(agent.acting_took.result())
            return taken

        for seconds[0] in UPDATES:
            stepping, updating = median(step, ticks // 3), median(update, ticks // 3)
            ticking = median(tick, ticks)
            rows.append((updating, statistics.median(acting[-ticks:]), stepping, ticking))
    return rows


def table(rows: list[tuple[float, ...]]) -> str:
    """Markdown of the results."""
    import jax

    lines = [
        f'{measured_on()}, jax {jax.__version__}: `python -m {NAME}`. '
        'Milliseconds; shares are of the whole tick.',
        '',
        "| update | acting | environments | least | tick | the loop's own | waits | or acts |",
        '|---|---|---|---|---|---|---|---|',
    ]
    for update, acting, stepping, tick in rows:
        least = acting + max(update, stepping)
        times = ' | '.join(f'{1e3 * x:.1f}' for x in (update, acting, stepping, least, tick))
        shares = [(tick - least) / tick, 1 - (update + acting) / tick, 1 - update / tick]
        lines.append(f'| {times} | {" | ".join(f"{share:.1%}" for share in shares)} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--ticks', type=int, default=300)
    parser.add_argument(
        '--output', type=pathlib.Path, default=pathlib.Path(__file__).with_name('overlap.md')
    )
    options = parser.parse_args()

    from dreamerv3_jax import startup

    startup.tune_cpu()
    sys.setswitchinterval(1e-4)  # what sleeps needs Python's lock to begin, an accelerator does not
    text = table(run(options.ticks))
    options.output.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
