"""The command line: `train`, `evaluate`, `plan`, `presets` and `envs`.

Neither jax nor an environment is imported before the arguments are known to be right, so that help
and mistakes are answered at once and a mistake leaves nothing behind.
"""

import difflib
import errno
import importlib.metadata
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections

from dreamerv3_jax import presets, settings, startup, topology
from dreamerv3_jax.arguments import PROGRAM, Parser, build_config, split_overrides, whole_number
from dreamerv3_jax.configs import base
from dreamerv3_jax.errors import UserError, nearest, one_line, readable_device_errors

_HELP = f"""\
usage: {PROGRAM} <command> [options]

DreamerV3 in JAX: learns a model of an environment, and to act by imagining with it.

commands:
  train      learn in an environment, or go on with a stopped run
  evaluate   play episodes with a trained agent
  plan       tell what training takes of devices that need not be here
  presets    list the configurations that come with the package
  envs       list the suites of environments, or look at one environment

  {PROGRAM} <command> --help   the options of a command
  {PROGRAM} --version          the versions in use

Start with:
  {PROGRAM} train --config=quickstart
"""
_TRAIN_HELP = f"""\
usage: {PROGRAM} train --config=PRESET[:SIZE] [--config.KEY=VALUE ...]

Learns in an environment. The same command again goes on where the run stopped.

options:
  --config=PRESET[:SIZE]        a preset ("{PROGRAM} presets" lists them) or path/to/file.py;
                                a size replaces the preset's own
  --config.KEY=VALUE            changes one setting; see configs/base.py for all of them
  --config.env.kwargs.NAME=VALUE
                                an argument of the environment, as a Python literal
  --help                        this text

settings that are often changed:
  --config.env.id=ID            a gymnasium id, dmc/walker_walk, atari/pong, crafter/reward
                                or my_module:my_function
  --config.logdir=FOLDER        default: runs/<preset>-<environment>-<size>-seed<seed>
  --config.seed=0
  --config.run.steps=1e6        environment frames, action repeat included
  --config.replay.train_ratio=32
                                replayed steps per step of the agent

examples:
  {PROGRAM} train --config=quickstart
  {PROGRAM} train --config=gymnasium:size12m --config.env.id=Pendulum-v1
  {PROGRAM} train --config=dmc_vision --config.env.id=dmc/cheetah_run --config.seed=3

sizes:
  {', '.join(base.SIZES)}
"""
_EVALUATE_HELP = f"""\
usage: {PROGRAM} evaluate RUN_FOLDER [options]

Plays episodes with the latest checkpoint of a run and prints their mean return.

options:
  --logdir=RUN_FOLDER           the same as RUN_FOLDER
  --episodes=20                 number of episodes
  --seed=0                      seed of the environments, and of the actions if sampled
  --video=FILE.mp4              also writes a video of an episode (or FILE.gif)
  --open-loop=FILE.mp4          also writes a video of four sequences whose first 5 steps of 50 the
                                world model sees: the truth, below it what the model predicts from
                                the actions alone, and the difference (or FILE.gif)
  --sample                      samples actions as in training, instead of the likeliest ones
  --config.env.KEY=VALUE        changes a setting of the environment, such as its id, for a test in
                                another one with the same spaces; a new id has no env.kwargs
  --help                        this text

examples:
  {PROGRAM} evaluate runs/quickstart-Hover-v0-cpu-seed0
  {PROGRAM} evaluate runs/quickstart-Hover-v0-cpu-seed0 --episodes=5 --video=hover.mp4
"""
_PLAN_HELP = f"""\
usage: {PROGRAM} plan --topology=KIND:SHAPE [--config=PRESET[:SIZE]] [--config.KEY=VALUE ...]

Compiles the update for devices that need not be here, and tells what it takes of them: memory,
operations, exchanges between devices, and an estimate of the time. If it does not fit, the nearest
settings that do are looked for. Compiling takes minutes.

options:
  --topology=KIND:SHAPE         {topology.EXAMPLES}
  --config=PRESET[:SIZE]        a preset; default: gymnasium. Without an environment, the agent sees
                                a picture of 64x64 pixels and takes one of 17 actions
  --config.KEY=VALUE            changes one setting, as in training
  --help                        this text

settings that decide:
  --config.mesh.fsdp=1          devices over which parameters and optimiser are spread
  --config.agent.remat          less memory, slower updates
  --config.agent.compute_dtype=auto
                                bfloat16 or float32; auto is bfloat16 on TPUs
  --config.replay.batch_size=16 sequences, a multiple of the devices
  --config.env.image_size=0     side of the picture

examples:
  {PROGRAM} plan --topology=v5e:2x2 --config=gymnasium:size200m --config.mesh.fsdp=4
  {PROGRAM} plan --topology=cpu:8 --config=gymnasium:size12m
"""
_PRESETS_HELP = f"""\
usage: {PROGRAM} presets

Lists the presets, what each is for, and the sizes.
"""
_ENVS_HELP = f"""\
usage: {PROGRAM} envs [ID] [options]

Lists the suites, whether each is installed, and how to install it. With an id: what the environment
observes and takes with the settings of its suite's preset, its steps per second, and a video of a
random policy.

options:
  --config.env.KEY=VALUE        changes a setting of the environment, as in training
  --config.env.kwargs.NAME=VALUE
                                an argument of the environment, as a Python literal
  --video=FILE.mp4              where the video goes (or FILE.gif); default: ID.mp4
  --help                        this text

examples:
  {PROGRAM} envs atari/pong --config.env.kwargs.gray=false
  {PROGRAM} envs dmc/walker_walk --config.env.kwargs.vision=true --video=walker.gif
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; by default those of the process.

    Returns:
      The exit code: 0, 2 after a mistake, 1 where a run that was begun without a mistake cannot go
      on, both answered with one sentence, 130 after Ctrl-C, 141 where what reads the output has
      ended, as `head` does.

    Raises:
      SystemExit: with code 143, after SIGTERM; the run was saved.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # it cannot encode every sign in every language
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        with readable_device_errors('for it, or another process holds it; wait for that to end.'):
            _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UserError as error:
        print(f'{PROGRAM}: {one_line(error)}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f'{PROGRAM}: The disk is full; not all could be written.', file=sys.stderr)
        return 1
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # which the interpreter would tell of, as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _open_closed_streams() -> None:
    """Replaces streams that were closed, or files of a run would get their numbers and what is
    printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')


def _run(arguments: list[str]) -> None:
    first = arguments[0] if arguments else ''
    if first in ('--help', '-h', 'help'):
        print(_HELP, end='')
    elif first == '--version':
        print(_versions())
    elif first in _COMMANDS:
        command, text = _COMMANDS[first]
        if '--help' in arguments or '-h' in arguments:
            print(text, end='')
        else:
            command(arguments[1:])
    elif not first or first.startswith('-'):
        hint = '' if not first else f', before {first}'
        raise UserError(f'Give a command{hint}: {", ".join(_COMMANDS)}.')
    else:
        raise UserError(f'There is no command {first!r}{nearest(first, _COMMANDS)}')


def _train(arguments: list[str]) -> None:
    overrides, rest = split_overrides(arguments)
    parser = Parser(settings.names())
    parser.add_argument('--config', default='')
    options = parser.parse(rest)
    config, preset = build_config(options.config, overrides)
    settings.validate(config)
    logdir = settings.run_folder(config, preset)
    if logdir.exists() and not logdir.is_dir():
        raise UserError(f'{logdir} is a file; choose another folder with --config.logdir.')
    startup.prepare()
    from dreamerv3_jax import loop

    # Python would let compiling or saving end first; nothing is lost. The loop sees to the rest.
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # as a job in the background has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        loop.train(config, logdir, preset)
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluate(arguments: list[str]) -> None:
    overrides, rest = split_overrides(arguments)
    parser = _env_parser()
    parser.add_argument('folder', nargs='?', default='')
    parser.add_argument('--logdir', default='')
    parser.add_argument('--episodes', type=whole_number, default=20)
    parser.add_argument('--seed', type=whole_number, default=0)
    parser.add_argument('--video', type=settings.path_of)
    parser.add_argument('--open-loop', type=settings.path_of)
    parser.add_argument('--sample', action='store_true')
    options = parser.parse(rest)
    logdir = _existing_run(options.folder or options.logdir)
    if options.folder and options.logdir:
        raise UserError('Give the run folder once, either bare or with --logdir.')
    if options.episodes < 1:
        raise UserError(f'--episodes must be at least 1, not {options.episodes}.')
    if not 0 <= options.seed <= settings.MOST_SEED:
        raise UserError(f'--seed must be from 0 to {settings.MOST_SEED}, not {options.seed}.')
    _check_video(options.video)
    _check_video(options.open_loop, '--open-loop')
    startup.prepare()
    from dreamerv3_jax import evaluation, run_folder

    env = None
    if overrides:
        config = run_folder.read_config(logdir)
        if any(key == 'env.id' for key, _ in overrides):
            config.env.kwargs = ml_collections.ConfigDict()
        _change_env(config, overrides, 'evaluate')
        env = config.env
    if options.open_loop:
        evaluation.open_loop(logdir, seed=options.seed, video=options.open_loop, env=env)
    result = evaluation.evaluate(
        logdir,
        episodes=options.episodes,
        seed=options.seed,
        video=options.video,
        sample=options.sample,
        env=env,
        report=lambda number, return_, length: print(
            f'episode {number}/{options.episodes}: return {return_:.2f}, length {length}',
            flush=True,
        ),
    )
    mean, lengths, count = result['mean'], result['lengths'], len(result['returns'])
    if options.video and count > 1:
        print(f'{options.video} shows episode {result["filmed"]}')
    if count == 1:
        print(f'return {mean:.2f}, length {lengths[0]}')
        return
    print(
        f'mean return {mean:.2f} ± {result["ci95"]:.2f} (95% confidence interval, '
        f'{count} episodes, mean length {sum(lengths) / count:.1f})'
    )


def _plan(arguments: list[str]) -> None:
    overrides, rest = split_overrides(arguments)
    parser = Parser(settings.names())
    parser.add_argument('--topology', default='')
    parser.add_argument('--config', default='gymnasium')
    options = parser.parse(rest)
    if not options.topology:
        raise UserError(f'Name the devices with --topology, as {topology.EXAMPLES}.')
    devices = topology.parse(options.topology)
    config, _ = build_config(options.config, overrides)
    named = config.env.id
    config.env.update(id=named or 'none', num_envs=1)
    settings.validate(config)
    config.env.id = named
    startup.prepare_plan(devices.kind, devices.size)
    from dreamerv3_jax import plan

    plan.report(config, devices, lambda line: print(line, flush=True))


def _check_video(path: Path | None, option: str = '--video') -> None:
    if path and path.suffix not in ('.mp4', '.gif'):
        raise UserError(f'{option} must end with .mp4 or .gif, unlike {path}.')


def _existing_run(name: str) -> Path:
    if not name:
        raise UserError(f'Name the run folder, as in {PROGRAM} evaluate runs/quickstart-...')
    folder = settings.path_of(name)
    if folder.is_dir():
        return folder
    others = [path for path in folder.parent.glob('*') if path.is_dir()]
    close = difflib.get_close_matches(folder.name, [path.name for path in others], n=1)
    hint = f'; did you mean {folder.parent / close[0]}?' if close else '.'
    raise UserError(f'There is no run folder {folder}{hint}')


def _presets(arguments: list[str]) -> None:
    Parser().parse(arguments)
    names = presets.names()
    width = max(map(len, names))
    for name in names:
        print(f'{name:{width}}  {presets.describe(name)}')
    print(f'\nSizes: {", ".join(base.SIZES)}.')
    print(f'Start one with: {PROGRAM} train --config=quickstart')


def _envs(arguments: list[str]) -> None:
    overrides, rest = split_overrides(arguments)
    parser = _env_parser()
    parser.add_argument('id', nargs='?', default='')
    parser.add_argument('--video', type=settings.path_of)
    options = parser.parse(rest)
    if not options.id and (overrides or options.video):
        raise UserError(f'Name the environment, as in {PROGRAM} envs atari/pong.')
    preset = presets.of_suite(options.id)
    config = presets.load_config(preset) if preset else base.get_config()
    config.env.update(id=options.id, num_envs=1)
    if any(key == 'env.id' for key, _ in overrides):
        raise UserError('envs takes the id bare, not as --config.env.id.')
    _change_env(config, overrides, 'envs')
    _check_video(options.video)
    startup.prepare()
    from dreamerv3_jax import env_report

    if options.id:
        env_report.report(config, preset, options.video, lambda line: print(line, flush=True))
        return
    print('\n'.join(env_report.suites()))
    print('\nOther environments: any gymnasium id, module:Id-v0 or module:function.')
    print(f'Look at one with: {PROGRAM} envs Hover-v0')


def _env_parser() -> Parser:
    return Parser(name for name in settings.names() if name.startswith('env.'))


def _change_env(
    config: ml_collections.ConfigDict, overrides: list[tuple[str, str | None]], command: str
) -> None:
    for key, value in overrides:
        if not key.startswith('env.'):
            raise UserError(f'{command} takes --config.env.KEY=VALUE only, not --config.{key}.')
        settings.override(config, key, value)
    if config.env.id:
        settings.validate(config)


def _versions() -> str:
    packages = ('dreamerv3-jax', 'jax', 'jaxlib', 'flax', 'optax', 'gymnasium')
    python = '.'.join(map(str, sys.version_info[:3]))
    return '\n'.join(
        [f'{name} {importlib.metadata.version(name)}' for name in packages] + [f'python {python}']
    )


_COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    'train': (_train, _TRAIN_HELP),
    'evaluate': (_evaluate, _EVALUATE_HELP),
    'plan': (_plan, _PLAN_HELP),
    'presets': (_presets, _PRESETS_HELP),
    'envs': (_envs, _ENVS_HELP),
}
