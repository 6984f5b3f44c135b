"""Compiles the update for a TPU that is not here, as it is and as one would write it first.

pip install libtpu  # the version that jax[tpu] asks for
python -m experiments.benchmarks.accelerator [--size=size1m] [--kind='images 64x64x3']

Prints the memory for temporaries and the bytes read and written of one update on one TPU v5e, in
bfloat16, for both. The compiler counts what is inside a scan once; so what a step adds is taken
from programs with a few more steps of it written out. Also looks for what no program for an
accelerator should hold: float64, calls of the host, and shapes known at run time only.
"""

import argparse
import contextlib
import re
from collections.abc import Iterator
from typing import Any

from experiments.benchmarks import measure, plain

LENGTH, IMAGINED = 64, 15
LOOPS = {LENGTH: 2, LENGTH - 1: 3, IMAGINED: 3}  # length of a scan: a divisor of it
UNWANTED = {
    'float64': r'\bf64\[',
    'calls of the host': r'\b(infeed|outfeed|send|recv|custom-call[^\n]*callback)\(',
    'shapes known at run time only': r'<=\d+\]',
}


def one_chip() -> Any:
    """The mesh of one TPU v5e, by its description."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    described = topologies.get_topology_desc('v5e:1x1', 'tpu', chips_per_host_bounds=[1, 1, 1])
    return Mesh(
        np.array(described.devices).reshape(1, 1), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2
    )


@contextlib.contextmanager
def written_out(length: int, steps: int) -> Iterator[None]:
    """Traces scans of this length with `steps` steps in the body of the loop."""
    import jax

    scan = jax.lax.scan

    def patched(step: Any, start: Any, inputs: Any = None, *rest: Any, **options: Any) -> Any:
        if jax.tree.leaves(inputs)[0].shape[0] == length:
            options['unroll'] = steps
        return scan(step, start, inputs, *rest, **options)

    jax.lax.scan = patched
    try:
        yield
    finally:
        jax.lax.scan = scan


def compiled(size: str, kind: str, mesh: Any) -> Any:
    """The compiled update."""
    from dreamerv3_jax import Agent, load_config

    config = load_config(f'gymnasium:{size}')
    config.agent.compute_dtype = 'bfloat16'
    agent = Agent.from_spaces(*measure.spaces(kind), config.agent, mesh)
    agent.compile_update(config.replay.batch_size, LENGTH)
    return agent._compiled_update


def costs(size: str, kind: str, mesh: Any, once: Any) -> dict[str, float]:
    """Operations and bytes of one update, of which `once` is the compiled program."""
    total = dict(once.cost_analysis())
    result = {name: total[name] for name in ('flops', 'bytes accessed')}
    for length, steps in LOOPS.items():
        with written_out(length, steps):
            more = compiled(size, kind, mesh).cost_analysis()
        for name in result:
            result[name] += (more[name] - total[name]) / (steps - 1) * (length - 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--size', default='size1m')
    parser.add_argument('--kind', default='vectors')
    options = parser.parse_args()

    from dreamerv3_jax import startup

    startup.prepare_plan('v5e', 1)
    mesh = one_chip()
    print(f'{options.size} {options.kind}, one TPU v5e:', flush=True)
    for name, left_out in {'as it is': (), 'as written first': tuple(plain.PATCHES)}.items():
        with plain.without(*left_out):
            program = compiled(options.size, options.kind, mesh)
            cost = costs(options.size, options.kind, mesh, program)
        temporaries = program.memory_analysis().temp_size_in_bytes
        print(
            f'{name}: {temporaries / 1e9:.3f} GB of temporaries, '
            f'{cost["bytes accessed"] / 1e9:.2f} GB read and written, '
            f'{cost["flops"] / 1e9:.0f} GFLOP',
            flush=True,
        )
        for what, pattern in UNWANTED.items():
            if found := re.findall(pattern, program.as_text()):
                print(f'  {len(found)} times {what}')


if __name__ == '__main__':
    main()
