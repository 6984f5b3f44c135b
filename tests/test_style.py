"""Lint, types, and the shape of the package: who may import whom."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from dreamerv3_jax.envs.registry import SUITES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'dreamerv3_jax'

# From the lowest layer up. A file imports from layers below its own only; files of one folder may
# import each other, and so may the files of the first two layers.
LAYERS = (
    'errors startup config configs presets settings arguments topology program flops '
    'types reductions transforms distributions returns normalization',
    'durable images spaces metrics progress interrupts free_space replay train_ratio '
    'envs video_file env_report',
    'losses nets',
    'networks optimizer actions hosts',
    'rssm',
    'world_model actor_critic policy prediction',
    'train_state',
    'update',
    'sharding checkpoint run_folder',
    'agent',
    'steps',
    'feed summary agreement',
    'learner',
    'loop evaluation plan',
    'cli',
    '__main__',
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
HOST = LAYERS[1].split()
WITHOUT_JAX = [*HOST, 'topology', 'program', 'cli']
WITHOUT_JAX += 'errors config configs presets settings arguments startup'.split()
JAX_PACKAGES = {'jax', 'jaxlib', 'flax', 'optax', 'chex', 'orbax'}


def source_files():
    """Yields the path of each file and its name in the package, such as 'nets.layers'."""
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE).with_suffix('').parts
        name = '.'.join(part for part in parts if part != '__init__')
        if name:
            yield path, name
    for path in sorted((ROOT / 'configs').glob('*.py')):
        yield path, f'configs.{path.stem}'


def imported(path):
    """Returns the full names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path.name} has a relative import; write it out'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def imported_here(path):
    """Returns the names in the package that a file imports, such as 'nets.layers'."""
    known = {name for _, name in source_files()} | {'nets', 'envs', 'configs'}
    found = set()
    for name in imported(path):
        package, _, rest = name.partition('.')
        if package == 'dreamerv3_jax' and rest:
            parent = rest.rpartition('.')[0]
            found.add(rest if rest in known else parent)
    return found - {''}


def run(*command):
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_known_mistakes_can_be_put_in(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from experiments.mistakes import MISTAKES

    for mistake in MISTAKES:
        assert (PACKAGE / mistake.file).read_text().count(mistake.right) == 1, mistake.name


def test_lint():
    run('-m', 'ruff', 'check', '--no-cache', '.')


def test_format():
    run('-m', 'ruff', 'format', '--check', '--no-cache', '.')


@pytest.mark.medium
def test_types():
    run('-m', 'mypy')


def test_every_file_has_a_layer():
    top = {name.partition('.')[0] for _, name in source_files()}
    assert top <= set(LEVELS), f'place {sorted(top - set(LEVELS))} in LAYERS'


def test_imports_point_downwards():
    wrong = []
    for path, name in source_files():
        own = name.partition('.')[0]
        for other in imported_here(path):
            top = other.partition('.')[0]
            same_level = LEVELS[top] == LEVELS[own] and (own == top or LEVELS[own] < 2)
            if LEVELS[top] >= LEVELS[own] and not same_level:
                wrong.append(f'{name} imports {other}')
    assert not wrong


def test_no_import_cycles():
    graph = {name: imported_here(path) - {name} for path, name in source_files()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_host_side_does_not_import_jax():
    wrong = []
    for path, name in source_files():
        # The worlds of Craftax are JAX programs; no worker process loads them.
        if name.partition('.')[0] in WITHOUT_JAX and name != 'envs.craftax':
            found = {package.partition('.')[0] for package in imported(path)} & JAX_PACKAGES
            wrong += [f'{name} imports {package}' for package in found]
    assert not wrong


def test_host_side_does_not_load_jax():
    names = [name for _, name in source_files() if name.partition('.')[0] in WITHOUT_JAX]
    suites = {f'envs.{suite.module}' for suite in SUITES.values()}  # need their extras
    modules = [f'dreamerv3_jax.{name}' for name in names if name not in suites]
    code = (
        f'import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n'
        f'assert not {JAX_PACKAGES!r} & set(sys.modules), "jax was loaded"'
    )
    run('-c', code)


def test_only_sharding_knows_meshes():
    for path, name in source_files():
        if name == 'sharding':
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {node.name for node in nodes if isinstance(node, ast.alias)}
        assert not used & {'Mesh', 'NamedSharding'}, f'{name} belongs in sharding'


def test_files_and_functions_are_short():
    long = []
    for path, name in source_files():
        if name == 'configs.base':  # a list of values, not a function to follow
            continue
        text = path.read_text()
        if len(text.splitlines()) > 400:
            long.append(f'{name} has {len(text.splitlines())} lines')
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                long.append(f'{name}.{node.name} has {node.end_lineno - node.lineno + 1} lines')
    assert not long
