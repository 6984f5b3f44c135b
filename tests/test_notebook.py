"""The notebook for Colab, executed as there: installed from a clone, by a kernel of its own."""

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tiny_runs

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / 'experiments' / 'colab.ipynb'
# From pip-freeze.txt, pip-freeze.gpu.txt and pip-freeze.tpu.txt in the repository
# googlecolab/backend-info, which Colab's maintainers generate from its images (June 2026).
COLAB_PACKAGES = {'IPython', 'jax', 'matplotlib', 'numpy'}
SMALL = {
    'SIZE': 'nano', 'FIRST_STEPS': 1024, 'ALL_STEPS': 1056, 'EPISODES': 2, 'SEQUENCES': 2,
    'PREDICTED_STEPS': 8,
}  # fmt: skip
EXECUTE = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=nbformat.NO_CONVERT)
nbformat.validate(notebook)
try:
    nbclient.NotebookClient(notebook, timeout=900, kernel_name='python3').execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""


def cells(kind, notebook=None):
    """Sources by id."""
    notebook = notebook or json.loads(NOTEBOOK.read_text())
    return {
        cell['id']: ''.join(cell['source'])
        for cell in notebook['cells']
        if cell['cell_type'] == kind
    }


def python(source):
    """A cell without magic commands."""
    return ast.parse(re.sub(r'^%', '# ', source, flags=re.MULTILINE))


def small_notebook(folder):
    """A copy whose form has small values, as somebody would fill them in."""
    notebook = json.loads(NOTEBOOK.read_text())
    (form,) = [cell for cell in notebook['cells'] if cell['id'] == 'settings']
    text = ''.join(form['source'])
    for name, value in SMALL.items():
        text, count = re.subn(
            rf'^{name} = .*?(  #@param)', rf'{name} = {value!r}\1', text, flags=re.M
        )
        assert count == 1, name
    form['source'] = text
    path = folder / 'small.ipynb'
    path.write_text(json.dumps(notebook))
    return path


def bare_environment(folder):
    """An environment with the packages of this one, but not this package; returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / 'bin' / 'python'
    command = [python, '-c', 'import site; print(site.getsitepackages()[0])']
    packages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    # Lines of such a file are searched, but not for others of its kind, which may name this clone.
    Path(packages, 'shared.pth').write_text('\n'.join(site.getsitepackages()))
    return python


@pytest.mark.medium
def test_notebook(tmp_path):
    pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    clone = tmp_path / 'clone'
    for name in ('configs', 'dreamerv3_jax', 'pyproject.toml', 'README.md', 'LICENSE'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        clone.mkdir(exist_ok=True)
        copy(ROOT / name, clone / name)
    (clone / 'experiments').mkdir()
    small, done = small_notebook(clone / 'experiments'), tmp_path / 'done.ipynb'
    python = bare_environment(tmp_path / 'venv')
    variables = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    variables |= tiny_runs.quick_variables(tmp_path / 'compiled')
    variables |= {'JAX_NUM_CPU_DEVICES': '1', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    variables['MPLBACKEND'] = 'agg'  # as some packages set it
    result = subprocess.run(
        [python, '-c', EXECUTE, small, done],
        cwd=clone / 'experiments',
        env=variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    outputs = {
        cell['id']: cell['outputs']
        for cell in json.loads(done.read_text())['cells']
        if cell['cell_type'] == 'code'
    }

    def text(name):
        parts = [x['text'] for x in outputs[name] if x['output_type'] == 'stream']
        return ''.join(''.join(part) for part in parts)

    def shown(name, kind):
        return [''.join(x['data'][kind]) for x in outputs[name] if kind in x.get('data', {})]

    assert 'cpu' in text('tools')
    # The second run goes on where the first one ended, and both draw their curve.
    assert 'Going on' not in text('train')
    assert 'Done.' in text('train') and 'Done.' in text('resume')
    frames, updates = re.search(
        r'Going on at ([\d,]+) frames and (\d+) up', text('resume')
    ).groups()
    assert SMALL['FIRST_STEPS'] <= int(frames.replace(',', '')) < SMALL['ALL_STEPS']
    assert int(updates) > 0
    last = tiny_runs.read_metrics(clone / 'experiments/runs/colab')[-1]
    assert last['step'] >= SMALL['ALL_STEPS'] and last['count/updates'] > int(updates)
    # A TPU would ask for others of a pod, which it may only before the devices are shown.
    settings = json.loads((clone / 'experiments/runs/colab/config.json').read_text())
    assert settings['hosts']['count'] == 1
    for name in ('train', 'resume'):
        assert len(shown(name, 'image/png')) == 1
    assert len(shown('open-loop', 'text/html')) == 1 and len(shown('policy', 'text/html')) == 2
    for html in shown('open-loop', 'text/html') + shown('policy', 'text/html'):
        assert html.startswith('<img src="data:image/gif;base64,R0lGOD') and len(html) > 2000
    assert re.search(r'mean return \d+', text('policy'))
    # It was the clone that was installed, and nothing here was changed.
    command = [python, '-c', 'import dreamerv3_jax; print(dreamerv3_jax.__file__)']
    where = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert Path(where.strip()).is_relative_to(tmp_path / 'venv')


def test_cells_need_nothing_that_colab_lacks():
    """Before the package is installed only Python's own modules; later also what Colab has."""
    found = {}
    for name, source in cells('code').items():
        found[name] = set()
        for node in ast.walk(python(source)):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name.partition('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found[name].add(node.module.partition('.')[0])
        found[name] -= sys.stdlib_module_names
    assert next(iter(found)) == 'install' and not found['install']
    assert set().union(*found.values()) <= COLAB_PACKAGES | {'dreamerv3_jax'}
    assert 'dreamerv3_jax' in found['tools']
    magics = re.findall(r'^[%!].*', '\n'.join(cells('code').values()), re.MULTILINE)
    assert [magic.split()[0] for magic in magics] == ['%pip', '%matplotlib']


@pytest.mark.parametrize('source', ['', 'folder', 'up.zip', 'git'])
def test_where_the_package_comes_from(source, tmp_path, monkeypatch):
    """The cell, without the installation itself, where a copy has each of the forms it may have."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / 'folder' / 'name-main'
    (copy / 'configs').mkdir(parents=True)
    (copy / 'configs' / 'quickstart.py').write_text('')
    expected = copy
    if source == 'up.zip':
        shutil.make_archive('up', 'zip', 'folder')
        expected = tmp_path / 'dreamerv3_jax' / 'name-main'
    if source == 'git':
        git = ['git', '-C', copy, '-c', 'user.name=a', '-c', 'user.email=a']
        for command in (['init'], ['add', '.'], ['commit', '-m', 'first']):
            subprocess.run([*git, *command], check=True, capture_output=True)
        source, expected = copy.as_uri(), tmp_path / 'dreamerv3_jax'
    code = cells('code')['install'].replace("SOURCE = ''", f'SOURCE = {source!r}')
    found = {}
    if not source:
        with pytest.raises(RuntimeError, match='no copy of the repository'):
            exec(compile(python(code), 'install', 'exec'), found)
        return
    exec(compile(python(code), 'install', 'exec'), found)
    assert found['clones'] == [expected.resolve()]
    assert found['JAX'].startswith('jax')


def test_committed_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
    for cell in notebook['cells']:
        assert not cell.get('outputs') and cell.get('execution_count') is None, cell['id']
