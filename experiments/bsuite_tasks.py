"""A task of bsuite that needs memory.

pip install bsuite

memory_len: the first observation shows a bit, and the action on the last step must repeat it. In
between, the agent sees only how much time is left. A policy without memory can do no better than
chance: a mean return of 0 where the best is 1.
"""

from typing import Any

import bsuite
import gymnasium
import numpy as np


class MemoryLength(gymnasium.Env):
    """`memory_len/<number>` of bsuite."""

    def __init__(self, number: int) -> None:
        self._env: Any = bsuite.load_from_id(f'memory_len/{number}')
        shape = self._env.observation_spec().shape
        self.observation_space = gymnasium.spaces.Box(-1, 1, shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(self._env.action_spec().num_values)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._env._rng.seed(seed)
        return self._env.reset().observation, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time_step = self._env.step(int(action))
        return time_step.observation, float(time_step.reward), time_step.last(), False, {}


def memory(number: int = 0) -> gymnasium.Env:
    """Returns the task; number 0 asks for the bit one step after it was shown, number 4 five."""
    return MemoryLength(number)
