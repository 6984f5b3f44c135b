"""What the README and the pages in docs/ show really works."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import tiny_runs

import dreamerv3_jax
from dreamerv3_jax import cli, env_report, hosts, loop, presets, startup

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PROGRAM = 'dreamerv3-jax'


def blocks(language, page=README):
    return re.findall(rf'^```{language}\n(.*?)^```', page, re.DOTALL | re.MULTILINE)


def commands(page=README):
    """All command lines of the program, continued lines joined, without prompt and comment."""
    text = '\n'.join(block for name in ('bash', 'sh', 'console') for block in blocks(name, page))
    lines = text.replace('\\\n', ' ').splitlines()
    words = [shlex.split(line.removeprefix('$ '), comments=True) for line in lines]
    return [line[line.index(PROGRAM) + 1 :] for line in words if PROGRAM in line]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def planned(monkeypatch):
    """Replaces the planner; returns the list of its (settings, topology)."""
    calls = []
    module = types.ModuleType('dreamerv3_jax.plan')
    module.report = lambda config, devices, show: calls.append((config, str(devices)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dreamerv3_jax, 'plan', module, raising=False)
    monkeypatch.setattr(startup, 'prepare_plan', lambda kind, count: None)
    return calls


@pytest.fixture
def small_configs(monkeypatch, tmp_path_factory):
    """Makes presets load with tiny networks, and runs short."""
    original, train = presets.load_config, loop.train

    def load_small_config(spec):
        config, tiny = original(spec), tiny_runs.run_config()
        config.agent.update(tiny_runs.AGENT)
        config.replay.update(tiny.replay)
        config.env.num_envs = min(config.env.num_envs, tiny.env.num_envs)
        config.run.steps = min(config.run.steps, tiny.run.steps)
        return config

    def train_shortly(config, *arguments, **options):
        config.run.steps = min(config.run.steps, tiny_runs.run_config().run.steps)
        train(config, *arguments, **options)

    monkeypatch.setattr(presets, 'load_config', load_small_config)
    monkeypatch.setattr(loop, 'train', train_shortly)
    with tiny_runs.quick_compilation(tmp_path_factory.getbasetemp() / 'compiled'):
        yield


def run_blocks(name, page, found):
    """Runs blocks in order, as one session."""
    namespace = {'__name__': 'page'}
    for block in found:
        line = page[: page.index(block)].count('\n')
        source = '\n' * line + block  # so that errors name the line of the page
        exec(compile(source, ROOT / name, 'exec'), namespace)


@pytest.mark.medium
def test_python(monkeypatch, small_configs):
    monkeypatch.syspath_prepend(ROOT)
    assert blocks('python'), 'the README shows no Python'
    run_blocks('README.md', README, blocks('python'))


@pytest.mark.medium
def test_own_environment(folder, monkeypatch, small_configs, capsys):
    """The page from its first line to its last: the file is written, and the commands are run."""
    monkeypatch.setattr(sys, 'path', [*sys.path])  # the command line adds the current folder
    monkeypatch.setattr(env_report, 'MEASURED_SECONDS', 0.1)
    name = 'docs/environments.md'
    page = (ROOT / name).read_text()
    module, *session = blocks('python', page)
    file = re.match(r'# (\w+\.py)\n', module)[1]
    (folder / file).write_text(module)
    assert [line[0] for line in commands(page)] == ['envs', 'train', 'evaluate']
    for arguments in commands(page):
        assert cli.main(arguments) == 0, capsys.readouterr().err
    assert 'mean return' in capsys.readouterr().out
    assert session
    run_blocks(name, page, session)
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0


def test_commands(folder, monkeypatch, trained, planned, capsys):
    def evaluate(logdir, *, episodes, **options):
        return {'mean': 0.0, 'ci95': 0.0, 'returns': [0.0] * episodes, 'lengths': [1] * episodes}

    module = types.ModuleType('dreamerv3_jax.evaluation')
    module.evaluate = evaluate
    module.open_loop = lambda logdir, *, seed, video, env: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dreamerv3_jax, 'evaluation', module, raising=False)
    assert commands(), f'the README shows no {PROGRAM} command'
    for arguments in commands():
        if arguments[:1] == ['evaluate']:
            for argument in arguments[1:]:
                name = argument.removeprefix('--logdir=')
                if not name.startswith('-'):
                    (folder / name).mkdir(parents=True, exist_ok=True)
        shown = shlex.join([PROGRAM, *arguments])
        assert cli.main(arguments) == 0, f'{shown}: {capsys.readouterr().err}'


def test_table_of_suites(trained, capsys):
    """Every preset of a suite has a row, whose command is accepted."""
    rows = re.findall(r'`(--config=\S+.*?)` \|', (ROOT / 'docs/suites.md').read_text())
    for row in rows:
        assert cli.main(['train', *row.split()]) == 0, f'{row}: {capsys.readouterr().err}'
    assert {preset for _, _, preset in trained} == {*presets.names()} - {'quickstart'}


def test_commands_for_many_devices(trained, planned, monkeypatch, capsys):
    shown = commands((ROOT / 'docs/scaling.md').read_text())
    assert len(shown) >= 7
    for arguments in shown:
        assert cli.main(arguments) == 0, f'{arguments}: {capsys.readouterr().err}'
    many = [config for config, *_ in trained if config.logdir == '/shared/run']
    assert [config.hosts.count for config in many] == [0, 4]
    monkeypatch.setattr(hosts, 'count', lambda: 16)  # 2 nodes with 8 GPUs
    for config in many:
        assert hosts.share(config.env.num_envs, 'env.num_envs') > 0
        assert hosts.share(config.replay.batch_size, 'replay.batch_size') > 0
    assert [devices for _, devices in planned] == ['cpu:8', 'v5e:4x8']


def test_links():
    """Files that the pages point to exist."""
    for page in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')):
        for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
            if not re.match(r'\w+:', target):
                assert (page.parent / target).exists(), f'{page.name} links to {target}'


def test_reliability_names_its_tests():
    text = (ROOT / 'docs/reliability.md').read_text()
    named = re.findall(r'(test_\w+\.py)(?: -m slow)?(?: -k (?:"([^"]+)"|(\w+)))?', text)
    assert len(named) > 15
    for file, words, word in named:
        source = (ROOT / 'tests' / file).read_text()
        for part in (words or word).split(' or '):
            assert re.search(rf'^ *def test_\w*{part}', source, re.MULTILINE), (file, part)
