"""Compiles the update for a TPU that is not here, as it is and as one would write it first.

pip install 'libtpu==0.0.42.*'  # for jax 0.10.2
python -m experiments.benchmarks.accelerator [--output=FOLDER] [CASE ...]

For one TPU v5e and bfloat16: the memory for temporaries and the bytes read and written of one
update in both forms. The update and the policy are searched for what no program for an accelerator
should hold. Writes accelerator.md beside this file.
"""

import argparse
import importlib.metadata
import pathlib
import re
import sys
from typing import Any

from dreamerv3_jax import program
from experiments.benchmarks import measure, plain, roofline
from experiments.machine import commit

NAME = 'experiments.benchmarks.accelerator'  # of this module, however it was started
CASES = ('size1m vectors', 'size1m images 64x64x3', 'size12m vectors')
# Operations that move nothing, or whose inside is counted.
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while'}
UNWANTED = {
    'float64': r'\bf64\[',
    'calls of the host': r' (?:infeed|outfeed|send|recv)\(|custom_call_target="[^"]*callback',
    'shapes known at run time only': r'<=\d+\]',
    'gathers or scatters': r' (?:gather|(?:select-and-)?scatter)\(',
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


def make_agent(case: str, mesh: Any) -> Any:
    from dreamerv3_jax import Agent, load_config

    size, _, kind = case.partition(' ')
    config = load_config(f'gymnasium:{size}')
    config.agent.compute_dtype = 'bfloat16'
    return Agent.from_spaces(*measure.spaces(kind), config.agent, mesh)


def compiled_policy(agent: Any, count: int = 16) -> Any:
    """The compiled policy of that many environments."""
    import jax
    import numpy as np

    from dreamerv3_jax import sharding

    observation = {
        name: np.zeros((count, *spec.shape), spec.dtype)
        for name, spec in agent.observation_specs.items()
    }
    arguments = jax.eval_shape(
        lambda: (
            agent.acting_params(agent.init(0)),
            agent.initial_policy_state(count),
            observation,
            np.zeros(count, bool),
            np.zeros(2, np.uint32),
        )
    )
    arguments = sharding.abstract(arguments, sharding.replicated(agent.mesh))
    return agent._policy.lower(False, *arguments).compile()


def unwanted(text: str) -> dict[str, int]:
    """How often a compiled program holds what it should not."""
    found = {what: len(re.findall(pattern, text)) for what, pattern in UNWANTED.items()}
    computations, _ = program.parse(text)
    everything = {x.name: x for instructions in computations.values() for x in instructions}
    found['products of float32'] = sum(
        x.opcode in ('dot', 'convolution')
        and all(everything[operand].shape.startswith('f32') for operand in x.operands)
        for x in everything.values()
    )
    return {what: times for what, times in found.items() if times}


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
    parser.add_argument('cases', nargs='*', choices=[*CASES, []], default=[], metavar='CASE')
    parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    if options.cases and options.output.resolve() == pathlib.Path(__file__).parent.resolve():
        sys.exit('The committed table holds all cases; choose another folder with --output.')

    from dreamerv3_jax import startup

    startup.prepare_plan('v5e', 1)
    mesh = one_chip()
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'libtpu')]
    lines = [
        f'Compiled from commit {commit()} with {" and ".join(versions)}: `python -m {NAME}`.',
        '',
        '| size, observation | | temporaries | read and written | holds |',
        '|---|---|---|---|---|',
    ]
    for case in options.cases or CASES:
        programs = {'the policy': compiled_policy(make_agent(case, mesh))}
        for name, left_out in {'as it is': (), 'as written first': tuple(plain.PATCHES)}.items():
            with plain.without(*left_out):
                (programs[name],) = make_agent(case, mesh).compile_update(16, 64)
        for name, compiled in programs.items():
            text, temporaries = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
            cells = [
                case,
                name,
                f'{temporaries / 1e9:.3f} GB',
                f'{bytes_accessed(text) / 1e9:.2f} GB',
            ]
            cells.append(', '.join(f'{n} {what}' for what, n in unwanted(text).items()))
            lines.append(f'| {" | ".join(cells)} |')
    print(*lines, sep='\n')
    (options.output / 'accelerator.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
