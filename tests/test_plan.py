"""`dreamerv3-jax plan`: topologies, exchanges in a program's text, and figures of real updates."""

import dataclasses
import fnmatch
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import unittest.mock

import jax
import pytest
import tiny_runs

from dreamerv3_jax import cli, plan, presets, program, settings, startup, topology
from dreamerv3_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compilation')

# Four devices: 10 MB are gathered by one exchange spread over two operations, a loop of 5 adds up
# two arrays each time, and what is started is counted where it is done.
PROGRAM = """\
HloModule jit_update, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%start (p: bf16[2000000]) -> (bf16[5000000], s32[2]) {
  %p = bf16[1250000]{0} parameter(0)
  %all-gather.1 = bf16[5000000]{0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %custom-call.1 = (bf16[5000000]{0}, s32[2]{0}) custom-call(%all-gather.1)
}

%done (p.1: bf16[1250000]) -> bf16[5000000] {
  %p.1 = bf16[1250000]{0} parameter(0)
  ROOT %all-gather.2 = bf16[5000000]{0} all-gather(%p.1), channel_id=7, dimensions={0}
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %all-reduce.1 = (f32[8,4]{1,0}, /*index=1*/s8[]) all-reduce(%x, %i), channel_id=8, to_apply=%sum
  ROOT %tuple = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %five = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (p.2: bf16[1250000], x.1: f32[8,4]) -> f32[2,4] {
  %p.2 = bf16[1250000]{0} parameter(0)
  %fusion.1 = (bf16[5000000]{0}, s32[2]{0}) fusion(%p.2), kind=kCustom, calls=%start
  %fusion.2 = bf16[5000000]{0} fusion(%p.2), kind=kCustom, calls=%done
  %x.1 = f32[8,4]{1,0} parameter(1)
  %begin = (s32[], f32[8,4]{1,0}) tuple(%x.1)
  %loop = (s32[], f32[8,4]{1,0}) while(%begin), condition=%condition, body=%body
  %permute = (f32[8,4]{1,0}, f32[8,4]{1,0}) collective-permute-start(%x.1), channel_id=9
  %permuted = f32[8,4]{1,0} collective-permute-done(%permute)
  ROOT %scattered = f32[2,4]{1,0} reduce-scatter(%permuted), channel_id=10, to_apply=%sum
}
"""
FIGURES = plan.Figures(
    devices=4,
    memory=1000,
    parameters=10,
    arguments=100,
    results=20,
    temporaries=300,
    code=50,
    beside=30,
    refused=0,
    flops=8 * 10**12,
    products_seconds=0.010,
    state_seconds=0.002,
    exchange_seconds=0.004,
    collectives={'all-reduce': [3, 12_345_678]},
    compile_seconds=7.4,
)


@pytest.fixture(autouse=True)
def same_environment():
    """Plans set environment variables, for jax to start with."""
    with unittest.mock.patch.dict(os.environ):
        yield


def tiny(**changes):
    config = presets.load_config('gymnasium:nano')
    config.agent.update(tiny_runs.AGENT)
    values = {'replay.batch_size': 4, 'replay.batch_length': 8}
    values |= {name.replace('__', '.'): value for name, value in changes.items()}
    for key, value in values.items():
        settings.override(config, key, str(value))
    return config


def test_topologies():
    parsed = topology.parse('v6e:16x16')
    assert parsed == ('v6e', (16, 16)) and parsed.size == 256 and str(parsed) == 'v6e:16x16'
    assert topology.parse('v5p:2x2x1').size == 4
    assert topology.parse('cpu:8').size == 8
    for text in topology.EXAMPLES.replace(' or', ',').split(', '):
        assert str(topology.parse(text)) == text


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('v5f:2x2', "'v5f'; did you mean"),
        ('h100:8', "'h100'; choose one of v5e, v5p, v6e, cpu."),
        ('v5e', 'as in --topology=v5e:4x8, not v5e.'),
        ('v5p:2x2', 'as in --topology=v5p:2x2x1, not v5p:2x2.'),
        ('v5e:0x2', 'not v5e:0x2.'),
        ('cpu:x', 'as in --topology=cpu:8, not cpu:x.'),
        ('cpu:9999', 'up to 1024 devices, not 9999.'),
    ],
)
def test_topologies_that_are_none(text, words):
    with pytest.raises(UserError) as error:
        topology.parse(text)
    assert words in str(error.value)


def test_bytes_of_arrays():
    assert program.array_bytes('bf16[2,3]{1,0:T(8,128)(2,1)S(1)}') == 2 * 3 * 2
    assert program.array_bytes('(f32[], /*index=1*/pred[7], s4[6]{0}, token[])') == 4 + 7 + 3
    assert program.array_bytes('f8e4m3fn[5]') == 5


def test_exchanges_by_hand():
    assert sorted(program.collectives(PROGRAM)) == [
        ('all-gather', 10_000_000, 1),
        ('all-reduce', 8 * 4 * 4 + 1, 5),
        ('collective-permute', 8 * 4 * 4, 1),
        ('reduce-scatter', 8 * 4 * 4, 1),
    ]


def test_exchanges_in_loops_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match='loop with all-reduce.1'):
        program.collectives(PROGRAM.replace('direction=LT', 'direction=NE'))


def test_exchanges_of_a_real_loop():
    mesh = jax.make_mesh((2,), ('x',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.P('x'))

    whole = jax.sharding.NamedSharding(mesh, jax.P())

    def step(x, _):
        return x * jax.lax.with_sharding_constraint(x, whole).sum(), None

    x = jax.ShapeDtypeStruct((6,), 'float32', sharding=split)
    text = jax.jit(lambda x: jax.lax.scan(step, x, length=9)[0]).lower(x).compile().as_text()
    assert {collective.times for collective in program.collectives(text)} == {9}


def test_arithmetic_of_figures():
    assert FIGURES.peak == 500 and FIGURES.fits
    assert FIGURES.seconds == pytest.approx((0.010 + 0.002 + 0.004) / 0.5)
    assert dataclasses.replace(FIGURES, memory=511).fits  # 98% of it are 500.8
    assert not dataclasses.replace(FIGURES, memory=510).fits
    refused = dataclasses.replace(FIGURES, refused=1200)
    assert refused.peak == 1200 and not refused.fits


def test_rows_by_hand():
    config = presets.load_config('gymnasium')  # 16 sequences of 64 steps, train ratio 256
    rows = plan._after(config, FIGURES, topology.parse('v5e:2x2'))
    assert rows['operations'] == '8 TFLOP, 2 on each device'
    assert rows['exchanged'] == '3 all-reduce of 12.35 MB'
    assert rows['time'].startswith('32 ms, estimated, ')
    assert 'products 20, parameters and optimiser 4, exchanges 8' in rows['time']
    # One update every 16 * 64 / 256 = 4 steps, and 31.25 updates a second.
    assert rows['steps'].startswith('125 agent steps per second')
    assert '50% of the published 197 TFLOP/s, 819 GB/s' in rows['assuming']
    rows = plan._after(config, FIGURES, topology.parse('cpu:4'))
    assert rows['time'] == 'not estimated, as CPUs have no published peak'


def test_what_a_compiler_wanted():
    message = (
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
        'temporaries (47.50G) exceeds available HBM (15.75G).'  # of libtpu 0.0.42
    )
    assert plan._wanted(message) == 47.5 * 2**30
    message = 'RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20.50G of 15.75G hbm. Exceeded'
    assert plan._wanted(message) == 20.5 * 2**30
    assert plan._wanted('RESOURCE_EXHAUSTED: no memory') == 1
    assert dataclasses.replace(FIGURES, refused=1).peak == FIGURES.memory
    assert plan._wanted('INTERNAL: Used 20.50G of 15.75G') == 0


def mistake(capsys, *arguments):
    assert cli.main(['plan', *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.count('\n') == 1
    return captured.err


def test_cores_are_used_as_far_as_in_training():
    planner = plan.Planner(tiny(replay__batch_size=6), topology.parse('cpu:8'))
    assert planner.agent.mesh.size == 6


def test_mistakes(capsys, monkeypatch):
    assert 'Name the devices with --topology, as v5e:4x8' in mistake(capsys)
    assert 'did you mean --config.mesh.fsdp?' in mistake(capsys, '--fsdp=2')
    wrong = ('--config.replay.batch_size=12', '--config.mesh.data=8')
    message = mistake(capsys, '--topology=cpu:8', *wrong)
    assert 'A batch of 12 sequences does not divide among 8 devices' in message
    assert 'mesh.fsdp=3 does not' in mistake(capsys, '--topology=cpu:8', '--config.mesh.fsdp=3')
    assert "no environment 'Nothing-v0'" in mistake(
        capsys, '--topology=cpu:1', '--config.env.id=Nothing-v0'
    )
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    message = mistake(capsys, '--topology=v5e:2x2')
    assert "pip install 'libtpu==" in message and 'Traceback' not in message


@pytest.mark.medium
def test_figures_are_those_of_the_real_program(monkeypatch, capsys):
    """Through the command line."""
    monkeypatch.setattr('dreamerv3_jax.sharding.LEAST_SHARDED', 64)
    measure, measured = plan.Planner.measure, []

    def recorded(planner, *arguments):
        measured.append((planner, measure(planner, *arguments)))
        return measured[-1][1]

    monkeypatch.setattr(plan.Planner, 'measure', recorded)
    overrides = [f'--config.agent.{name}={value}' for name, value in tiny_runs.AGENT.items()]
    overrides += ['--config.replay.batch_size=4', '--config.replay.batch_length=8']
    overrides += ['--config.mesh.fsdp=2', '--config.env.id=CartPole-v1']
    assert cli.main(['plan', '--topology=cpu:2', *overrides]) == 0
    found = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert found['devices'] == 'cpu:2, mesh data=1 fsdp=2'
    assert found['observation'] == 'observation: 4 numbers'
    assert found['action'] == 'action: 2 choices'
    assert found['update'] == '4 sequences of 8 steps, float32, no remat'
    assert found['fits'].startswith('yes: ')
    assert re.search(r'[1-9]\d* \S+ of \d+\.\d\d MB', found['exchanged'])
    assert found['steps'] == 'one update every 0.125 (train ratio 256)'
    ((planner, figures),) = measured
    agent = planner.agent
    assert figures.parameters == sum(agent.parameter_counts().values())
    state, batch = agent.init(0), agent.send(agent.blank_batch(4, 8))
    device = jax.devices()[0]

    def on_device(tree):
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    assert figures.arguments == on_device((state, batch))
    assert figures.beside == on_device(batch) + on_device(agent.acting_params(state))
    whole = 4 * figures.parameters
    exchanged = sum(amount for _, amount in figures.collectives.values())
    # The parameters and their gradients, and a little of what is said of the batch.
    assert 1.8 * whole < exchanged < 2.6 * whole
    assert figures.fits and figures.seconds == 0 and figures.temporaries > 0


def test_without_an_environment_there_are_a_picture_and_a_choice():
    observation, action = plan.specs_of(tiny(env__image_size=48))
    assert {name: str(spec) for name, spec in observation.items()} == {'image': '48x48x3 image'}
    assert {name: str(spec) for name, spec in action.items()} == {'action': '17 choices'}


def test_the_nearest_setting_that_fits_is_looked_for(monkeypatch):
    tried = []

    def measure(self, changes=None):
        tried.append(changes)
        return dataclasses.replace(FIGURES, refused=0 if len(tried) == 3 else 1200)

    monkeypatch.setattr(plan.Planner, 'measure', measure)
    lines = []
    plan.report(tiny(replay__batch_size=8), topology.parse('cpu:8'), lines.append)
    nearest = {'agent.remat': 'true', 'mesh.fsdp': '2'}
    assert tried == [None, {'agent.remat': 'true'}, nearest]
    flags = '--config.agent.remat=true --config.mesh.fsdp=2'
    assert lines[-1].split(None, 1)[0] == 'nearest' and flags in lines[-1]
    tried[:] = ['none fits'] * 4
    plan.report(tiny(replay__batch_size=16), topology.parse('cpu:8'), lines.append)
    assert tried[-1] == nearest | {'mesh.fsdp': '8', 'replay.batch_size': '8'}
    assert lines[-1].startswith('nearest      none with these devices')


def test_settings_that_take_less_memory():
    """The nearest first: none that changes the numbers before those that do not."""

    def found(where, **changes):
        """What each alternative adds to the one before it."""
        planner = plan.Planner(tiny(**changes), topology.parse(where))
        planner.topology = topology.parse('v5e:2x2')
        choices = [{}, *planner.alternatives()]
        return [dict(new.items() - old.items()) for old, new in itertools.pairwise(choices)]

    halves = [{'replay.batch_size': size} for size in ('2', '1')]
    assert found('cpu:1') == [{'agent.remat': 'true'}, {'agent.compute_dtype': 'bfloat16'}, *halves]
    assert found('cpu:1', agent__remat=True, agent__compute_dtype='bfloat16') == halves
    wider = [{'mesh.fsdp': '3'}, {'mesh.fsdp': '6'}]
    assert found('cpu:6', mesh__fsdp=2, agent__remat=True, replay__batch_size=6)[:2] == wider
    split = [{'mesh.fsdp': '2', 'mesh.data': '2'}, {'mesh.fsdp': '4', 'mesh.data': '1'}]
    assert found('cpu:6', mesh__data=4, agent__remat=True)[:2] == split


def test_the_committed_table(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent)
    from experiments import plan as table

    text = (table.FOLDER / 'plan.json').read_text()
    results = {json.dumps(x['case']): x for x in json.loads(text)}
    assert list(results) == [json.dumps(case) for case in table.cases()]
    assert table.page(list(results.values())) == (table.FOLDER / 'plan.md').read_text()

    def figures(*arguments, **changes):
        return plan.Figures(**results[json.dumps(table.case(*arguments, **changes))]['figures'])

    page = (table.FOLDER.parent / 'docs' / 'scaling.md').read_text().replace('\n', ' ')
    largest = figures('size400m', 'v5e:4x8', fsdp=32, remat=True)
    assert largest.fits and largest.memory == 16 * 2**30
    assert f'an update takes {largest.peak / 2**30:.1f} GiB of a device' in page
    one = {
        (remat, dtype): figures('size12m', 'v5e:1x1', remat=remat, dtype=dtype)
        for remat in (False, True)
        for dtype in ('float32', 'bfloat16')
    }
    gib = [f'{x.temporaries / 2**30:.1f}' for x in one.values()]
    more = one[True, 'bfloat16'].flops / one[False, 'bfloat16'].flops - 1
    assert (
        f'{gib[0]} GiB in float32 and {gib[1]} GiB in bfloat16, and {gib[2]} and {gib[3]} GiB '
        f'with remat, for {100 * more:.0f}% more operations'
    ) in page


@pytest.mark.slow
def test_a_plan_for_a_tpu():
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('libtpu is not installed')
    overrides = [f'--config.agent.{name}={value}' for name, value in tiny_runs.AGENT.items()]
    command = [sys.executable, '-m', 'dreamerv3_jax', 'plan', '--topology=v5e:2x2', *overrides]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in ('fits         yes: ', 'all-reduce', 'agent steps per second keep it busy'):
        assert words in result.stdout


@pytest.mark.parametrize(
    ('module', 'device'),
    [
        ('libtpu', '/dev/vfio/0'),
        ('libtpu', '/dev/accel0'),
        ('jax_plugins', '/dev/nvidia0'),
        ('jax_plugins', '/dev/dxg'),
        ('jax_plugins', '/dev/kfd'),
    ],
)
def test_only_hardware_that_jax_can_use_is_an_accelerator(module, device, monkeypatch):
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    for installed, there, only_cpu in (
        (module, device, False),
        (module, '/dev/nvidiactl', True),
        (module, '/dev/accel', True),
        ('', device, True),
        ('libtpu' if module == 'jax_plugins' else 'jax_plugins', device, True),
    ):
        monkeypatch.setattr(
            importlib.util,
            'find_spec',
            lambda name, found=installed: found if name == found else None,
        )
        monkeypatch.setattr(
            startup.glob, 'glob', lambda pattern, found=there: fnmatch.filter([found], pattern)
        )
        assert startup._only_cpu() == only_cpu
