"""Plans all sizes on four topologies; writes plan.json and plan.md beside this file.

pip install libtpu  # the version that jax[tpu] asks for
python -m experiments.plan

Each case is compiled in a process of its own, which takes minutes; those that stand in plan.json
already are not compiled again. The observation is a 64x64x3 picture, the action one of 17.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from dreamerv3_jax import startup, topology
from dreamerv3_jax.configs import base
from experiments.machine import commit, processor

FOLDER = pathlib.Path(__file__).parent
NAME = 'experiments.plan'  # of this module, however it was started
SIZES = [size for size in base.SIZES if size.startswith('size')]
TOPOLOGIES = ('v5e:1x1', 'v5e:4x8', 'v5p:2x2x1', 'v6e:2x4', 'cpu:8')
HEADER = (
    '| size | settings | parameters | arguments + temporaries, GiB | all, GiB | fits '
    '| TFLOP | exchanged, MB | ms | steps/s |',
    '|---' * 10 + '|',
)


def case(size: str, where: str, **changes: Any) -> dict[str, Any]:
    """What identifies a case: the batch has one sequence for each device, but 16 at least."""
    batch = max(16, topology.parse(where).size)
    settings = {'replay.batch_size': batch, 'mesh.fsdp': 1, 'agent.remat': False}
    settings |= {'agent.compute_dtype': 'float32' if where.startswith('cpu') else 'bfloat16'}
    names = {'remat': 'agent.remat', 'fsdp': 'mesh.fsdp', 'dtype': 'agent.compute_dtype'}
    settings |= {names[name]: value for name, value in changes.items()}
    return {'size': size, 'topology': where, **settings}


def cases() -> list[dict[str, Any]]:
    """All of them: a table of sizes, what remat and bfloat16 do, and the largest size on 16 GB."""
    table = [case(size, where) for size in SIZES for where in TOPOLOGIES[1:]]
    settings = [
        case('size12m', TOPOLOGIES[0], remat=remat, dtype=dtype)
        for remat in (False, True)
        for dtype in ('bfloat16', 'float32')
    ]
    return [*table, *settings, case('size400m', 'v5e:4x8', fsdp=32, remat=True)]


def measure(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one case."""
    where = topology.parse(wanted['topology'])
    startup.prepare_plan(where.kind, where.size)
    from dreamerv3_jax import plan, presets, settings

    config = presets.load_config(f'gymnasium:{wanted["size"]}')
    for key, value in wanted.items():
        if '.' in key:
            settings.override(config, key, str(value))
    return dataclasses.asdict(plan.Planner(config, where).measure())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--case', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    path, how = FOLDER / 'plan.json', made()
    results = json.loads(path.read_text()) if path.exists() else []
    for wanted in cases():
        if any(result['case'] == wanted for result in results):
            continue
        print(wanted, flush=True)
        command = [sys.executable, '-m', NAME, '--case', json.dumps(wanted)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        results.append({'case': wanted, 'figures': figures, 'made': how})
        path.write_text(json.dumps(results, indent=1) + '\n')
        (FOLDER / 'plan.md').write_text(page(results))


def made() -> str:
    """When, where and with what a case was compiled."""
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'libtpu')]
    return f'{datetime.date.today()}, commit {commit()}, {", ".join(versions)}, on an {processor()}'


def page(results: list[dict[str, Any]]) -> str:
    """The results as tables."""
    found = {json.dumps(result['case']): result for result in results}
    rows = [found.get(json.dumps(wanted), {'case': wanted}) for wanted in cases()]
    missing = sum('figures' not in row for row in rows)
    lines = [
        '# Plans of all sizes',
        '',
        f'Written by `python -m {NAME}`: {"; ".join(sorted({x["made"] for x in results}))}.',
        'Observation: a 64x64x3 picture; 17 actions; sequences of 64 steps. Memory is that of a '
        'device, operations are those of all;',
        'times and steps (train ratio 256) are estimates, as `dreamerv3-jax plan` explains them.',
    ]
    if missing:
        lines += [f'{missing} of {len(rows)} cases have not been compiled yet and are left out.']
    for where in TOPOLOGIES:
        table = [
            row_of(result)
            for result in sorted(rows, key=lambda x: SIZES.index(x['case']['size']))
            if result['case']['topology'] == where and 'figures' in result
        ]
        lines += ['', f'## {where}', '', *HEADER, *table] if table else []
    return '\n'.join(lines) + '\n'


def row_of(result: Mapping[str, Any]) -> str:
    """One line of a table."""
    from dreamerv3_jax.plan import Figures, gib

    wanted, figures = result['case'], Figures(**result['figures'])
    batch = wanted['replay.batch_size']
    settings = f'{batch} sequences, {wanted["agent.compute_dtype"]}'
    settings += f', fsdp={wanted["mesh.fsdp"]}' * (wanted['mesh.fsdp'] > 1)
    settings += ', remat' * wanted['agent.remat']
    parts = '' if figures.refused else f'{gib(figures.arguments)} + {gib(figures.temporaries)}'
    exchanged = sum(amount for _, amount in figures.collectives.values())
    cells = [wanted['size'], settings, f'{figures.parameters:,}', parts, gib(figures.peak)]
    cpu = wanted['topology'].startswith('cpu')  # whose memory is what this machine had free
    cells += ['' if cpu else 'yes' if figures.fits else 'no', f'{figures.flops / 1e12:.3g}']
    cells += ['' if figures.refused else f'{exchanged / 1e6:,.0f}']
    if figures.refused or not figures.seconds:  # CPUs have no published peak
        cells += [''] * 2
    else:
        steps = batch * 64 / 256 / figures.seconds
        cells += [f'{1e3 * figures.seconds:.3g}', f'{steps:,.0f}']
    return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
    main()
