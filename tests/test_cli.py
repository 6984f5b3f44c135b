"""The command line: what it accepts, and one helpful sentence for what it does not."""

import functools
import glob
import importlib.util
import io
import os
import shlex
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import gymnasium
import hypothesis
import hypothesis.strategies as st
import jax
import ml_collections
import numpy as np
import pytest
import tiny_runs
import toy_envs

import dreamerv3_jax
from dreamerv3_jax import checkpoint, cli, env_report, presets, settings
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.envs import registry
from dreamerv3_jax.envs.registry import Suite
from dreamerv3_jax.errors import Failure, UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs every test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def evaluated(monkeypatch):
    """Replaces the evaluation; returns the list of (folder, options) that it was called with."""
    calls = []

    def evaluate(logdir, **options):
        calls.append((logdir, options))
        shown = {'returns': np.array([2.0, 4.0]), 'lengths': [10, 20], 'filmed': 2}
        return {'mean': 3.0, 'ci95': 0.5, **shown}

    module = types.ModuleType('dreamerv3_jax.evaluation')
    module.evaluate = evaluate
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dreamerv3_jax, 'evaluation', module, raising=False)
    return calls


def write(name, text):
    Path(name).write_text(textwrap.dedent(text))


def configured(trained, *arguments):
    """Returns the settings that `train` starts with."""
    assert cli.main(['train', '--config=quickstart', *arguments]) == 0
    config, _, _ = trained.pop()
    return config


def mistake(capsys, *arguments):
    """Returns the one sentence that the command line answers with."""
    before = sorted(Path.cwd().rglob('*'))
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.startswith('dreamerv3-jax: ') and captured.err.count('\n') == 1
    assert captured.err.rstrip()[-1] in '.?' and 'Traceback' not in captured.err
    assert sorted(Path.cwd().rglob('*')) == before
    return captured.err.removeprefix('dreamerv3-jax: ').rstrip()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        # Commands.
        ('', 'Give a command: train, evaluate, plan, presets, envs.'),
        ('--config=quickstart', 'Give a command, before --config=quickstart'),
        ('trian --config=quickstart', "no command 'trian'; did you mean 'train'?"),
        ('xyz', 'choose one of train, evaluate, plan, presets, envs.'),
        # Options.
        ('train', 'Choose a preset, as in --config=quickstart'),
        ('train --config', '--config expected one argument.'),
        ('train --confg=quickstart', "no option --confg; did you mean '--config'?"),
        ('train --config=quickstart --seed=3', 'no option --seed; did you mean --config.seed?'),
        ('train --config=quickstart --steps=9', 'did you mean --config.run.steps?'),
        ('train --config=quickstart --env.id=X', 'did you mean --config.env.id?'),
        ('train --config=quickstart -config.seed=3', 'did you mean --config.seed?'),
        ('train quickstart', "'quickstart' is one argument too many"),
        ('presets all', "'all' is one argument too many"),
        # Presets, files, sizes.
        ('train --config=quickstrat', "no preset 'quickstrat'; did you mean 'quickstart'?"),
        ('train --config=base', "There is no preset 'base'"),
        ('train --config=quickstart:size12', "no size 'size12'; did you mean 'size12m'?"),
        ('train --config=quickstart: --config.size=nanoo', "did you mean 'nano'?"),
        ('train --config=quickstart:', "'quickstart:' lacks a size; choose one of nano,"),
        ('train --config=quickstart --config.size', '--config.size needs a value, as in'),
        ('train --config=quickstart --config.size=', '--config.size needs a value, as in'),
        ('train --config=mine.py', 'There is no file mine.py'),
        # Keys.
        ('train --config=quickstart --config.sed=1', 'did you mean config.seed?'),
        ('train --config=quickstart --config.batch_size=1', 'config.replay.batch_size?'),
        ('train --config=quickstart --config.replay.batchsize=1', 'config.replay.batch_size?'),
        ('train --config=quickstart --config.agnt.deter=1', 'config.agent.deter?'),
        ('train --config=quickstart --config.qqqqqqqq=1', 'configs/base.py lists them all.'),
        ('train --config=quickstart --config.replay=1', 'config.replay is a group of settings'),
        ('train --config=quickstart --config.env.kwargs=1', '--config.env.kwargs.NAME='),
        ('train --config=quickstart --config.env.kwargs.a-b=1', 'does not name an argument'),
        ('train --config=quickstart --config.env.kwargs.a={"b.c":1}', 'cannot be set to'),
        # Types and values.
        ('train --config=quickstart --config.seed=one', "takes a whole number, not 'one'."),
        ('train --config=quickstart --config.seed=1.5', "takes a whole number, not '1.5'."),
        ('train --config=quickstart --config.seed=1.5e0', "takes a whole number, not '1.5e0'."),
        ('train --config=quickstart --config.seed=1e999', "takes a whole number, not '1e999'."),
        ('train --config=quickstart --config.seed', '--config.seed needs a value'),
        ('train --config=quickstart --config.env.kwargs.a', 'needs a value'),
        ('train --config=quickstart --config.env.kwargs.a={"b":[{2:1}]}', "make it '2'"),
        ('train --config=quickstart --config.replay.online=maybe', 'takes true or false'),
        ('train --config=quickstart --config.replay.train_ratio=x', "takes a number, not 'x'."),
        ('train --config=quickstart --config.run.steps=-1', 'must be at least 1, not -1.'),
        ('train --config=quickstart --config.run.steps -1', 'must be at least 1, not -1.'),
        ('train --config=quickstart --config.env.vectorization=asink', "mean 'async'?"),
        ('train --config=quickstart --config.agent.deter=100', 'multiples of agent.blocks'),
        ('train --config=quickstart --config.agent.actor_layers=0', 'must be at least 1, not 0.'),
        ('train --config=quickstart --config.agent.actor_layers=1e3', 'must be at most 100, not'),
        ('train --config=quickstart --config.agent.units=1e22', 'must be at most 100000, not 1'),
        ('train --config=quickstart --config.agent.warmup_updates=1e10', 'at most 2147483647, not'),
        (
            'train --config=quickstart --config.env.num_envs=1e6',
            'must be at most 65536, not 1000000.',
        ),
        ('train --config=quickstart --config.agent.classes=257', 'at most 256, not 257.'),
        ('train --config=quickstart --config.agent.discount_horizon=1', 'above 1, not 1.0.'),
        ('train --config=quickstart --config.agent.momentum=1', 'from 0 to below 1, not 1.0.'),
        ('train --config=quickstart --config.agent.return_low_percentile=99', 'must be below'),
        ('train --config=quickstart --config.agent.return_high_percentile=950', 'in 0 to 100.'),
        ('train --config=quickstart --config.seed=4294967296', 'at most 4294967295'),
        ('train --config=quickstart --config.agent.remat=2', 'takes true or false'),
        ('train --config=quickstart --config.hosts.count=2', 'go together, as in --config.hosts'),
        ('train --config=quickstart --config.hosts.coordinator=a:1', "are 'a:1' and 0."),
        (
            'train --config=quickstart --config.hosts.coordinator=a --config.hosts.count=2',
            'address:port',
        ),
        ('train --config=quickstart --config.hosts.coordinator=10.0.0.1', "are '10.0.0.1' and 0."),
        (
            'train --config=quickstart --config.hosts.coordinator=a:65536 --config.hosts.count=2',
            "are 'a:65536' and 2.",
        ),
        ('train --config=quickstart --config.hosts.index=1', 'below config.hosts.count=0, not 1.'),
        ('train --config=gymnasium', 'Name the environment'),
        # Evaluation.
        ('evaluate', 'Name the run folder'),
        ('evaluate ~nobody.here/run', "'~nobody.here/run' is no path that can be used: "),
        (
            'evaluate run --video=~nobody.here/a.gif',
            "'~nobody.here/a.gif' is no path that can be used",
        ),
        ('train --config=quickstart --config.logdir=~nobody.here/run', 'Could not determine home'),
        (
            f'train --config=quickstart --config.logdir={"x" * 300}',
            'can be used: File name too long.',
        ),
        ('train --config=~nobody.here/my.py', "'~nobody.here/my.py' is no path that can be used"),
        ('evaluate rnu', 'There is no run folder rnu; did you mean run?'),
        ('evaluate run/deeper', 'There is no run folder run/deeper.'),
        ('evaluate run more', "'more' is one argument too many"),
        ('evaluate run --logdir=run', 'Give the run folder once'),
        ('evaluate run --epsiodes=3', "no option --epsiodes; did you mean '--episodes'?"),
        ('evaluate run --episodes=few', "--episodes takes a whole number, not 'few'."),
        ('evaluate run --episodes=0', '--episodes must be at least 1'),
        ('evaluate run --seed=-1', '--seed must be from 0 to 4294967295, not -1.'),
        ('evaluate run --seed=5000000000', '--seed must be from 0 to 4294967295'),
        ('evaluate run --video=film.avi', '--video must end with .mp4 or .gif'),
        ('evaluate run --open-loop=film', '--open-loop must end with .mp4 or .gif'),
        # Environments.
        ('envs Hovre-v0', 'Did you mean Hover-v0'),
        ('envs crafter', 'Did you mean crafter/reward'),
        ('envs CartPole-v1 more', "'more' is one argument too many"),
        ('envs CartPole-v1 --vidoe=a.mp4', "no option --vidoe; did you mean '--video'?"),
        ('envs CartPole-v1 --video=film.avi', '--video must end with .mp4 or .gif'),
        ('envs CartPole-v1 --repeat=2', 'did you mean --config.env.repeat?'),
        ('envs CartPole-v1 --config.env.repeta=2', 'did you mean config.env.repeat?'),
        ('envs CartPole-v1 --config.env.repeat=0', 'must be at least 1, not 0.'),
        ('envs CartPole-v1 --config.seed=1', 'not --config.seed.'),
        ('envs CartPole-v1 --config.env.id=x', 'takes the id bare'),
        ('envs --config.env.repeat=2', 'Name the environment, as in dreamerv3-jax envs'),
        ('envs --video=a.gif', 'Name the environment, as in dreamerv3-jax envs'),
    ],
)
def test_mistakes(arguments, words, capsys, folder, trained, evaluated):
    (folder / 'run').mkdir()
    assert words in mistake(capsys, *arguments.split())
    assert not trained and not evaluated


KEYS = st.sampled_from(settings.names()) | st.sampled_from(
    ['seed.x', 'agent', 'env.kwargs', 'env.kwargs.', 'env.kwargs.a', 'env.kwargs.1', 'replay', '']
)
ODD = """0 -1 1 2 7 1e6 1e400 -1e400 nan inf 0.5 1.5 true None [] [1 {"a":1} () ' = -- \u00e9 0x10
    1_0 auto nano native bfloat16 CartPole-v1 dmc/walker_walk a:b / 1111111111111111111111"""
VALUES = (
    st.sampled_from(['', ' ', *ODD.split()])
    | st.text(max_size=8)
    | st.integers().map(str)
    | st.floats().map(repr)
)
CHANGE = st.tuples(KEYS | st.text(max_size=12), VALUES | st.none())


@functools.cache
def spaces():
    return tiny_runs.specs(gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.Discrete(2))


def check_shapes(values, checked=[]):  # noqa: B006
    """Builds the parameters of accepted settings, as shapes; memory is another matter."""
    if values not in checked:
        checked.append(values)
        agent = Agent(*spaces(), ml_collections.ConfigDict(values))
        jax.eval_shape(lambda: agent.init(0))


@pytest.mark.medium
@hypothesis.settings(
    max_examples=1000,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    preset=st.sampled_from(['quickstart', 'gymnasium:size12m', 'dmc_vision', 'atari']),
    changes=st.lists(CHANGE, min_size=1, max_size=3),
)
def test_any_change_is_accepted_or_answered(preset, changes, capsys, folder, trained):
    """Whatever is typed: the run starts, or one sentence says why not and nothing is written."""
    arguments = ['train', f'--config={preset}', '--config.env.id=CartPole-v1']
    for key, value in changes:
        arguments.append(f'--config.{key}' + ('' if value is None else f'={value}'))
    trained.clear()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert (code, len(trained)) in ((0, 1), (2, 0)), arguments
    if trained:
        check_shapes(trained[0][0].agent.to_dict())
    if code:
        assert captured.out == ''
        assert captured.err.startswith('dreamerv3-jax: ') and captured.err.count('\n') == 1
        assert captured.err.rstrip()[-1] in '.?)', captured.err
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('x = 1', 'mine.py must define get_config().'),
        ('def get_config(: pass', 'mine.py failed: SyntaxError'),
        ('import no_such_module', 'mine.py failed: ModuleNotFoundError'),
        ('def get_config(): return {}', 'must return an ml_collections.ConfigDict'),
        ('def get_config(): return 1 / 0', 'failed: ZeroDivisionError: division by zero.'),
    ],
)
def test_mistakes_in_files(text, words, capsys, trained):
    write('mine.py', text)
    assert words in mistake(capsys, 'train', '--config=mine.py')
    assert not trained


def test_mistakes_about_paths(capsys, folder, trained):
    write('quick.py', 'def get_config(): pass')
    assert 'did you mean quick.py?' in mistake(capsys, 'train', '--config=quik.py')
    assert 'takes no size' in mistake(capsys, 'train', '--config=quick.py:nano')
    (folder / 'a.py').mkdir()
    assert 'a.py cannot be read' in mistake(capsys, 'train', '--config=a.py')
    arguments = ('train', '--config=quickstart', '--config.logdir=quick.py')
    assert 'quick.py is a file' in mistake(capsys, *arguments)
    (folder / 'runs').mkdir()
    arguments = ('train', '--config=quickstart', f'--config.env.id={"x" * 300}:y')
    assert 'can be used: File name too long.' in mistake(capsys, *arguments)


def test_mistakes_found_later_have_the_same_form(capsys, monkeypatch, trained):
    def train(config, logdir, preset):
        raise UserError('There is no environment\n  X.')

    monkeypatch.setattr(dreamerv3_jax.loop, 'train', train)
    assert mistake(capsys, 'train', '--config=quickstart') == 'There is no environment X.'


@pytest.mark.parametrize(
    ('error', 'code', 'words'),
    [
        (Failure('Environment 3 of X failed.'), 1, 'Environment 3 of X failed.'),
        (RuntimeError('RESOURCE_EXHAUSTED: Out of memory'), 2, 'too small for it, or another'),
        (RuntimeError("Unable to initialize backend 'cuda':\nno GPU"), 2, 'leave it out for those'),
        (AssertionError(), 2, 'leave it out for those that are.'),  # of JAX, without a driver
        (checkpoint.NotSaved('Cannot write the checkpoint.'), 1, 'Cannot write the checkpoint.'),
    ],
)
def test_failures_of_a_run_are_told_in_a_sentence(capsys, monkeypatch, trained, error, code, words):
    def train(config, logdir, preset):
        raise error

    monkeypatch.setattr(dreamerv3_jax.loop, 'train', train)
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
    assert cli.main(['train', '--config=quickstart']) == code
    text = capsys.readouterr().err
    assert words in text and text.count('\n') == 1


@pytest.mark.parametrize('error', [AssertionError(), NotImplementedError()])
def test_mistakes_of_ours_are_no_missing_devices(error, monkeypatch, trained):
    def train(config, logdir, preset):
        raise error

    monkeypatch.setattr(dreamerv3_jax.loop, 'train', train)
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    with pytest.raises(type(error)):
        cli.main(['train', '--config=quickstart'])


@pytest.mark.medium
@pytest.mark.parametrize('platform', ['cuda', 'rocm'])  # JAX looks for the first, and has no other
def test_devices_that_are_not_here(platform, monkeypatch):
    if glob.glob('/dev/nvidia*') or glob.glob('/dev/kfd'):
        pytest.skip('they may be here')
    monkeypatch.setenv('JAX_PLATFORMS', platform)
    command = [sys.executable, '-m', 'dreamerv3_jax', 'train', '--config=quickstart']
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert f'dreamerv3-jax: JAX_PLATFORMS={platform} names devices that are not' in result.stderr


def test_interruption_has_its_own_exit_code(capsys, monkeypatch, trained):
    def train(config, logdir, preset):
        raise KeyboardInterrupt

    monkeypatch.setattr(dreamerv3_jax.loop, 'train', train)
    assert cli.main(['train', '--config=quickstart']) == 130
    assert 'Traceback' not in capsys.readouterr().err


def test_train_starts_the_loop(trained):
    assert cli.main(['train', '--config=quickstart']) == 0
    config, logdir, preset = trained.pop()
    assert config.env.id == 'Hover-v0'
    assert logdir == Path('runs/quickstart-Hover-v0-cpu-seed0')
    assert preset == 'quickstart'
    assert not logdir.exists()


def test_config_may_stand_anywhere(trained):
    first = ['train', '--config.seed=3', '--config=gymnasium:nano', '--config.env.id=X-v0']
    second = 'train --config gymnasium:nano --config.env.id X-v0 --config.seed 3'.split()
    third = ['train', '--config.size=nano', *second[3:], '--config=gymnasium']
    for arguments in (first, second, third):
        assert cli.main(arguments) == 0
    assert trained[0] == trained[1] == trained[2]
    config, logdir, _ = trained[0]
    assert (config.seed, config.size, config.agent.units) == (3, 'nano', 64)
    assert logdir == Path('runs/gymnasium-X-v0-nano-seed3')


def test_values_take_the_type_of_their_field(trained):
    config = configured(
        trained,
        '--config.run.steps=1e6',
        '--config.replay.capacity=5_000',
        '--config.replay.train_ratio=64',
        '--config.agent.learning_rate=1e-4',
        '--config.replay.online=false',
        '--config.replay.on_disk',
        '--config.logdir=10',
        '--config.seed=1',
        '--config.seed=2',  # the last one counts
    )
    assert config.run.steps == 1_000_000 and type(config.run.steps) is int
    assert config.replay.capacity == 5000
    assert config.replay.train_ratio == 64.0 and type(config.replay.train_ratio) is float
    assert config.agent.learning_rate == 1e-4
    assert config.replay.online is False and config.replay.on_disk is True
    assert config.logdir == '10'
    assert config.seed == 2


def test_environment_arguments_are_literals_or_text(trained):
    config = configured(
        trained,
        '--config.env.kwargs.level=3',
        '--config.env.kwargs.hard=true',
        '--config.env.kwargs.soft=False',
        '--config.env.kwargs.name=three words',
        '--config.env.kwargs.rate=1e-3',
        '--config.env.kwargs.nothing=None',
        '--config.env.kwargs.options={"a": [1, 2]}',
        '--config.env.kwargs.options={"a": {"b": 2}}',
        '--config.env.kwargs.level=4',
    )
    assert config.env.kwargs.to_dict() == {
        'level': 4,
        'hard': True,
        'soft': False,
        'name': 'three words',
        'rate': 1e-3,
        'nothing': None,
        'options': {'a': {'b': 2}},
    }


def test_environment_arguments_of_a_preset_keep_their_type(trained, capsys):
    assert cli.main(['train', '--config=atari', '--config.env.kwargs.gray=0']) == 0
    assert trained.pop()[0].env.kwargs.gray is False
    assert cli.main(['train', '--config=atari', '--config.env.kwargs.sticky=0.5']) == 0
    assert trained.pop()[0].env.kwargs.sticky == 0.5
    words = mistake(capsys, 'train', '--config=atari', '--config.env.kwargs.gray=no way')
    assert words == "--config.env.kwargs.gray takes true or false, not 'no way'."


def test_file_of_the_user(trained, folder):
    write(
        'mine.py',
        """
        from dreamerv3_jax.configs import quickstart

        def get_config(size='size1m'):
            config = quickstart.get_config(size)
            config.seed = 7
            return config
        """,
    )
    sizes = {'mine.py': 'size1m', './mine.py:nano': 'nano', f'{folder}/mine.py': 'size1m'}
    for spec, size in sizes.items():
        assert cli.main(['train', f'--config={spec}']) == 0
        config, logdir, preset = trained.pop()
        assert (config.seed, config.size, preset) == (7, size, 'mine')
        assert logdir == Path(f'runs/mine-Hover-v0-{size}-seed7')
    assert [path.name for path in folder.iterdir()] == ['mine.py']


def test_evaluate_prints_the_score(evaluated, capsys, folder):
    (folder / 'run').mkdir()
    assert cli.main(['evaluate', 'run']) == 0
    options = '--episodes=2 --seed=5 --video=a.mp4 --sample'.split()
    assert cli.main(['evaluate', '--logdir=run', *options]) == 0
    reports = [options.pop('report') for _, options in evaluated]
    assert evaluated[0] == (
        Path('run'),
        {'episodes': 20, 'seed': 0, 'video': None, 'sample': False, 'env': None},
    )
    assert evaluated[1] == (
        Path('run'),
        {'episodes': 2, 'seed': 5, 'video': Path('a.mp4'), 'sample': True, 'env': None},
    )
    assert capsys.readouterr().out.splitlines()[0] == (
        'mean return 3.00 ± 0.50 (95% confidence interval, 2 episodes, mean length 15.0)'
    )
    reports[1](1, 2.5, 7)
    assert capsys.readouterr().out == 'episode 1/2: return 2.50, length 7\n'


def test_evaluate_takes_settings_of_the_environment(evaluated, capsys, folder):
    (folder / 'run').mkdir()
    command = ('evaluate', 'run', '--config.env.id=Pendulum-v1')
    assert 'run holds no run' in mistake(capsys, *command)
    config = presets.load_config('quickstart')
    config.env.kwargs = {'max_episode_steps': 9}
    write('run/config.json', config.to_json())
    assert cli.main([*command, '--config.env.kwargs.g=9']) == 0
    capsys.readouterr()
    env = evaluated[0][1]['env']
    assert (env.id, env.kwargs.to_dict()) == ('Pendulum-v1', {'g': 9})
    assert cli.main(['evaluate', 'run', '--config.env.repeat=2']) == 0
    env = evaluated[1][1]['env']
    assert (env.repeat, env.kwargs.to_dict()) == (2, {'max_episode_steps': 9})
    capsys.readouterr()
    for option, words in (
        ('env.repeat=0', 'env.repeat must be at least 1'),
        ('env.repaet=2', 'did you mean config.env.repeat?'),
        ('run.steps=5', 'evaluate takes --config.env.KEY=VALUE only, not --config.run.steps.'),
    ):
        assert words in mistake(capsys, *command, f'--config.{option}')


def test_evaluate_shows_the_open_loop(evaluated, monkeypatch, folder):
    (folder / 'run').mkdir()
    calls = []
    module = sys.modules['dreamerv3_jax.evaluation']
    monkeypatch.setattr(
        module, 'open_loop', lambda *run, **options: calls.append((run, options)), raising=False
    )
    assert cli.main(['evaluate', 'run', '--seed=5', '--open-loop=a.gif']) == 0
    assert calls == [((Path('run'),), {'seed': 5, 'video': Path('a.gif'), 'env': None})]
    assert evaluated[0][1]['video'] is None


def test_evaluate_prints_the_score_in_any_language(evaluated, monkeypatch, folder):
    (folder / 'run').mkdir()
    stream = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', stream)
    assert cli.main(['evaluate', 'run']) == 0
    assert b'mean return 3.00 \\xb1 0.50' in stream.buffer.getvalue()


def test_evaluate_prints_one_episode(monkeypatch, evaluated, capsys, folder):
    (folder / 'run').mkdir()
    result = {'mean': 3.0, 'ci95': float('nan'), 'returns': [3.0], 'lengths': [15]}
    module = sys.modules['dreamerv3_jax.evaluation']
    monkeypatch.setattr(module, 'evaluate', lambda *_, **__: result)
    assert cli.main(['evaluate', 'run', '--episodes=1']) == 0
    assert capsys.readouterr().out == 'return 3.00, length 15\n'


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ('--help', 'presets    list the configurations'),
        ('-h', 'dreamerv3-jax train --config=quickstart'),
        ('train --help', '--config.env.kwargs.NAME=VALUE'),
        ('train --config=nonsense --help', 'sizes:'),
        ('evaluate --help', '--episodes=20'),
        ('presets --help', 'Lists the presets'),
        ('--version', 'dreamerv3-jax 0.1.0'),
        ('presets', 'A drone learns'),
        ('envs --help', '--config.env.kwargs.NAME=VALUE'),
    ],
)
def test_help(arguments, words, capsys):
    assert cli.main(arguments.split()) == 0
    captured = capsys.readouterr()
    assert words in captured.out and captured.err == ''
    assert max(map(len, captured.out.splitlines())) <= 120


def test_envs_lists_suites(monkeypatch, capsys):
    suites = {
        'json': Suite('Here', 'json', ('first', 'second'), install='nothing'),
        'no': Suite('There', 'no_such_package', ('x',), install='pip install it'),
    }
    monkeypatch.setattr(env_report, 'SUITES', suites)
    assert cli.main(['envs']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        'Here   json/first  installed',
        'There  no/x        not installed: pip install it',
    ]


def test_envs_looks_at_one(monkeypatch, capsys, folder):
    monkeypatch.setattr(env_report, 'MEASURED_SECONDS', 0.05)
    pytest.importorskip('imageio_ffmpeg')
    options = ['--config.env.kwargs.length=7', '--config.env.num_envs=2']
    assert cli.main(['envs', 'toy_envs:Counter', *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        'environment  toy_envs:Counter, repeat 1',
        'observation  action: 4 choices, count: 2 numbers',
        'action       action: 3 choices',
    ]
    rate, _, rest = lines[3].removeprefix('speed').strip().partition(' ')
    assert int(rate.replace(',', '')) > 100
    assert rest == 'steps per second (2 environments, resets included)'
    assert lines[4:] == ['video        toy_envs_Counter.mp4']
    assert (folder / 'toy_envs_Counter.mp4').stat().st_size > 500
    assert cli.main(['envs', 'toy_envs:Counter', '--video=films/a.gif']) == 0
    imageio = pytest.importorskip('imageio.v3')
    frames = imageio.imread(folder / 'films/a.gif')
    assert len(frames) > 3 and frames.shape[-1] == 3


def test_envs_are_seen_as_their_presets_show_them(monkeypatch, folder):
    seen = []
    monkeypatch.setattr(env_report, 'report', lambda *arguments: seen.append(arguments))
    for name in ('craftax/full', 'atari/breakout', 'dmc/walker_walk', 'toy_envs:Counter'):
        assert cli.main(['envs', name]) == 0
    configs, found, *_ = zip(*seen, strict=True)
    assert found == ('craftax', 'atari', 'dmc_proprio', '')
    assert configs[0].env.kwargs.pixels and configs[0].env.image_size == 64
    assert [config.env.repeat for config in configs] == [1, 4, 1, 1]
    assert {config.env.num_envs for config in configs} == {1}


def test_envs_without_a_video(monkeypatch, capsys, folder):
    monkeypatch.setattr(env_report, 'MEASURED_SECONDS', 0.05)
    assert cli.main(['envs', 'toy_envs:Clockwork', '--config.env.kwargs.length=5']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        'no video     This environment draws no pictures, so that there can be no video.'
    )
    monkeypatch.setattr(toy_envs.Counter, 'render', lambda self: np.zeros(4, np.uint8))
    assert cli.main(['envs', 'toy_envs:Counter', '--config.env.vectorization=sync']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        'no video     render() returns an array of shape (4,); a picture is [H, W, 3].'
    )
    monkeypatch.setattr(toy_envs.Counter, 'render', lambda self: np.zeros((4, 4, 3)))
    assert cli.main(['envs', 'toy_envs:Counter', '--config.env.vectorization=sync']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        'no video     render() returns float64; the numbers of a picture are uint8, 0 to 255.'
    )
    monkeypatch.setattr(toy_envs.Counter, 'render', lambda self: None)
    assert cli.main(['envs', 'toy_envs:Counter', '--config.env.vectorization=sync']) == 0
    assert 'no video     This environment draws no pictures' in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, 'imageio', None)
    assert cli.main(['envs', 'CartPole-v1']) == 0
    assert 'no video     Videos need imageio; in the clone, pip' in capsys.readouterr().out
    assert cli.main(['envs', 'CartPole-v1', '--video=a.mp4']) == 2
    assert 'Videos need imageio' in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_envs_knows_what_is_missing(monkeypatch, capsys, folder):
    monkeypatch.setitem(registry.SUITES, 'no', Suite('No', 'no_such', ('x',), install='pip it'))
    assert 'no/x needs a package that is not installed: pip it' in mistake(capsys, 'envs', 'no/x')
    (folder / 'no_such').mkdir()  # a clone, say, in which the package lies deeper
    monkeypatch.syspath_prepend(folder)
    assert importlib.util.find_spec('no_such')
    assert 'no/x needs a package that is not installed: pip it' in mistake(capsys, 'envs', 'no/x')


def test_process():
    # The module and the installed command, without jax: neither is ever imported for these.
    code = (
        'import sys; from dreamerv3_jax import cli\n'
        'cli.main(sys.argv[1:]); print("jax" in sys.modules)'
    )
    command = Path(sys.executable).with_name('dreamerv3-jax')
    for start, last in (
        ([sys.executable, '-m', 'dreamerv3_jax'], 'python '),
        ([sys.executable, '-c', code], 'False'),
        ([str(command)], 'python '),
    ):
        result = subprocess.run([*start, '--version'], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and result.stderr == ''
        assert result.stdout.splitlines()[-1].startswith(last)
    result = subprocess.run(
        [sys.executable, '-m', 'dreamerv3_jax', 'train', '--config=quickstrat'],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "dreamerv3-jax: There is no preset 'quickstrat'; did you mean 'quickstart'?"
    ]


def test_closed_streams():
    """Files that are opened later do not get their numbers, and what is printed."""
    code = (
        'import os; from dreamerv3_jax import cli\n'
        'assert cli.main(["presets"]) == 0 and cli.main(["preset"]) == 2\n'
        'assert os.open("/", os.O_RDONLY) > 2\n'
    )
    command = f'exec {shlex.join([sys.executable, "-c", code])} <&- >&- 2>&-'
    assert subprocess.run(command, shell=True).returncode == 0


def test_nobody_reads():
    """As in `dreamerv3-jax presets | head -1`, but surely."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, '-m', 'dreamerv3_jax', 'presets']
    # By default what is printed is kept until it is much, or the end.
    variables = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    options = dict(stderr=subprocess.PIPE, text=True, env=variables)
    result = subprocess.run(command, stdout=writer, **options)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, '')
    with open('/dev/full', 'w') as full:
        result = subprocess.run(command, stdout=full, **options)
    sentence = 'dreamerv3-jax: The disk is full; not all could be written.\n'
    assert (result.returncode, result.stderr) == (1, sentence)
