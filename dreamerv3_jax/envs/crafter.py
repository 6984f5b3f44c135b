"""Crafter: survival in a two-dimensional world with 22 achievements.

`crafter/reward`, or `crafter/noreward` for agents without a task. At the end of an episode, `info`
reports under 'log/achievement_<name>' whether each achievement was unlocked, so that the means over
episodes are the success rates; under 'log/achievements' how many were; and under
'log/crafter_score' the Crafter score (Hafner, 2021) of all episodes since the environment was made:
exp(mean(log(1 + s))) - 1 over the success rates s in percent. With one environment, as in the
preset, it is that of the run, counted anew where a run is resumed.
"""

import collections
from typing import Any

import crafter
import gymnasium
import numpy as np

from dreamerv3_jax.errors import UserError


def make(
    name: str, *, image_size: int = 0, render_mode: str | None = None, length: int = 10000
) -> gymnasium.Env:
    """Returns the environment.

    Args:
      name: 'reward' or 'noreward'.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      length: steps after which an episode is cut.

    Raises:
      UserError: the name is another one.
    """
    if name not in ('reward', 'noreward'):
        raise UserError(f'Crafter comes as crafter/reward and crafter/noreward, not {name!r}.')
    env = Crafter(reward=name == 'reward', image_size=image_size or 64, length=length)
    env.render_mode = render_mode
    return env


class Crafter(gymnasium.Env):
    """Crafter behind gymnasium's interface; `length` 10000 is the benchmark's."""

    metadata = {'render_modes': ['rgb_array'], 'render_fps': 10}

    def __init__(self, *, reward: bool, image_size: int, length: int) -> None:
        self._options = dict(size=(image_size, image_size), reward=reward, length=length)
        self._env: Any = None
        self._episodes = 0
        self._successes = np.zeros(len(crafter.constants.achievements))
        shape = (image_size, image_size, 3)
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(crafter.constants.actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Creates a new world."""
        super().reset(seed=seed)
        if self._env is None or seed is not None:
            self._env = crafter.Env(seed=int(self.np_random.integers(2**31 - 1)), **self._options)
            self._env._world.__class__ = _ReproducibleWorld
        return self._env.reset(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one step; death terminates the episode, the time limit cuts it."""
        observation, reward, over, info = self._env.step(int(action))
        terminated = info['discount'] == 0
        logs: dict[str, Any] = {}
        if over:
            unlocked = {name: count > 0 for name, count in info['achievements'].items()}
            logs = {f'log/achievement_{name}': float(done) for name, done in unlocked.items()}
            logs['log/achievements'] = float(sum(unlocked.values()))
            self._episodes += 1
            self._successes += list(unlocked.values())
            percent = 100 * self._successes / self._episodes
            logs['log/crafter_score'] = float(np.expm1(np.log1p(percent).mean()))
        return observation, reward, terminated, bool(over and not terminated), logs

    def render(self) -> np.ndarray:
        """Returns a picture larger than the one that is observed.

        Darkness is drawn with the random numbers of the game, which has to go on as if unseen.
        """
        random = self._env._world.random
        state = random.get_state()
        picture = self._env.render((256, 256))
        random.set_state(state)
        return picture


class _OrderedSet(dict):
    """The part of `set` that Crafter uses, in order of insertion."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]


class _ReproducibleWorld(crafter.engine.World):
    """A world whose creatures appear in the same order in every process.

    Crafter keeps them in sets, whose order depends on where objects lie in memory, and draws random
    numbers to choose among them.
    """

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self._chunks: Any = collections.defaultdict(_OrderedSet)
