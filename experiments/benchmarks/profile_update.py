"""Profiles one update, and lists where its time goes: by part of the agent and by operation.

python -m experiments.benchmarks.profile_update [--size=size1m] [--kind='images 64x64x3']

XLA runs operations at the same time where it can, so what the operations take in all is more than
the update takes.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
import tempfile
from typing import Any

from experiments.benchmarks import measure

# The part of the agent by a word in an operation's name; the first that fits counts.
PARTS = (
    ('Encoder', 'encoder'),
    ('Decoder', 'decoder'),
    ('Actor', 'actor'),
    ('Head', 'reward, continue and critic heads'),
    ('RSSMCell', 'recurrent model'),
    ('percentile', 'return percentiles'),
    ('jvp', 'losses and sampling'),
)


def part_of(name: str, calls: int) -> str:
    """Part of the agent, and whether the operation is in imagination or along the sequence."""
    part = next((part for word, part in PARTS if word in name), 'optimiser and the rest')
    if 'while' in name:
        return f'{part}, {calls} times'
    return part + (', backward' if 'transpose(' in name else '')


def operation_names(program: str) -> dict[str, tuple[str, str]]:
    """Shape and name of every operation in the text of a compiled program."""
    names = {}
    for line in program.splitlines():
        if found := re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = (\S+) ', line):
            named = re.search(r'op_name="([^"]*)"', line)
            names[found[1]] = (found[2], named[1] if named else '')
    return names


def profile(size: str, kind: str, updates: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Operations of the compiled update, and the milliseconds of every call in one update."""
    import jax

    agent = measure.make_agent(size, kind)
    state, batch = agent.init(seed=0), measure.random_batch(agent)
    for _ in range(2):
        state, *_ = jax.block_until_ready(agent.update(state, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(updates):
                state, *_ = jax.block_until_ready(agent.update(state, batch))
        (path,) = pathlib.Path(folder).rglob('*.trace.json.gz')
        events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
    names = operation_names(agent._compiled_update.as_text())
    calls = collections.defaultdict(list)
    for event in events:
        name = event.get('name', '')
        if event.get('ph') == 'X' and name in names and not name.startswith(('while', 'call')):
            calls[name].append(event['dur'] / 1e3 / updates)
    return names, calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--size', default='size1m')
    parser.add_argument('--kind', default='vectors')
    parser.add_argument('--updates', type=int, default=4)
    parser.add_argument('--top', type=int, default=20)
    options = parser.parse_args()

    from dreamerv3_jax import startup

    startup.tune_cpu()
    names, calls = profile(options.size, options.kind, options.updates)
    total = sum(map(sum, calls.values()))
    parts: collections.Counter[str] = collections.Counter()
    for name, durations in calls.items():
        parts[part_of(names[name][1], len(durations) // options.updates)] += sum(durations)
    print(f'{total:8.1f} ms in all operations of one update')
    for part, milliseconds in parts.most_common():
        print(f'{milliseconds:8.1f} ms {milliseconds / total:6.1%}  {part}')
    print(f'\nThe {options.top} longest operations:')
    longest = sorted(calls.items(), key=lambda call: -sum(call[1]))[: options.top]
    for name, durations in longest:
        shape, where = names[name]
        times = len(durations) // options.updates
        print(f'{sum(durations):8.1f} ms {times:4d} x {name} {shape.split("{")[0]} {where[-90:]}')


if __name__ == '__main__':
    main()
