"""Strict settings for all tests; they have to be made before jax starts its devices."""

from dreamerv3_jax import startup

startup.tune_cpu()

import contextlib  # noqa: E402
import importlib.metadata  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import types  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import tiny_runs  # noqa: E402

import dreamerv3_jax  # noqa: E402
from dreamerv3_jax.envs import mujoco  # noqa: E402

# Programs that are compiled in half the time, and run slower. Other releases may not know the flag.
if importlib.metadata.version('jaxlib') == '0.10.2':
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_use_fusion_emitters=false'

# Files in which many a test takes long, the longest first: begun last, they would leave one process
# to work alone at the end.
LONG = [
    *('test_hosts', 'test_loop', 'test_contract', 'test_envs', 'test_notebook', 'test_suites_gym'),
    *('test_damage', 'test_memory', 'test_resume', 'test_kill', 'test_sharding', 'test_cli'),
    *('test_agent', 'test_update', 'test_suites_envpool', 'test_suites_dm_env', 'test_interrupts'),
    *('test_corridor', 'test_benchmarks'),
]

# Where the tests run in the background it is ignored, also by the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)  # for the tests of sharding; others use the first
jax.config.update('jax_numpy_rank_promotion', 'raise')

# The same examples in every run, and no deadline, because a first call may compile.
hypothesis.settings.register_profile(
    'tests', max_examples=25, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile('tests')


def pytest_collection_modifyitems(items):
    """Begins with files that take minutes."""
    items.sort(key=lambda item: (*LONG, item.path.stem).index(item.path.stem))


@pytest.fixture(scope='session', autouse=True)
def cache_folder(tmp_path_factory):
    """Keeps compiled programs of commands out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        patch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
        yield


@pytest.fixture(scope='module')
def quick_compilation(tmp_path_factory):
    """Compiles with less optimisation, and every program only once; returns the folder of them."""
    folder = tmp_path_factory.getbasetemp() / 'compiled'
    with tiny_runs.quick_compilation(folder):
        yield folder


@pytest.fixture
def shared_agents(monkeypatch):
    """Runs of the same kind take the same agent."""
    tiny_runs.share_agents(monkeypatch)


class SmallDisk:
    """A file system of 3 MB that can be filled, to the last byte or with some pages left."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self, pages_left=0):
        with (self.folder / 'big').open('wb', 0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(file.tell() - 4096 * pages_left)

    def empty(self):
        (self.folder / 'big').unlink()


@pytest.fixture
def small_disk(tmp_path):
    """A real one; mounting needs root."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('cannot mount a file system')
    yield SmallDisk(folder)
    subprocess.run(['umount', '--lazy', str(folder)], check=True)


@pytest.fixture
def picture():
    """Skips where MuJoCo cannot draw."""
    mujoco.choose_renderer()
    if os.environ.get('MUJOCO_GL') in mujoco.NO_RENDERER:
        pytest.skip('no OpenGL library')


@pytest.fixture
def qt():
    """Skips where ProcGen's games find no Qt 5 libraries."""
    envpool = pytest.importorskip('envpool')
    try:
        envpool.make_spec('CoinrunHard-v0')
    except ImportError as error:
        pytest.skip(f'no Qt: {error}')


@pytest.fixture
def trained(monkeypatch):
    """Replaces the training loop; returns the list of its (config, logdir, preset)."""
    calls = []
    loop = types.ModuleType('dreamerv3_jax.loop')
    loop.train = lambda config, logdir, preset: calls.append((config, logdir, preset))
    monkeypatch.setitem(sys.modules, loop.__name__, loop)
    monkeypatch.setattr(dreamerv3_jax, 'loop', loop, raising=False)
    return calls
