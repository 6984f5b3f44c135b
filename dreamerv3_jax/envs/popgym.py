"""POPGym: small tasks that need memory.

`popgym/<id>`, for example `popgym/RepeatPreviousEasy` or `popgym/CountRecallHard-v0`. The mazes of
the package (Labyrinth...) are there if `mazelib` is installed.
"""

import gymnasium
from popgym import envs

from dreamerv3_jax.envs import registered
from dreamerv3_jax.envs.stream import ActionRepeat

_PREFIX = 'popgym-'


def make(
    name: str, *, repeat: int, image_size: int = 0, render_mode: str | None = None
) -> gymnasium.Env:
    """Returns the environment.

    Args:
      name: the registered id without 'popgym-' at its start.
      repeat: steps for which an action is held.
      image_size: of no effect; nothing here observes pictures.
      render_mode: of no effect; nothing here draws.

    Raises:
      UserError: there is no such environment.
    """
    names = [entry['id'].removeprefix(_PREFIX) for entry in envs.ALL.values()]
    name = registered.find(name.removeprefix(_PREFIX), names, 'POPGym')
    env = registered.make(_PREFIX + name)
    return ActionRepeat(env, repeat) if repeat > 1 else env
