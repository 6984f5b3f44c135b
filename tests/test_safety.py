"""Data is only data: nothing that is loaded runs code, and nothing is written outside of a run."""

import ast
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from dreamerv3_jax import loop
from dreamerv3_jax.checkpoint import _ArrayArgs, _ArrayFiles
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.evaluation import evaluate
from dreamerv3_jax.loop import Trainer

ROOT = Path(__file__).parent.parent
COUNTER = 'toy_envs:Counter'

# What may run code that is found in data. The one exception is what it is for: a configuration that
# the user names is a Python file.
LOADERS = {'eval', 'exec', 'compile', '__import__'}
PACKAGES = {'pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve', 'yaml', 'runpy', 'code'}
ALLOWED = {('presets.py', 'exec'), ('presets.py', 'compile')}
SERVERS = {'socketserver', 'http', 'xmlrpc', 'aiohttp', 'flask', 'grpc', 'asyncio', 'socket'}


pytestmark = pytest.mark.usefixtures('quick_compilation', 'shared_agents')


def sources():
    for folder in ('dreamerv3_jax', 'configs', 'experiments'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            yield path, list(ast.walk(ast.parse(path.read_text())))


def modules(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_source_loads_code_from_data():
    found = set()
    for path, nodes in sources():
        found |= {(path.name, name) for name in modules(nodes) if name.split('.')[0] in PACKAGES}
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found |= {(path.name, node.func.id)} & {(path.name, name) for name in LOADERS}
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ('np.load', '.loadtxt')
            ):
                options = {option.arg: option.value for option in node.keywords}
                assert options['allow_pickle'].value is False, f'{path.name}, line {node.lineno}'
            if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
                assert node.value.value is False, path.name
    assert found == ALLOWED


def test_nothing_serves():
    """Processes of environments talk through pipes of their own, which no one else can open. Hosts
    that train together are another matter, see `test_hosts.py`."""
    for path, nodes in sources():
        found = {name for name in modules(nodes) if name.split('.')[0] in SERVERS}
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        found |= {x for x in calls if x.endswith(('distributed.initialize', 'start_server'))}
        assert found <= ({'jax.distributed.initialize'} if path.name == 'hosts.py' else set()), path


@pytest.fixture(scope='module')
def stopped(tmp_path_factory, quick_compilation):
    folder = tmp_path_factory.mktemp('stopped') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.share_agents(patch)
        with tiny_runs.ticked(tiny_runs.run_config(COUNTER), folder, 20) as trainer:
            trainer.save()
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """The folder of a run with a replay, stopped after some updates."""
    return shutil.copytree(stopped, tmp_path / 'run')


def test_runs_are_loaded_without_pickle(run, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError('unpickled')

    for name in ('load', 'loads', 'Unpickler'):
        monkeypatch.setattr(pickle, name, refuse)
    assert len(evaluate(run, episodes=2)['returns']) == 2
    with Trainer(tiny_runs.run_config(COUNTER), run, 'tiny') as trainer:
        assert trainer.counters['ticks'] == 20 and len(trainer._replay) == 40
        trainer.tick()


class Bomb:
    def __reduce__(self):
        return exec, ('raise AssertionError("it went off")',)


def test_an_array_of_objects_is_refused(run):
    (path,) = run.glob('checkpoints/20/replay/data%2Freward.npy')
    np.save(path, np.array([Bomb(), Bomb()], object), allow_pickle=True)
    (run / 'checkpoints/20/checksums.json').unlink()  # who crafts a file would mend them
    with pytest.raises(UserError, match='holds no checkpoint that can be read .*Python objects'):
        Trainer(tiny_runs.run_config(COUNTER), run, 'tiny')


def test_names_in_a_checkpoint_lead_nowhere(tmp_path):
    """Neither those of its files, read, nor those of arrays, written."""
    folder = tmp_path / 'outer' / 'run'
    folder.mkdir(parents=True)
    before = set(tmp_path.rglob('*'))
    names = ['../../evil', str(tmp_path / 'evil'), '..', 'data/observation/../../evil']
    _ArrayFiles().save(folder, _ArrayArgs({name: np.ones(3) for name in names}))
    assert len(list(folder.iterdir())) == len(names)
    assert sorted(_ArrayFiles().restore(folder)) == sorted(names)
    assert set(tmp_path.rglob('*')) == before | set(folder.iterdir())


@pytest.mark.parametrize(
    'place',
    ['lock', 'metrics.jsonl', 'config.json.draft', 'replay', 'checkpoints/30', 'other/deep'],
)
def test_links_in_a_run_are_refused(place, run, tmp_path):
    """They would lead what a run writes to any file of the user's."""
    target = tmp_path / 'precious'
    target.write_text('do not touch')
    link = run / place
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    words = 'Cannot write to' if place == 'lock' else f'{link} is a link, but a run writes in its'
    with pytest.raises(UserError, match=words):
        loop.train(tiny_runs.run_config(COUNTER), run, 'tiny')
    assert target.read_text() == 'do not touch'
