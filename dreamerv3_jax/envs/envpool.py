"""Environments of EnvPool, which steps them together in threads of C++.

`envpool/<id>`, for example `envpool/Pong-v5`, `envpool/CheetahRun-v1`, `envpool/CartPole-v1` or
`envpool/MiniGrid-Empty-5x5-v0`; `envpool.list_all_envs()` has all of them. The settings of an id
are EnvPool's own, among them `max_episode_steps` and, for some, `frame_skip`.

`env.repeat` holds for Atari only, where it sets `frame_skip`, which sums the rewards of the frames,
and keeps the time limit in frames. With `env.repeat=1`, EnvPool's own frame skip is part of an
environment step. Elsewhere `frame_skip` is part of the physics, or rewards only the last frame.

MuJoCo draws no pictures: a missing OpenGL would end the whole process.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import envpool
from gymnasium.vector import VectorEnv

from dreamerv3_jax.envs.registry import no_repeat
from dreamerv3_jax.errors import UserError, nearest

# Settings of the pool that are made here.
_RESERVED = ('num_envs', 'batch_size', 'seed', 'env_seed', 'base_path', 'gym_reset_return_info')
_NO_PICTURES = 'envpool.mujoco.'


def make_vector(
    name: str,
    *,
    seeds: Sequence[int],
    repeat: int,
    render_mode: str | None = None,
    **options: Any,
) -> VectorEnv:
    """Returns environments that step together.

    Args:
      name: EnvPool's id.
      seeds: one per environment.
      repeat: frames for which an action is held, for Atari games.
      render_mode: None or 'rgb_array'.
      **options: settings of EnvPool for this id.

    Raises:
      UserError: there is no such id or setting, a library is missing, there are several players, or
        actions cannot be held.
    """
    known = envpool.list_all_envs()
    if name not in known:
        raise UserError(
            f'There is no EnvPool environment {name!r}'
            + nearest(name, known, 'names are those of EnvPool')
        )
    origin = envpool.registration.registry.specs[name][0]
    with warnings.catch_warnings():
        # gymnasium's, about bounds that are not exact in float32.
        warnings.filterwarnings('ignore', '.*precision lowered by casting', UserWarning)
        try:
            defaults = envpool.make_spec(name).config._asdict()
        except ImportError as error:
            library = f'the library {str(error).partition(":")[0]}'
            if 'Qt' in library:
                library = 'Qt 5; on Debian, apt-get install libqt5core5a libqt5gui5'
            raise UserError(f'envpool/{name} needs {library}.') from error
        if (players := defaults['max_num_players']) > 1:
            raise UserError(f'envpool/{name} has {players} players; choose an id that has one.')
        _check_options(name, options, [key for key in defaults if key not in _RESERVED])
        if repeat > 1:
            if origin != 'envpool.atari' or 'frame_skip' in options:
                raise no_repeat(f'envpool/{name}')
            frames = defaults['max_episode_steps'] * defaults['frame_skip']
            limit = {'max_episode_steps': math.ceil(frames / repeat)}
            options = {**limit, **options, 'frame_skip': repeat}
        if render_mode and not origin.startswith(_NO_PICTURES):
            options['render_mode'] = render_mode
        env = envpool.make_gymnasium(name, num_envs=len(seeds), seed=list(seeds), **options)
        # They are made when first asked for.
        assert env.single_observation_space is not None and env.single_action_space is not None
    return env


def _check_options(name: str, options: dict[str, Any], known: list[str]) -> None:
    for key in options:
        if key not in known:
            raise UserError(f'envpool/{name} has no setting env.kwargs.{key}' + nearest(key, known))
