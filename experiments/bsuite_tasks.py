"""Two tasks of bsuite for learning curves: one needs memory, one is seen as pixels.

pip install bsuite

memory_len: the first observation shows a bit, and the action on the last step must repeat it. In
between, the agent sees only how much time is left. A policy without memory can do no better than
chance: a mean return of 0 where the best is 1.

catch: a ball falls through 10 rows of 5 columns, and a paddle that moves left or right has to be
below it at the end. The board is shown as a picture. Random play has a mean return of -0.6, the
best is 1.
"""

from typing import Any

import bsuite
import gymnasium
import numpy as np

PIXELS = 5  # sides of a cell in the picture


class BsuiteTask(gymnasium.Env):
    """An experiment of bsuite; `pixels` shows a board with cells from 0 to 1 as a picture."""

    def __init__(self, bsuite_id: str, *, pixels: bool) -> None:
        self._env: Any = bsuite.load_from_id(bsuite_id)
        self._pixels = pixels
        shape = self._env.observation_spec().shape
        self.observation_space: gymnasium.Space = gymnasium.spaces.Box(-1, 1, shape, np.float32)
        if pixels:
            sides = (PIXELS * shape[0], PIXELS * shape[1], 1)
            self.observation_space = gymnasium.spaces.Box(0, 255, sides, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(self._env.action_spec().num_values)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._env._rng.seed(seed)
        return self._convert(self._env.reset().observation), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time_step = self._env.step(int(action))
        observation = self._convert(time_step.observation)
        return observation, float(time_step.reward), time_step.last(), False, {}

    def _convert(self, observation: np.ndarray) -> np.ndarray:
        if not self._pixels:
            return observation
        picture = np.kron(observation * 255, np.ones((PIXELS, PIXELS)))
        return picture.astype(np.uint8)[..., None]


def memory(number: int = 4) -> gymnasium.Env:
    """Returns `memory_len/<number>`; number 4 shows the bit 5 steps before it is asked for."""
    return BsuiteTask(f'memory_len/{number}', pixels=False)


def catch() -> gymnasium.Env:
    """Returns `catch/0` from pixels."""
    return BsuiteTask('catch/0', pixels=True)
