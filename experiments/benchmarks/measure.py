"""Measures speed and memory on this machine; writes results.json and results.md beside this file.

python -m experiments.benchmarks.measure [CASE ...] [--runs=15] [--output=FOLDER]
python -m experiments.benchmarks.measure [CASE ...] --compare

Every case runs in a process of its own, beside nothing else, please: all cores are used. A figure
is the median of its runs with the least and the greatest in brackets. The machine's peak is that of
a float32 matrix product of 2048 cubed (the best of 10), measured before each run, as machines
drift; the share is that of the medians. Operations are those of the program as it is. An
update is measured twice: in a process that compiles it, whose peak of memory (until its second
update) is the compiler's too, and "later" in one that finds it in the cache, as later starts of a
run do. Without cases, all of them are measured.

--compare writes nothing. It measures, compares with the committed results, and fails when an update
or the loop takes 15% longer, relative to the peaks of both, or anything else half as long again.
The replay waits for memory more than for products, and memory drifts too, so it must be slower
relative to how fast rows are gathered from half a gigabyte as well.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.machine import Machine, measured_on, times_of

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
FIGURES = ('seconds', 'insert seconds', 'sample seconds')  # lists in the result of a case


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


def times_of_updates(
    agent: Any, state: Any, runs: int, before_each: Callable[[], Any] | None = None
) -> tuple[Any, list[float]]:
    """The state after updates from one batch, and the seconds that each took."""
    import jax

    batch = random_batch(agent)

    def run() -> None:
        nonlocal state
        state, *_ = jax.block_until_ready(agent.update(state, batch))

    seconds = times_of(run, runs, before_each=before_each)
    return state, seconds


def measure_update(size: str, kind: str, runs: int, machine: Machine) -> dict[str, Any]:
    from dreamerv3_jax import flops

    agent = make_agent(size, kind)
    state = agent.init(seed=0)
    operations = flops.count(agent.pure_update, state, random_batch(agent))
    _, seconds = times_of_updates(agent, state, runs, machine.measure)
    return {'seconds': seconds, 'gflop': operations / 1e9}


def measure_policy(size: str, kind: str, count: int, runs: int, machine: Machine) -> dict[str, Any]:
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

    return {'seconds': times_of(run, runs, 200, machine.measure)}


def measure_replay(kind: str, runs: int, machine: Machine) -> dict[str, Any]:
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
    before_each = machine.measure_with_memory
    return {
        'insert seconds': times_of(lambda: replay.add(step), runs, 100, before_each),
        'sample seconds': times_of(replay.sample, runs, 20, before_each),
        'machine gathers': machine.gathers,
    }


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


def measure_loop(size: str, runs: int, machine: Machine) -> dict[str, Any]:
    """Seconds of a turn of the loop with one update, and of such an update alone."""
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
        learner = trainer._learner
        ticks, alone = [], []
        for _ in range(3):  # by turns, as the machine drifts
            ticks += times_of(trainer.tick, runs)
            learner.finish()
            learner.state, seconds = times_of_updates(trainer._agent, learner.state, runs)
            alone += seconds
            machine.measure()
    return {'seconds': ticks, 'update alone seconds': alone, 'steps': config.env.num_envs}


def measure_start(cache: str, runs: int, machine: Machine) -> dict[str, Any]:
    """Seconds of a whole run of one update, with an empty or a filled compilation cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(min(runs, 3) + (cache == 'warm')):
            home = f'{folder}/cache' if cache == 'warm' else f'{folder}/cache{index}'
            machine.measure()
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
            seconds.append(time.perf_counter() - start)
            last = pathlib.Path(f'{folder}/run{index}/metrics.jsonl').read_text().splitlines()[-1]
            assert json.loads(last)['count/updates'] == 1, last
    return {'seconds': seconds[cache == 'warm' :]}


def measure(case: str, runs: int) -> dict[str, Any]:
    """Measures one case in this process."""
    from dreamerv3_jax import startup

    startup.tune_cpu()
    machine = Machine()
    what, *rest = case.split()
    if what == 'update':
        result = measure_update(rest[0], ' '.join(rest[1:]), runs, machine)
    elif what == 'policy':
        result = measure_policy(rest[0], ' '.join(rest[1:-1]), int(rest[-1]), runs, machine)
    elif what == 'replay':
        result = measure_replay(' '.join(rest), runs, machine)
    elif what == 'loop':
        result = measure_loop(rest[0], runs, machine)
    else:  # whose memory is that of other processes
        return {**measure_start(rest[0], runs, machine), 'machine gflops': machine.gflops}
    return {**result, 'peak gigabytes': machine.gigabytes, 'machine gflops': machine.gflops}


def table(results: dict[str, Any]) -> str:
    """Markdown of all results."""
    lines = [
        f'{results["measured"]}, Python {results["python"]}, jax {results["jax"]}: '
        f'`python -m {NAME} --runs={results["runs"]}`.',
        '',
        '| what | median (least - greatest) | GFLOP | share of peak | peak memory |',
        '|---|---|---|---|---|',
    ]
    for case, result in results['cases'].items():
        for name in FIGURES:
            if name not in result:
                continue
            values, what = result[name], f'{case} {name}'.removesuffix(' seconds')
            unit, scale = ('ms', 1e3) if statistics.median(values) < 0.1 else ('s', 1.0)
            middle, least, most = (
                f'{scale * value:.3g}'
                for value in (statistics.median(values), min(values), max(values))
            )
            cells = [what, f'{middle} {unit} ({least} - {most})', '', '', '']
            if 'gflop' in result:
                cells[2] = f'{result["gflop"]:.1f}'
                at_peak = result['gflop'] / statistics.median(result['machine gflops'])
                cells[3] = f'{at_peak / statistics.median(values):.0%}'
            if 'steps' in result:
                cells[0] += f', {result["steps"] / statistics.median(values):.0f} steps/s'
                alone = statistics.median(result['update alone seconds'])
                cells[0] += f', {statistics.median(values) / alone:.3f} times its update alone'
            if 'peak gigabytes' in result:
                cells[4] = f'{result["peak gigabytes"]:.2f} GB'
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def compare(cases: dict[str, Any], baseline: dict[str, Any]) -> bool:
    """Prints ratios to the baseline; returns whether none is too great.

    Ratios are those of medians, divided by how much slower the machine was: its products, or its
    memory where that is measured too, whichever fell more.
    """
    good = True
    for case, result in cases.items():
        before, median = baseline['cases'][case], statistics.median
        yardsticks = [name for name in result if name.startswith('machine')]
        slower = max(median(before[name]) / median(result[name]) for name in yardsticks)
        limit = 1.15 if case.startswith(('update', 'loop')) else 1.5
        for name in [name for name in FIGURES if name in result]:
            ratio = median(result[name]) / median(before[name]) / slower
            good &= ratio <= limit
            note = '  too slow' if ratio > limit else ''
            print(f'{ratio:6.2f} times the time of the baseline: {case} {name}{note}')
    return good


def names(case: str) -> list[str]:
    """Under which a case is in the results: an update is measured in two processes."""
    return [case, f'{case}, later'] if case.startswith('update') else [case]


def measured(case: str, runs: int) -> dict[str, dict[str, Any]]:
    """A case, each time in a process of its own; the second finds the programs of the first."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {'JAX_COMPILATION_CACHE_DIR': cache}
        return {name: in_process(case, runs, **variables) for name in names(case)}


def in_process(case: str, runs: int, **variables: str) -> dict[str, Any]:
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
    parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument('--compare', action='store_true')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options.runs)))
        return
    committed = pathlib.Path(__file__).parent / 'results.json'
    baseline = json.loads(committed.read_text()) if committed.exists() else {'cases': {}}
    chosen = options.cases or CASES
    needed = [name for case in chosen for name in names(case)]
    if options.compare and (missing := [x for x in needed if x not in baseline['cases']]):
        sys.exit(f'{committed} has no {", ".join(missing)} to compare with.')
    if options.cases and not options.compare and options.output == committed.parent:
        sys.exit('The committed results hold all cases; choose another folder with --output.')
    options.output.mkdir(parents=True, exist_ok=True)
    cases: dict[str, Any] = {}
    results = {
        'measured': measured_on(),
        'python': platform.python_version(),
        'jax': importlib.metadata.version('jax'),
        'runs': options.runs,
        'cases': cases,
    }
    for case in chosen:
        print(f'{case} ...', flush=True)
        cases |= measured(case, options.runs)
        if not options.compare:  # each time, so that an interruption loses one case only
            (options.output / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
            (options.output / 'results.md').write_text(table(results))
    if options.compare:
        sys.exit(not compare(cases, baseline))
    print(table(results))


if __name__ == '__main__':
    main()
