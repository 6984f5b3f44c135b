"""What happens before jax is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreamerv3_jax import startup
from dreamerv3_jax.errors import UserError


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')  # so that it is restored in any case
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return monkeypatch


def kept_in():
    startup.keep_compiled_programs()
    return os.environ.get('JAX_COMPILATION_CACHE_DIR')


def test_programs_are_kept_by_instruction_set(environment, tmp_path):
    folder = Path(kept_in())
    assert folder.parent == tmp_path / 'dreamerv3_jax' and folder.is_dir()
    environment.delenv('JAX_COMPILATION_CACHE_DIR')
    environment.setattr(startup, 'instruction_set', lambda: 'another machine')
    assert Path(kept_in()) != folder


def test_the_environment_decides(environment):
    environment.setenv('JAX_COMPILATION_CACHE_DIR', '/elsewhere')
    assert kept_in() == '/elsewhere'


def test_without_a_place_nothing_is_kept(environment, tmp_path):
    (tmp_path / 'file').touch()
    environment.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert kept_in() is None


@pytest.mark.medium
def test_jax_keeps_and_finds_its_programs(environment, tmp_path):
    code = (
        'from dreamerv3_jax import startup\n'
        'startup.prepare()\n'
        'import jax, jax.numpy as jnp\n'
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        'events = []\n'
        'jax.monitoring.register_event_listener(lambda name, **_: events.append(name))\n'
        'assert jax.jit(lambda x: jnp.sin(x) + 1)(0.0) == 1\n'
        "print(events.count('/jax/compilation_cache/cache_hits'))\n"
    )
    for found in (False, True):
        result = subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=True
        )
        assert (int(result.stdout) > 0) == found, result.stderr
    assert [*tmp_path.rglob('*-cache')]


def test_a_relative_cache_folder_does_not_count(environment, tmp_path):
    environment.setenv('XDG_CACHE_HOME', 'cache')
    environment.setenv('HOME', str(tmp_path))
    assert Path(kept_in()).is_relative_to(tmp_path / '.cache')


def test_every_core_is_a_device(environment):
    environment.setenv('JAX_NUM_CPU_DEVICES', '')  # so that it is restored in any case
    for cores, devices in ((1, '1'), (3, '3'), (64, '4')):
        environment.delenv('JAX_NUM_CPU_DEVICES')
        environment.setattr(startup, '_cores', lambda cores=cores: cores)
        startup.tune_cpu()
        assert os.environ['JAX_NUM_CPU_DEVICES'] == devices
    environment.setenv('JAX_NUM_CPU_DEVICES', '7')
    startup.tune_cpu()  # what is set already is left alone
    assert os.environ['JAX_NUM_CPU_DEVICES'] == '7'
    environment.delenv('JAX_NUM_CPU_DEVICES')
    environment.setenv('JAX_PLATFORMS', 'cuda')
    startup.tune_cpu()
    assert 'JAX_NUM_CPU_DEVICES' not in os.environ


def test_cores_are_those_that_the_process_may_use():
    code = (
        'import os; from dreamerv3_jax import startup\n'
        'os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(startup._cores())'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout == '1\n', result.stderr


def tuned(code):
    """What a process prints that has tuned its memory."""
    start = (
        'import ctypes, os\n'
        'from dreamerv3_jax import startup\n'
        "os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        'startup.tune_cpu()\n'
    )
    result = subprocess.run([sys.executable, '-c', start + code], capture_output=True, text=True)
    assert not result.stderr, result.stderr
    return result.stdout


def test_freed_memory_is_returned():
    code = (
        'def resident():\n'
        "    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE')\n"
        'x = bytearray(b"1" * 300_000_000)\n'
        'del x\n'
        'kept = resident()\n'
        'startup.return_memory()\n'
        'print(kept - resident() > 250_000_000)\n'
    )
    assert tuned(code) == 'True\n'


@pytest.mark.parametrize(('size', 'least'), [(40_000, 100), (2_000, 100), (200, 90)])
def test_pieces_of_the_heap_are_taken(size, least):
    """What `malloc` returns afterwards lies behind all that was freed before."""
    code = (
        "library = ctypes.CDLL('libc.so.6')\n"
        'library.malloc.restype = ctypes.c_void_p\n'
        'library.free.argtypes = [ctypes.c_void_p]\n'
        f'size = {size}\n'
        'pieces = [library.malloc(size) for _ in range(2000)]\n'
        'for piece in pieces[::2]:\n'
        '    library.free(piece)\n'
        'def behind():\n'
        '    return sum(library.malloc(size * 3 // 4) > max(pieces) for _ in range(100))\n'
        'before = behind()\n'
        'startup.return_memory()\n'
        f'print(before < 50, behind() >= {least})\n'  # Python itself frees small ones on the way
    )
    assert tuned(code) == 'True True\n'


def test_small_buffers_stay_out_of_the_holes_of_large_ones():
    code = (
        "library = ctypes.CDLL('libc.so.6')\n"
        'library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n'
        'library.free.argtypes = [ctypes.c_void_p]\n'
        'startup.return_memory([10**9])\n'
        'large = library.malloc(10**9)\n'
        'stays = library.malloc(300_000_000)\n'
        'library.free(large)\n'
        'again = library.malloc(10**9)\n'
        'print(again == large, stays < large)\n'
        'library.free(again)\n'
        'large = library.malloc(2**31)\n'
        'library.free(large)\n'
        'print(library.malloc(30_000_000) < large)\n'
    )
    assert tuned(code) == 'True True\nTrue\n'


def test_large_buffers_find_their_places_again():
    """Also where they are not much larger than what is put between them."""
    code = (
        "library = ctypes.CDLL('libc.so.6')\n"
        'library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n'
        'library.free.argtypes = [ctypes.c_void_p]\n'
        'startup.return_memory([10**8] * 2)\n'
        'def update():\n'
        '    large = [library.malloc(10**8) for _ in range(2)]\n'
        '    stay.append(library.malloc(10**7))\n'
        '    for buffer in large:\n'
        '        library.free(buffer)\n'
        '    return large\n'
        'stay = []\n'
        'first = update()\n'
        'same = all(set(update()) == set(first) for _ in range(10))\n'
        'print(same, abs(first[0] - first[1]) > 15 * 10**7)\n'
    )
    assert tuned(code) == 'True True\n'


HUGE = Path('/sys/kernel/mm/transparent_hugepage/enabled')


@pytest.mark.skipif(
    not HUGE.exists() or '[never]' in HUGE.read_text(), reason='the system has no huge pages'
)
def test_buffers_lie_in_huge_pages():
    code = (
        'startup.return_memory()\n'
        'x = bytearray(64_000_000)\n'
        "for line in open('/proc/self/smaps_rollup'):\n"
        "    if line.startswith('AnonHugePages:'):\n"
        '        print(int(line.split()[1]) > 50_000)\n'
    )
    assert tuned(code) == 'True\n'


LATE = """
from dreamerv3_jax import startup
startup.tune_cpu()
import time, jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P

def late(x):
    if x.item() == 0:
        time.sleep(65)
    return x

def total(x):
    return jax.lax.psum(jax.pure_callback(late, jax.ShapeDtypeStruct((1,), np.float32), x), 'data')

mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
total = jax.shard_map(total, mesh=mesh, in_specs=P('data'), out_specs=P(), check_vma=False)
print(jax.jit(total)(np.arange(2, dtype=np.float32)))
"""


@pytest.mark.slow
def test_cores_wait_for_each_other_as_long_as_it_takes():
    """As one has to where the process was suspended; XLA would end it after a minute."""
    variables = {'JAX_NUM_CPU_DEVICES': '2', 'JAX_PLATFORMS': 'cpu'}
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    run = subprocess.run(
        [sys.executable, '-c', LATE],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, '[1.]\n', '')


@pytest.mark.parametrize('count', ['', '0', '-2', 'four', '1.5'])
def test_numbers_of_devices_that_there_cannot_be(count, monkeypatch):
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', count)
    with pytest.raises(UserError, match=f'JAX_NUM_CPU_DEVICES is {count!r}; set it to 1 or more'):
        startup.prepare()
