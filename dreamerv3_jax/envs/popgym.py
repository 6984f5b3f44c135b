"""POPGym: small tasks that need memory.

`popgym/<id>`, for example `popgym/RepeatPreviousEasy` or `popgym/CountRecallHard-v0`. The mazes of
the package (Labyrinth...) are there if `mazelib` is installed.
"""

import gymnasium
from popgym import envs

from dreamerv3_jax.envs import registered

_PREFIX = 'popgym-'


def make(name: str) -> gymnasium.Env:
    """Returns the environment.

    Args:
      name: the registered id without 'popgym-' at its start.

    Raises:
      UserError: there is no such environment.
    """
    names = [entry['id'].removeprefix(_PREFIX) for entry in envs.ALL.values()]
    name = registered.find(name.removeprefix(_PREFIX), names, 'POPGym')
    return registered.make(_PREFIX + name)
