"""Compiles the update for a TPU that is not here, as it is and as one would write it first.

pip install libtpu  # the version that jax[tpu] asks for
python -m experiments.benchmarks.accelerator [--size=size1m] [--kind='images 64x64x3']

Prints the memory for temporaries and the bytes read and written of one update on one TPU v5e, in
bfloat16, for both. Also looks for what no program for an accelerator should hold: float64, calls of
the host, and shapes known at run time only.
"""

import argparse
import re
from typing import Any

from dreamerv3_jax import program
from experiments.benchmarks import measure, plain, roofline

# Operations that move nothing, or whose inside is counted.
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while'}
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


def compiled(size: str, kind: str, mesh: Any) -> Any:
    """The compiled update."""
    from dreamerv3_jax import Agent, load_config

    config = load_config(f'gymnasium:{size}')
    config.agent.compute_dtype = 'bfloat16'
    agent = Agent.from_spaces(*measure.spaces(kind), config.agent, mesh)
    return agent.compile_update(config.replay.batch_size, config.replay.batch_length)


def bytes_accessed(text: str) -> int:
    """Bytes that the operations of a compiled program read and write, those in loops each time.

    XLA's own count takes what is in a loop once.
    """
    computations, entry = program.parse(text)
    costs = roofline.costs(text)
    inside = set(re.findall(r'(?:calls|to_apply)=%?([\w.\-]+)', text))  # of one operation
    total = 0
    for name, times in program.runs(computations, entry):
        if name in inside:
            continue
        if times is None:
            raise ValueError(f'How often does {name} run?')
        for instruction in computations[name]:
            if instruction.opcode.endswith('-done'):  # with its start, one read and one write
                total += times * 2 * program.array_bytes(instruction.shape)
            elif instruction.opcode not in FREE and not instruction.opcode.endswith('-start'):
                total += times * costs[instruction.name].size
    return total


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
            update = compiled(options.size, options.kind, mesh)
        text, temporaries = update.as_text(), update.memory_analysis().temp_size_in_bytes
        print(
            f'{name}: {temporaries / 1e9:.4f} GB of temporaries, '
            f'{bytes_accessed(text) / 1e9:.2f} GB read and written',
            flush=True,
        )
        for what, pattern in UNWANTED.items():
            if found := re.findall(pattern, text):
                print(f'  {len(found)} times {what}')


if __name__ == '__main__':
    main()
