"""Environments that are registered with gymnasium, as those of several suites are."""

import re
import warnings
from collections.abc import Collection
from typing import Any

import gymnasium

from dreamerv3_jax.errors import UserError, nearest


def find(name: str, names: Collection[str], suite: str) -> str:
    """Returns the one of `names` that is meant: the same, or the newest version where none is told.

    Args:
      name: what the user wrote.
      names: those that exist, such as 'Empty-5x5-v0'.
      suite: how messages call the suite.

    Raises:
      UserError: there is none.
    """
    if name in names:
        return name
    versions = [known for known in names if re.sub(r'-v\d+$', '', known) == name]
    if versions:
        return max(versions, key=lambda known: int(known.rpartition('-v')[2]))
    raise UserError(
        f'{suite} has no environment {name!r}'
        + nearest(name, names, f'names are like {min(names)}')
    )


def make(env_id: str, **kwargs: Any) -> gymnasium.Env:
    """Makes a registered environment with its own time limit, without checks of every step."""
    with warnings.catch_warnings():
        # Whoever names an older version means it.
        warnings.filterwarnings('ignore', '.*is out of date', DeprecationWarning)
        # What gymnasium's checker finds at every step, the conversions find too.
        return gymnasium.make(env_id, disable_env_checker=True, **kwargs)


class Success(gymnasium.Wrapper):
    """Reports at the end of an episode, as 'log/success', whether the goal was ever reached."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._reached = False

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Starts an episode."""
        self._reached = False
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Takes one step; environments tell of success as 'success' or as 'is_success'."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._reached |= bool(info.get('success', info.get('is_success', False)))
        if terminated or truncated:
            info['log/success'] = float(self._reached)
        return observation, reward, terminated, truncated, info
