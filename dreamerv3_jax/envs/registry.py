"""From an environment id to a `gymnasium.Env`.

Suites are modules with a function `make(name, ...)`, imported when first asked for. It is given
those of `repeat`, `image_size` and `render_mode` that it takes: some skip frames without drawing
them, and for the others actions are held here. Those whose package steps many environments at once
have instead a function `make_vector(name, *, seeds, ...)`, which returns a
`gymnasium.vector.VectorEnv` with one environment per seed. `_SUITES` is the place to add one.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
from gymnasium.envs.registration import (
    EnvSpec,
    find_highest_version,
    get_env_id,
    load_env_creator,
    parse_env_id,
)
from gymnasium.error import DependencyNotInstalled, Error, UnregisteredEnv
from gymnasium.vector import VectorEnv

from dreamerv3_jax.envs import registered
from dreamerv3_jax.envs.mujoco import check_renderer, choose_renderer
from dreamerv3_jax.envs.stream import ActionRepeat
from dreamerv3_jax.errors import UserError, one_line


def _pip(extra: str) -> str:
    return f'in the clone, pip install -e ".[{extra}]"'


@dataclasses.dataclass(frozen=True)
class Suite:
    """Where a suite lives, and what must be installed for it."""

    title: str
    package: str  # whose absence means that the suite is not installed
    examples: tuple[str, ...]  # names, without the prefix; the first stands for the suite in tests
    module: str = ''  # in this package, if it is not called like the prefix
    install: str = ''  # what to do, if it is not to install the extra of that name
    vector: bool = False  # its module has `make_vector`

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        spec = importlib.util.find_spec(self.package)
        if spec is None:
            return False
        mere_folder = spec.origin is None and spec.submodule_search_locations is not None
        return not mere_folder


_SUITES = {
    'atari': Suite('Atari 57', 'ale_py', ('pong', 'breakout')),
    'bsuite': Suite('bsuite', 'bsuite', ('catch/0', 'memory_len/10')),
    'craftax': Suite('Craftax', 'craftax', ('classic', 'full'), vector=True),
    'crafter': Suite('Crafter', 'crafter', ('reward', 'noreward')),
    'dmc': Suite('DeepMind Control Suite', 'dm_control', ('walker_walk', 'cartpole_balance')),
    'dmlab': Suite(
        'DMLab-30',
        'deepmind_lab',
        ('rooms_watermaze', 'language_execute_random_task'),
        install='clone github.com/google-deepmind/lab, run "bazel build -c opt '
        '//python/pip_package:build_pip_package" and "bazel-bin/python/pip_package/'
        'build_pip_package /tmp/dmlab" there, and pip install the wheel in /tmp/dmlab (its '
        'docs/users/build.md and python/pip_package/README.md have the details).',
    ),
    'envpool': Suite(
        'EnvPool', 'envpool', ('CartPole-v1', 'Pong-v5', 'CheetahRun-v1'), vector=True
    ),
    'manipulation': Suite(
        'DeepMind manipulation (robot arm)',
        'dm_control',
        ('reach_site', 'stack_2_bricks'),
        install=_pip('dmc'),
    ),
    'memorymaze': Suite('Memory Maze', 'memory_maze', ('9x9', '15x15'), module='memory_maze'),
    'metaworld': Suite('Meta-World', 'metaworld', ('reach', 'drawer-open')),
    'minecraft': Suite(
        'Minecraft diamond',
        'minerl',
        ('diamond',),
        install='install Java 8 ("apt-get install openjdk-8-jdk xvfb"), then "pip install '
        'minerl==0.4.4" (minerl.readthedocs.io has the details) or, where that cannot be built, '
        'the wheel for Python 3.11 at github.com/danijar/minerl/releases, and without a screen put '
        '"xvfb-run -a" before the command.',
    ),
    'minigrid': Suite('Minigrid and BabyAI', 'minigrid', ('Empty-5x5-v0', 'BabyAI-GoToLocal-v0')),
    'popgym': Suite('POPGym', 'popgym', ('RepeatPreviousEasy-v0', 'PositionOnlyPendulumEasy-v0')),
    'procgen': Suite('ProcGen', 'envpool', ('coinrun', 'starpilot'), vector=True),
    'robotics': Suite(
        'Gymnasium-Robotics', 'gymnasium_robotics', ('FetchReach-v4', 'PointMaze_UMaze-v3')
    ),
    'vizdoom': Suite('ViZDoom', 'vizdoom', ('basic', 'health_gathering')),
}
SUITES = {
    prefix: dataclasses.replace(
        suite, module=suite.module or prefix, install=suite.install or _pip(prefix)
    )
    for prefix, suite in _SUITES.items()
}


gymnasium.register(
    'Hover-v0',
    'dreamerv3_jax.envs.hover:Hover',
    max_episode_steps=200,
    reward_threshold=195.0,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that is needed to build the environments; picklable, so that a worker process can."""

    id: str
    kwargs: dict[str, Any]
    repeat: int
    image_size: int  # 0 keeps sizes where possible
    autoreset: str
    render: bool
    seeds: tuple[int, ...]  # one per environment
    restarts: int  # of a failing environment in a row
    timeout: float  # seconds after which a process that does not answer is given up


def suite_of(env_id: str) -> Suite | None:
    """Returns the suite of this package that the id belongs to, if it does to one."""
    prefix, slash, _ = env_id.partition('/')
    return SUITES.get(prefix) if slash else None


def make_env(settings: Settings) -> gymnasium.Env:
    """Builds one environment, action repeat included.

    Raises:
      UserError: the id is unknown, a package is missing, or the constructor failed.
    """
    with readable_errors(settings.id):
        if suite_of(settings.id):
            return _make_from_suite(settings)
        module, colon, attribute = settings.id.partition(':')
        creator = _user_function(module, attribute) if colon else None
        if creator is not None:
            env = _call(settings, creator)
        else:
            env = _make_registered(settings)
    if not isinstance(env, gymnasium.Env):
        raise UserError(
            f'{settings.id} returned {type(env).__name__}, which is no gymnasium.Env; derive the '
            'environment from gymnasium.Env or wrap it.'
        )
    return ActionRepeat(env, settings.repeat) if settings.repeat > 1 else env


@contextlib.contextmanager
def readable_errors(env_id: str) -> Iterator[None]:
    """Turns whatever goes wrong while an environment is made into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except UnregisteredEnv as error:
        raise UserError(f'There is no environment {env_id!r}.{_suggestions(env_id)}') from error
    except DependencyNotInstalled as error:
        raise UserError(f'{env_id} needs another package: {one_line(error)}') from error
    except ModuleNotFoundError as error:
        own = error.name == env_id.partition(':')[0].partition('.')[0]
        hint = '; give the command in the folder of the module' if own else ''
        raise UserError(f'Could not make {env_id}: {one_line(error)}{hint}.') from error
    except Exception as error:
        raise UserError(
            f'Could not make the environment {env_id}: {type(error).__name__}: {one_line(error)}'
        ) from error


def make_vector(settings: Settings) -> VectorEnv:
    """Builds the environments of a suite that steps them together.

    Raises:
      UserError: the name is unknown, or the package is missing or failed.
    """
    with readable_errors(settings.id):
        return _make_from_suite(settings, seeds=settings.seeds)


def no_repeat(env_id: str) -> UserError:
    """Returns the error for an action repeat where environments are stepped by their package."""
    return UserError(
        f'{env_id} has its own vectorisation, which cannot hold actions; use env.repeat=1 (frame '
        'skips go into env.kwargs).'
    )


def _make_from_suite(settings: Settings, **extra: Any) -> Any:
    prefix, _, name = settings.id.partition('/')
    suite = SUITES[prefix]
    if not suite.installed:
        how = suite.install.rstrip('.')
        raise UserError(f'{settings.id} needs a package that is not installed: {how}.')
    module = importlib.import_module(f'dreamerv3_jax.envs.{suite.module}')
    make = module.make_vector if suite.vector else module.make
    own = {
        'repeat': settings.repeat,
        'image_size': settings.image_size,
        'render_mode': 'rgb_array' if settings.render else None,
        **extra,
    }
    parameters = inspect.signature(make).parameters
    held = settings.repeat > 1 and 'repeat' not in parameters
    if held and suite.vector:
        raise no_repeat(settings.id)
    options = [key for key in parameters if key not in ('name', *own)]
    # Where any option is taken, the suite knows which ones there are.
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in settings.kwargs:
            if key not in options:
                known = f'it has {", ".join(options)}' if options else 'it takes none'
                raise UserError(f'{settings.id} has no setting env.kwargs.{key}; {known}.')
    taken = {key: value for key, value in own.items() if key in parameters}
    env = make(name, **taken, **settings.kwargs)
    return ActionRepeat(env, settings.repeat) if held else env


def _make_registered(settings: Settings) -> gymnasium.Env:
    kwargs = dict(settings.kwargs)
    if settings.render and _draws(settings.id):
        kwargs.setdefault('render_mode', 'rgb_array')
    return registered.make(settings.id, **kwargs)


def _registered(env_id: str) -> EnvSpec:
    """Returns what gymnasium knows of 'id' or 'module:id', in the newest version if it has none.

    Raises:
      Error: it is not registered.
    """
    module, _, name = env_id.rpartition(':')
    if module:
        importlib.import_module(module)
    space, stem, version = parse_env_id(name)
    if version is None:
        name = get_env_id(space, stem, find_highest_version(space, stem))
    return gymnasium.spec(name)


def _draws(env_id: str) -> bool:
    try:
        entry_point = _registered(env_id).entry_point
    except Error:
        return False
    if str(entry_point).startswith('gymnasium.envs.mujoco'):  # which looks for a screen first
        choose_renderer()
        check_renderer()
    return 'rgb_array' in getattr(_loaded(entry_point), 'metadata', {}).get('render_modes', ())


def takes_render_mode(env_id: str) -> bool:
    """Whether the vectorisation that an environment brings can be told to draw."""
    entry_point = _registered(env_id).vector_entry_point
    if entry_point is None:
        return False
    parameters = inspect.signature(_loaded(entry_point)).parameters
    return 'render_mode' in parameters or any(
        parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _loaded(entry_point: Any) -> Any:
    return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point


def _user_function(module: str, attribute: str) -> Callable[..., Any] | None:
    """Imports a module of the user's; returns its function, or None if there is none of that name.

    The second case is gymnasium's 'module:Env-v0', where the import registers the environment.
    """
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None and attribute.isidentifier():
        raise UserError(
            f'The module {module!r} has no function {attribute!r} that makes an environment.'
        )
    return found


def _call(settings: Settings, creator: Callable[..., Any]) -> Any:
    kwargs = dict(settings.kwargs)
    if settings.render and 'render_mode' in inspect.signature(creator).parameters:
        kwargs.setdefault('render_mode', 'rgb_array')
    return creator(**kwargs)


def _suggestions(env_id: str) -> str:
    known = list(gymnasium.registry)
    known += [f'{prefix}/{name}' for prefix in SUITES for name in SUITES[prefix].examples]
    near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.5)
    hint = f' Did you mean {" or ".join(near)}?' if near else ''
    forms = 'a registered gymnasium id, module:function, or a name after ' + ', '.join(
        f'{prefix}/' for prefix in SUITES
    )
    return f'{hint} An id is {forms}.'
