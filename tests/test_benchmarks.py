"""The benchmarks count, compare and write what they should."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
import tiny_runs

from dreamerv3_jax import flops, update

ROOT = Path(__file__).parent.parent
MEASURE = [sys.executable, '-m', 'experiments.benchmarks.measure']


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def count(function, *shapes):
    return flops.count(function, *(jnp.ones(shape) for shape in shapes))


def test_products_by_hand():
    # 2 * 4 sums of 3 multiply-adds.
    assert count(jnp.matmul, (2, 3), (3, 4)) == 2 * 2 * 4 * 3
    assert count(jnp.matmul, (5, 2, 3), (5, 3, 4)) == 5 * 2 * 2 * 4 * 3
    assert count(jnp.add, (2, 3), (2, 3)) == 0
    # Backwards there are two more products of the same size.
    square = jax.grad(lambda x, y: jnp.square(x @ y).sum(), argnums=(0, 1))
    assert count(square, (2, 3), (3, 4)) == 3 * 2 * 2 * 4 * 3


def test_convolutions_by_hand():
    def convolve(groups):
        return lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )  # fmt: skip

    # 7 images of 4 x 4 pixels with 6 features, each a sum of 25 * 3 multiply-adds.
    assert count(convolve(1), (7, 4, 4, 3), (5, 5, 3, 6)) == 2 * 7 * 16 * 6 * 25 * 3
    assert count(convolve(3), (7, 4, 4, 3), (5, 5, 1, 6)) == 2 * 7 * 16 * 6 * 25


def test_scans_are_unrolled_and_unknown_lengths_refused():
    def scanned(x, y):
        return jax.lax.scan(lambda carry, _: (carry @ y, None), x, length=5)[0]

    def loop(x, y):
        return jax.lax.while_loop(lambda carry: carry[0, 0] < 9, lambda carry: carry @ y, x)

    assert count(scanned, (3, 3), (3, 3)) == 5 * 2 * 27
    assert count(jax.jit(scanned), (3, 3), (3, 3)) == 5 * 2 * 27
    # Three arrays of 9 numbers, 4 bytes each.
    assert flops.products(scanned, jnp.ones((3, 3)), jnp.ones((3, 3))) == [(2 * 27, 3 * 36, 5)]
    with pytest.raises(ValueError, match='products in a while'):
        count(loop, (3, 3), (3, 3))


def test_everything_is_compared_relative_to_the_machine():
    from experiments.benchmarks import results

    def result(seconds, gflops=100.0, gathers=None):
        memory = {} if gathers is None else {'machine gathers': [gathers] * 3}
        return {'seconds': [seconds] * 3, 'machine gflops': [gflops] * 3, **memory}

    for case, after, good in (
        ('update', result(1.14), True),
        ('update', result(1.16), False),
        ('update', result(1.2, gflops=80), True),
        ('update', result(0.9, gflops=130), False),  # a faster machine hides nothing
        ('loop', result(1.2), False),
        ('policy', result(1.2), True),
        ('policy', result(1.6), False),
        ('policy', result(1.6, gflops=80), True),
        ('start', result(1.6), False),
        ('replay', result(1.6, gathers=10), False),
        ('replay', result(1.6, gathers=6), True),
        ('replay', result(1.6, gflops=80, gathers=10), True),
        ('replay', result(0.9, gflops=180, gathers=18), False),
    ):
        before = result(1.0, gathers=10 if case == 'replay' else None)
        assert results.compare({case: after}, {'cases': {case: before}}) == good, (case, after)


def test_each_run_is_relative_to_the_machine_around_it():
    from experiments import machine
    from experiments.benchmarks import results

    peaks, taken = iter([100.0, 300.0, 50.0, 150.0]), iter([3.0, 1.0, 2.0])
    yardsticks = {'machine gflops': lambda: next(peaks)}
    seconds, machine_then = machine.beside(yardsticks, lambda: next(taken), 3)
    assert seconds == [3.0, 1.0, 2.0] and machine_then == {'machine gflops': [200.0, 175.0, 100.0]}
    # The median of 600, 175 and 200; that of the seconds times that of the peaks is 350.
    assert results.work({'seconds': seconds, **machine_then}, 'machine gflops') == 200.0


@pytest.mark.parametrize(('each', 'count'), [(0.1, 15), (10.0, 4), (15.0, 3), (100.0, 3)])
def test_slow_calls_end_early_but_not_before_the_third(monkeypatch, each, count):
    from experiments import machine

    now = iter(each * index for index in range(20))
    monkeypatch.setattr(machine, 'time', types.SimpleNamespace(perf_counter=lambda: next(now)))
    results, _ = machine.beside({'x': lambda: 1.0}, lambda: None, 15)
    assert len(results) == count


def test_memory_is_gathered_from_places_that_no_cache_holds(monkeypatch):
    import numpy as np

    from experiments import machine

    drawn = []
    monkeypatch.setattr(np, 'take', lambda memory, rows, **_: drawn.append(rows))
    assert machine.measured_gathers() > 0
    memory, gathered = machine._memory()
    assert memory.nbytes == 2**29 and gathered.nbytes == 2**26
    machine._memory.cache_clear()
    assert len(np.unique(np.concatenate(drawn))) == len(memory)  # no row twice


@pytest.mark.medium
def test_a_case_is_measured_and_written(tmp_path, quick_compilation):
    from experiments import machine

    command = [*MEASURE, 'policy size1m vectors 1', '--runs=2', f'--results={tmp_path}']
    variables = tiny_runs.quick_variables(quick_compilation) | {'JAX_NUM_CPU_DEVICES': '1'}
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (case,) = json.loads((tmp_path / 'results.json').read_text())['cases'].values()
    assert len(case['seconds']) == 2 and case['peak gigabytes'] > 0.1
    assert len(case['machine gflops']) == 2 and min(case['machine gflops']) > 1
    assert '| policy size1m vectors 1 |' in (tmp_path / 'results.md').read_text()
    other = (tmp_path / 'results.json').read_text().replace(machine.this_machine(), 'another one')
    (tmp_path / 'results.json').write_text(other)
    result = subprocess.run(
        [*command, '--compare'], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1 and 'results.json is of another one, and' in result.stderr


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['updat'], 'invalid choice'),
        (['start cold'], 'choose another folder with --results'),
        (['start cold', '--results=experiments/benchmarks'], 'choose another folder'),
    ],
)
def test_what_cannot_be_measured_is_refused_first(arguments, words):
    result = subprocess.run(
        [*MEASURE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode and words in result.stderr
    assert 'Traceback' not in result.stderr


def test_products_whose_result_is_not_used_do_not_count():
    def step(total, x):
        x @ x
        return total + x @ x @ x, None

    operations = count(lambda x: jax.lax.scan(step, x[0], x)[0], (5, 4, 4))
    assert operations == 5 * 2 * 2 * 4**3


@pytest.mark.medium
def test_plain_forms_are_used_and_compute_the_same(monkeypatch, quick_compilation):
    from experiments.benchmarks import measure, plain

    agent = measure.make_agent('nano', 'images 48x48x3')
    state, batch = agent.init(seed=0), measure.random_batch(agent)
    batch = jax.tree.map(lambda x: x[:4, :5] if x.shape[1] == 65 else x[:4], batch)

    def gradients():
        def total(params):
            return update.total_loss(
                params, state.slow_critic, state.percentiles, batch, jax.random.key(0),
                networks=agent.networks, observation_specs=agent.observation_specs,
                action_specs=agent.action_specs, config=agent.config,
            )[0]  # fmt: skip

        return jax.jit(jax.grad(total))(state.params)

    expected, used = gradients(), set()
    for name, (module, attribute, function) in plain.PATCHES.items():

        def recorded(*arguments, name=name, function=function, **options):
            used.add(name)
            return function(*arguments, **options)

        monkeypatch.setitem(plain.PATCHES, name, (module, attribute, recorded))
    with plain.without(*plain.PATCHES):
        chex.assert_trees_all_close(gradients(), expected, rtol=1e-3, atol=1e-5)
    assert used == set(plain.PATCHES)
    used.clear()
    jax.eval_shape(gradients)
    assert not used  # all is as before


def test_costs_of_operations_by_hand():
    from experiments.benchmarks import roofline

    def step(total, x):
        return total + x @ x, None

    x = jnp.ones((5, 4, 4))
    text = jax.jit(lambda x: jax.lax.scan(step, x[0], x)[0]).lower(x).compile().as_text()
    costs = roofline.costs(text)
    products = [cost for name, cost in costs.items() if cost.flops and 'while' not in name]
    assert products and all(cost.flops == 2 * 4**3 for cost in products)
    # A matrix is read twice and written once, or added to the total as well.
    assert all(3 * 64 <= cost.size <= 5 * 64 for cost in products)
    assert 'dot_general' in products[0].where
    # Of five matrices one is read, at an index, and written.
    (cost,) = [cost for name, cost in costs.items() if 'dynamic-slice' in name]
    assert cost.size == 64 + 4 + 64


def test_what_no_accelerator_should_do_is_found():
    from experiments.benchmarks import accelerator

    text = """HloModule jit_f

ENTRY %main (a: f32[2,2], b: bf16[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} parameter(0)
  %b = bf16[2,2]{1,0} parameter(1)
  LINES
}
"""
    found = {
        '%x = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}': 'products of float32',
        '%x = f64[2,2]{1,0} convert(%a)': 'float64',
        '%x = f32[2]{0} gather(%a, %a), offset_dims={0}': 'gathers or scatters',
        '%x = f32[2]{0} select-and-scatter(%a, %a, %a), to_apply=%f': 'gathers or scatters',
        '%x = f32[2]{0} custom-call(%a), custom_call_target="xla_python_cpu_callback"': (
            'calls of the host'
        ),
        '%x = f32[<=2]{0} set-dimension-size(%a, %a)': 'shapes known at run time only',
        '%x = f32[2,2]{1,0} dot(%b, %b), lhs_contracting_dims={1}': None,
    }
    for line, what in found.items():
        assert accelerator.unwanted(text.replace('LINES', line)) == ({what: 1} if what else {})


def test_the_page_on_speed_shows_what_was_measured():
    from experiments.benchmarks import measure, plain
    from experiments.benchmarks import results as report

    folder, page = ROOT / 'experiments/benchmarks', (ROOT / 'docs/speed.md').read_text()
    for machine in folder, folder / 'avx2':
        results = json.loads((machine / 'results.json').read_text())
        assert list(results['cases']) == [
            name for case in measure.CASES for name in measure.names(case)
        ]
        assert set(report.AIMS) < set(results['cases'])
        assert report.table(results) == (machine / 'results.md').read_text()
    for name in (
        'results', 'profile_vectors', 'profile_images', 'profile_size12m', 'accelerator',
        'plain_vectors', 'plain_images',
    ):  # fmt: skip
        assert (folder / f'{name}.md').read_text() in page
    for kind in ('vectors', 'images 64x64x3'):
        table = (folder / f'plain_{kind.split()[0]}.md').read_text()
        rows = [line.split(' | ')[0][2:] for line in table.splitlines() if line.startswith('| ')]
        assert rows[1:] == [*plain.names(kind), 'all of these', *plain.SETTINGS]


@pytest.mark.medium
def test_overlap_measures_the_real_loop(monkeypatch, quick_compilation):
    from dreamerv3_jax import loop
    from experiments.benchmarks import overlap

    monkeypatch.setattr(loop, 'Agent', loop.Agent)  # which is put back
    monkeypatch.setattr(overlap, 'UPDATES', (0.1,))
    monkeypatch.setattr(overlap, 'ENVIRONMENTS', 4)
    ((update, acting, environments, tick),) = overlap.run(ticks=30)
    assert update > 0.09 and environments > overlap.STEP and acting > 0
    assert tick > overlap.UPDATES[0] + acting / 2  # one after the other


def test_shares_of_overlap_by_hand():
    from experiments.benchmarks import overlap

    row = overlap.table([(0.02, 0.01, 0.005, 0.04)]).splitlines()[-1]
    assert row == '| 20.0 | 10.0 | 5.0 | 30.0 | 40.0 | 25.0% | 25.0% | 50.0% |'
