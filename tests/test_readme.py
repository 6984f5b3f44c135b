"""What the README shows really works: its Python runs, and its commands are accepted."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import tiny_runs

import dreamerv3_jax
from dreamerv3_jax import cli, presets

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PROGRAM = 'dreamerv3-jax'


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', README, re.DOTALL | re.MULTILINE)


def commands():
    """All command lines of the program, continued lines joined, without prompt and comment."""
    text = '\n'.join(block for name in ('bash', 'sh', 'console') for block in blocks(name))
    lines = text.replace('\\\n', ' ').splitlines()
    words = [shlex.split(line.removeprefix('$ '), comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == PROGRAM]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.medium
def test_python(monkeypatch, tmp_path_factory):
    """All blocks in order, as one session, with tiny networks and short runs."""
    original = presets.load_config

    def load_small_config(spec):
        config, tiny = original(spec), tiny_runs.run_config()
        config.agent.update(tiny_runs.AGENT)
        config.replay.update(tiny.replay)
        config.env.num_envs = min(config.env.num_envs, tiny.env.num_envs)
        config.run.steps = min(config.run.steps, tiny.run.steps)
        return config

    monkeypatch.setattr(presets, 'load_config', load_small_config)
    monkeypatch.syspath_prepend(ROOT)
    assert blocks('python'), 'the README shows no Python'
    namespace = {'__name__': 'readme'}
    with tiny_runs.quick_compilation(tmp_path_factory.getbasetemp() / 'compiled'):
        for block in blocks('python'):
            line = README[: README.index(block)].count('\n')
            source = '\n' * line + block  # so that errors name the README's line
            exec(compile(source, ROOT / 'README.md', 'exec'), namespace)


def test_commands(folder, monkeypatch, trained, capsys):
    def evaluate(logdir, *, episodes, **options):
        return {'mean': 0.0, 'ci95': 0.0, 'returns': [0.0] * episodes, 'lengths': [1] * episodes}

    module = types.ModuleType('dreamerv3_jax.evaluation')
    module.evaluate = evaluate
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


def test_links():
    """Files that the README points to exist."""
    for target in re.findall(r'\]\(([^)#]+)', README):
        if not re.match(r'\w+:', target):
            assert (ROOT / target).exists(), f'the README links to {target}, which is missing'


def test_reliability_names_its_tests():
    text = (ROOT / 'docs/reliability.md').read_text()
    named = re.findall(r'(test_\w+\.py)(?: -k (?:"([^"]+)"|(\w+)))?', text)
    assert len(named) > 15
    for file, words, word in named:
        source = (ROOT / 'tests' / file).read_text()
        for part in (words or word).split(' or '):
            assert re.search(rf'^ *def test_\w*{part}', source, re.MULTILINE), (file, part)
