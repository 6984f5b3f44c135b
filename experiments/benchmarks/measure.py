"""Measures speed and memory on this machine; writes results.json and results.md beside this file.

python -m experiments.benchmarks.measure [CASE ...] [--runs=15] [--results=FOLDER]
python -m experiments.benchmarks.measure [CASE ...] --compare [--results=FOLDER]

Every case runs in a process of its own, beside nothing else, please: all cores are used. A figure
is the median of its runs with the least and the greatest in brackets: `--runs` of them, or as many
as begin within 40 seconds, but three at least. The machine's peak is that of a float32 matrix
product of 2048 cubed (the best of 5), measured before and after each run, as machines drift; a
share is that of the peak around its run. Operations are those of the program as it is. An update is
measured twice: in a process that compiles it, whose peak of memory (until its second update) is the
compiler's too, and "later" in one that finds it in the cache, as later starts of a run do. Without
cases, all of them are measured.

--compare writes nothing. It measures, compares with the results in the folder, those that are
committed by default, and fails when an update or the loop takes 15% longer relative to the peak, or
anything else half as long again. The replay waits for memory more than for products, so it fails
only if it is slower relative to how fast rows are gathered from half a gigabyte as well. What was
measured on another kind of machine is refused: measure an earlier commit on this one first.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.results import compare, table
from experiments.machine import (
    beside,
    measured_gathers,
    measured_on,
    measured_peak,
    peak_gigabytes,
    prepare_yardsticks,
    this_machine,
    time_of,
)

ROOT = pathlib.Path(__file__).parents[2]
NAME = 'experiments.benchmarks.measure'  # of this module, however it was started
UPDATES = (
    'update cpu vectors',
    *(
        f'update {size} {kind}'
        for size in ('size1m', 'size12m')
        for kind in ('vectors', 'images 64x64x3', 'images 96x96x3')
    ),
)
CASES = (
    *UPDATES,
    *(f'policy size1m {kind} {n}' for kind in ('vectors', 'images 64x64x3') for n in (1, 16)),
    'replay vectors',
    'replay images 64x64x3',
    'loop size1m vectors',
    'start cold',
    'start warm',
)
PEAK = {'machine gflops': measured_peak}
PEAK_AND_MEMORY = {**PEAK, 'machine gathers': measured_gathers}


def spaces(kind: str) -> tuple[Any, Any]:
    """The walker of the DeepMind Control Suite, or images with Crafter's 17 actions."""
    import gymnasium
    import numpy as np

    box = gymnasium.spaces.Box
    if kind == 'vectors':
        parts = {'height': (1,), 'orientations': (14,), 'velocity': (9,)}
        observation = {name: box(-np.inf, np.inf, shape) for name, shape in parts.items()}
        return gymnasium.spaces.Dict(observation), box(-1, 1, (6,))
    shape = tuple(map(int, kind.split()[1].split('x')))
    return box(0, 255, shape, np.uint8), gymnasium.spaces.Discrete(17)


def make_agent(size: str, kind: str) -> Any:
    """The agent for these spaces, on all devices."""
    from dreamerv3_jax import Agent, load_config, sharding

    config = load_config(f'gymnasium:{size}')
    mesh, _ = sharding.arrange(config.mesh, config.replay.batch_size)
    return Agent.from_spaces(*spaces(kind), config.agent, mesh)


def random_arrays(specs: Any, leading: tuple[int, ...], rng: Any) -> dict[str, Any]:
    """Random arrays of the given specs with these leading axes."""
    import numpy as np

    result: dict[str, Any] = {}
    for name, spec in specs.items():
        shape = (*leading, *spec.shape)
        if spec.kind == 'image':
            result[name] = rng.integers(0, 256, shape, np.uint8)
        elif spec.kind == 'discrete':
            result[name] = rng.integers(0, spec.classes, shape).astype(np.int32)
        else:
            result[name] = rng.standard_normal(shape, np.float32)
    return result


def random_batch(agent: Any) -> Any:
    """A batch of 16 sequences of 64 steps and their context, without ends of episodes."""
    import numpy as np

    rng, steps = np.random.default_rng(0), (16, 65)
    return agent.blank_batch(16, 64)._replace(
        observation=random_arrays(agent.observation_specs, steps, rng),
        action=random_arrays(agent.action_specs, steps, rng),
        reward=rng.standard_normal(steps, np.float32),
    )


def timed(function: Callable[[], Any], runs: int, repeat: int = 1) -> dict[str, Any]:
    """Seconds of a function's call, each the mean of `repeat`, after two that warm up."""
    function()
    function()
    gigabytes = peak_gigabytes()
    seconds, machine = beside(PEAK, lambda: time_of(function, repeat), runs)
    return {'seconds': seconds, **machine, 'peak gigabytes': gigabytes}


def measure_update(size: str, kind: str, runs: int) -> dict[str, Any]:
    import jax

    from dreamerv3_jax import flops

    agent = make_agent(size, kind)
    state, batch = agent.init(seed=0), random_batch(agent)
    operations = flops.count(agent.pure_update, state, batch)

    def run() -> None:
        nonlocal state
        state, *_ = jax.block_until_ready(agent.update(state, batch))

    return {**timed(run, runs), 'gflop': operations / 1e9}


def measure_policy(size: str, kind: str, count: int, runs: int) -> dict[str, Any]:
    import jax
    import numpy as np

    agent, rng = make_agent(size, kind), np.random.default_rng(0)
    params = agent.acting_params(agent.init(seed=0))
    state = agent.initial_policy_state(count)
    observation = random_arrays(agent.observation_specs, (count,), rng)
    step = 0

    def run() -> None:
        nonlocal state, step
        state, actions, latent = agent.policy(
            params, state, observation, np.zeros(count, bool), seed=(0, step)
        )
        jax.device_get((actions, latent))
        step += 1

    return timed(run, runs, 200)


def measure_replay(kind: str, runs: int) -> list[dict[str, Any]]:
    """Of an insertion, and of a sample."""
    import numpy as np

    from dreamerv3_jax.replay import Replay
    from dreamerv3_jax.steps import replay_specs

    agent, streams = make_agent('size1m', kind), 16
    specs = replay_specs(agent)
    replay = Replay(
        specs, capacity=100_000, streams=streams, batch_size=16, batch_length=64,
        online=False, seed=0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    random = {name: rng.integers(0, 256, (streams, *shape)) for name, (shape, _) in specs.items()}
    step = {name: random[name].astype(dtype) for name, (_, dtype) in specs.items()}
    step |= {name: np.zeros(streams, bool) for name in ('is_first', 'is_last', 'is_terminal')}
    for _ in range(100_000 // streams):
        replay.add(step)
    replay.sample()
    gigabytes, results = peak_gigabytes(), []
    for function, repeat in ((lambda: replay.add(step), 100), (replay.sample, 20)):
        seconds, machine = beside(PEAK_AND_MEMORY, lambda f=function, n=repeat: time_of(f, n), runs)
        results.append({'seconds': seconds, **machine, 'peak gigabytes': gigabytes})
    return results


def free_environment() -> Any:
    """An environment with the walker's spaces whose steps take no time."""
    import gymnasium

    class Free(gymnasium.Env):
        observation_space, action_space = spaces('vectors')

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self._observation, self._steps = self.observation_space.sample(), 0
            return self._observation, {}

        def step(self, action: Any) -> Any:
            self._steps += 1
            return self._observation, 1.0, False, self._steps == 500, {}

    return Free()


def measure_loop(size: str, runs: int) -> dict[str, Any]:
    """Seconds of a turn of the loop with one update, and of such an update alone, by turns."""
    import jax

    from dreamerv3_jax import load_config, loop

    config = load_config(f'gymnasium:{size}')
    config.env.update(id=f'{NAME}:free_environment', num_envs=16, vectorization='sync')
    config.replay.update(capacity=20_000, train_ratio=64.0)  # one update for each tick
    with (
        tempfile.TemporaryDirectory() as folder,
        loop.Trainer(config, pathlib.Path(folder), 'measure') as trainer,
    ):
        while trainer.counters['updates'] < 5:
            trainer.tick()
        gigabytes = peak_gigabytes()
        learner, batch = trainer._learner, random_batch(trainer._agent)

        def update() -> None:
            learner.state, *_ = jax.block_until_ready(trainer._agent.update(learner.state, batch))

        def run() -> tuple[float, float]:
            tick = time_of(trainer.tick, 5)
            learner.finish()
            return tick, time_of(update, 5)

        pairs, machine = beside(PEAK, run, runs)
    ticks, alone = map(list, zip(*pairs, strict=True))
    result = {'seconds': ticks, 'update alone seconds': alone, **machine}
    return {**result, 'peak gigabytes': gigabytes, 'steps': config.env.num_envs}


def measure_start(cache: str, runs: int) -> dict[str, Any]:
    """Seconds of a whole run of one update, with an empty or a filled compilation cache."""
    with tempfile.TemporaryDirectory() as folder:
        count = itertools.count()

        def run() -> float:
            index = next(count)
            home = f'{folder}/cache' if cache == 'warm' else f'{folder}/cache{index}'
            start = time.perf_counter()
            command = [sys.executable, '-m', 'dreamerv3_jax', 'train', '--config=gymnasium:size1m']
            command += ['--config.env.id=Pendulum-v1', f'--config.logdir={folder}/run{index}']
            command += ['--config.run.steps=1100', '--config.replay.train_ratio=1']
            command += ['--config.replay.capacity=10000']
            environment = {**os.environ, 'XDG_CACHE_HOME': home}
            environment.pop('JAX_COMPILATION_CACHE_DIR', None)
            subprocess.run(
                command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
            )
            seconds = time.perf_counter() - start
            last = pathlib.Path(f'{folder}/run{index}/metrics.jsonl').read_text().splitlines()[-1]
            assert json.loads(last)['count/updates'] == 1, last
            return seconds

        if cache == 'warm':
            run()
        seconds, machine = beside(PEAK, run, runs)
    return {'seconds': seconds, **machine}


def measure(case: str, runs: int) -> list[dict[str, Any]]:
    """Measures one case in this process; a replay has two results."""
    from dreamerv3_jax import startup

    startup.tune_cpu()
    prepare_yardsticks()
    what, *rest = case.split()
    if what == 'update':
        return [measure_update(rest[0], ' '.join(rest[1:]), runs)]
    if what == 'policy':
        return [measure_policy(rest[0], ' '.join(rest[1:-1]), int(rest[-1]), runs)]
    if what == 'replay':
        return measure_replay(' '.join(rest), runs)
    if what == 'loop':
        return [measure_loop(rest[0], runs)]
    return [measure_start(rest[0], runs)]


def names(case: str) -> list[str]:
    """Names in the results: an update is measured in two processes, a replay in two ways."""
    if case.startswith('update'):
        return [case, f'{case}, later']
    if case.startswith('replay'):
        return [f'{case} insert', f'{case} sample']
    return [case]


def measured(case: str, runs: int) -> dict[str, dict[str, Any]]:
    """Results by name; the second process of an update finds the programs of the first."""
    with tempfile.TemporaryDirectory() as cache:
        processes = 2 if case.startswith('update') else 1
        results: list[dict[str, Any]] = []
        for _ in range(processes):
            results += in_process(case, runs, JAX_COMPILATION_CACHE_DIR=cache)
    return dict(zip(names(case), results, strict=True))


def in_process(case: str, runs: int, **variables: str) -> list[dict[str, Any]]:
    """Measures one case in a process of its own, with these environment variables."""
    command = [sys.executable, '-m', NAME, case, f'--runs={runs}', '--here']
    environment = {**os.environ, **variables}
    output = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('cases', nargs='*', choices=[*CASES, []], default=[], metavar='CASE')
    parser.add_argument('--runs', type=int, default=15)
    parser.add_argument('--results', type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument('--compare', action='store_true')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options.runs)))
        return
    file, chosen = options.results / 'results.json', options.cases or CASES
    if options.compare:
        baseline = json.loads(file.read_text()) if file.exists() else {'cases': {}}
        needed = [name for case in chosen for name in names(case)]
        if missing := [name for name in needed if name not in baseline['cases']]:
            sys.exit(f'{file} has no {", ".join(missing)} to compare with.')
        there = baseline.get('machine', 'an unknown machine')
        if there != this_machine():
            sys.exit(
                f'{file} is of {there}, and this is {this_machine()}. Measure an earlier commit '
                'that has --results here, with --results=FOLDER, and compare with that.'
            )
    elif options.cases and options.results.resolve() == pathlib.Path(__file__).parent.resolve():
        sys.exit('The committed results hold all cases; choose another folder with --results.')
    options.results.mkdir(parents=True, exist_ok=True)
    cases: dict[str, Any] = {}
    results = {
        'measured': measured_on(),
        'machine': this_machine(),
        'python': platform.python_version(),
        'jax': importlib.metadata.version('jax'),
        'runs': options.runs,
        'cases': cases,
    }
    for case in chosen:
        print(f'{case} ...', flush=True)
        cases |= measured(case, options.runs)
        if not options.compare:  # each time, so that an interruption loses one case only
            file.write_text(json.dumps(results, indent=1) + '\n')
            file.with_suffix('.md').write_text(table(results))
    if options.compare:
        sys.exit(not compare(cases, baseline))
    print(table(results))


if __name__ == '__main__':
    main()
