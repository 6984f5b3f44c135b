"""Profiles one update, and lists where its time goes and what bounds it, by part and by operation.

python -m experiments.benchmarks.profile_update [--size=size1m] [--kind='images 64x64x3']

All is summed over the cores. `least` is what the operations would take at the peaks of a core,
which are measured in the same process: each the longer of its products at the peak of a large
product, and of its operands and results at the bandwidth of memory. Caches are faster than memory,
so that a part may need less. What operations leave of the time is a part of its own: on CPUs that
is where convolutions are, which run in threads that are not traced. --output=FILE writes the table
of parts there, as markdown.
"""

import argparse
import collections
import gzip
import json
import pathlib
import tempfile
import time
from typing import Any, NamedTuple

from experiments.benchmarks import measure, roofline
from experiments.machine import measured_on, measured_peak, time_of

NAME = 'experiments.benchmarks.profile_update'  # of this module, however it was started
# The part of the agent by a word in an operation's name; the first that fits counts.
PARTS = (
    ('(_uniform', 'random numbers'),
    ('Encoder', 'encoder'),
    ('Decoder', 'decoder'),
    ('Actor', 'actor'),
    ('Head', 'reward, continue and critic heads'),
    ('RSSMCell', 'recurrent model'),
    ('top_k', 'return percentiles'),
    ('optimizer', 'optimiser'),
    ('jvp', 'losses and sampling'),
)
LOOPS = {15: 'in imagination', 64: 'along the sequence'}  # by their length
COLUMNS = ('ms', 'share', 'GFLOP', 'of peak', 'GB', 'of bandwidth', 'least ms')


Operation = tuple[str, str]  # names of its program and of itself


def part_of(name: str, where: str, calls: float) -> str:
    """Part of the agent, and whether the operation is in a loop or backward."""
    if name.startswith(('all-reduce', 'all-gather', 'reduce-scatter')):
        return 'waiting for other cores'
    part = next((part for word, part in PARTS if word in where), 'copies and the rest')
    loop = next((text for length, text in LOOPS.items() if abs(calls - length) < 2), '')
    if 'while' in where and loop:
        return f'{part}, {loop}'
    return part + (', backward' if 'transpose(' in where else '')


def profile(
    size: str, kind: str, updates: int
) -> tuple[dict[Operation, Any], dict[Operation, list[float]], float]:
    """Costs of the compiled update's operations, seconds of all calls in `updates` updates, and of
    these updates."""
    import jax

    agent = measure.make_agent(size, kind)
    state, batch = agent.init(seed=0), measure.random_batch(agent)
    for _ in range(10):  # the first ones still use memory that was not used before
        state, *_ = jax.block_until_ready(agent.update(state, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            for _ in range(updates):
                state, *_ = jax.block_until_ready(agent.update(state, batch))
            seconds = time.perf_counter() - start
        (path,) = pathlib.Path(folder).rglob('*.trace.json.gz')
        events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
    texts = [program.as_text() for program in agent._programs]
    names = [text.split(',')[0].removeprefix('HloModule ') for text in texts]
    costs = {
        (module, name): cost
        for module, text in zip(names, texts, strict=True)
        for name, cost in roofline.costs(text).items()
    }
    calls = collections.defaultdict(list)
    for event in events:
        name = event.get('name', '')
        where = event.get('args', {}).get('hlo_module'), name
        if event.get('ph') == 'X' and where in costs and not name.startswith(('while', 'call')):
            calls[where].append(event['dur'] / 1e6)
    return costs, calls, seconds


def measured_bandwidth() -> float:
    """GB/s that all cores together read and write as they add arrays of 256 MB."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**26)
    add = jax.jit(lambda x: x + 1)
    seconds = min(time_of(lambda: add(x).block_until_ready()) for _ in range(5))
    return 2 * x.nbytes / seconds / 1e9


class Work(NamedTuple):
    """Calls of some operations in one update, summed over the cores."""

    seconds: float
    flops: float
    size: float  # bytes read and written
    least: float  # seconds

    def __add__(self, other: Any) -> Any:
        return Work(*(mine + its for mine, its in zip(self, other, strict=True)))

    def cells(self, whole: float, peak: float, bandwidth: float) -> list[str]:
        """What `COLUMNS` name, for one core's peak in FLOP/s and bandwidth in bytes/s."""
        return [
            f'{1e3 * self.seconds:.1f}',
            f'{self.seconds / whole:.1%}',
            f'{self.flops / 1e9:.2f}',
            f'{self.flops / self.seconds / peak:.0%}',
            f'{self.size / 1e9:.2f}',
            f'{self.size / self.seconds / bandwidth:.0%}',
            f'{1e3 * self.least:.1f}',
        ]


def table(works: list[tuple[str, Work]], whole: float, peak: float, bandwidth: float) -> str:
    """Markdown with a line for each."""
    lines = [['what', *COLUMNS], ['---'] * (len(COLUMNS) + 1)]
    lines += [[what, *work.cells(whole, peak, bandwidth)] for what, work in works]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--size', default='size1m')
    parser.add_argument('--kind', default='vectors')
    parser.add_argument('--updates', type=int, default=4)
    parser.add_argument('--top', type=int, default=20)
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args()

    from dreamerv3_jax import startup

    startup.prepare()

    import jax

    costs, calls, seconds = profile(options.size, options.kind, options.updates)
    cores = len(jax.devices())
    peak, bandwidth = measured_peak() * 1e9 / cores, measured_bandwidth() * 1e9 / cores
    parts: dict[str, Work] = {}
    operations: dict[str, Work] = {}
    for operation, durations in calls.items():
        cost, count = costs[operation], len(durations) / options.updates
        least = max(cost.flops / peak, cost.size / bandwidth)
        work = Work(
            sum(durations) / options.updates, *(count * x for x in (cost.flops, cost.size, least))
        )
        part = part_of(operation[1], cost.where, count / cores)
        parts[part] = work + parts.get(part, Work(0, 0, 0, 0))
        operations[f'{count:.0f} x {" ".join(operation)} {cost.where[-70:]}'] = work
    traced = sum((work for work in parts.values()), Work(0, 0, 0, 0))
    whole = traced._replace(seconds=cores * seconds / options.updates)
    parts['not traced (convolutions, or nothing)'] = Work(whole.seconds - traced.seconds, 0, 0, 0)

    def longest(works: dict[str, Work]) -> list[tuple[str, Work]]:
        return sorted(works.items(), key=lambda item: -item[1].seconds)

    rates = (whole.seconds, peak, bandwidth)
    text = (
        f'{measured_on()}: `python -m {NAME} '
        f"--size={options.size} --kind='{options.kind}'`. A core's peak is {peak / 1e9:.0f} "
        f'GFLOP/s, its part of the bandwidth {bandwidth / 1e9:.1f} GB/s.\n\n'
    ) + table([*longest(parts), ('all', whole)], *rates)
    print(text)
    print(table(longest(operations)[: options.top], *rates))
    if options.output:
        options.output.write_text(text)


if __name__ == '__main__':
    main()
