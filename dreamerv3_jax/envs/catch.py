"""Catch, a small game that comes with the package: no extra, and learned within minutes."""

from typing import Any

import gymnasium
import numpy as np

SIDE = 8  # rows and columns of the board
CELL = 24  # sides of a cell in pictures, in pixels


class Catch(gymnasium.Env):
    """A ball falls through a board, and a paddle in the last row has to be below it at the end.

    Observations are three numbers from 0 to 7: the ball's row, its column and the paddle's column.
    The actions are left, stay and right. The only reward comes at the end, after 7 steps: 1 for a
    catch and -1 for a miss, so that the agent has to find out by itself what its moves are for.
    Random play scores -0.74.

    After Mnih et al., Recurrent models of visual attention, 2014, and the `catch` of bsuite.
    """

    metadata = {'render_modes': ['rgb_array'], 'render_fps': 8}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.MultiDiscrete([SIDE, SIDE, SIDE])
        self.action_space = gymnasium.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Drops a ball in a random column, above the paddle in column 4."""
        super().reset(seed=seed)
        self._row, self._ball = 0, int(self.np_random.integers(SIDE))
        self._paddle = SIDE // 2
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves the paddle by -1, 0 or 1 column, and the ball by a row."""
        self._paddle = min(max(self._paddle + int(action) - 1, 0), SIDE - 1)
        self._row += 1
        reward, ended = 0.0, self._row == SIDE - 1
        if ended:
            reward = 1.0 if self._ball == self._paddle else -1.0
        return self._observation(), reward, ended, False, {}

    def render(self) -> np.ndarray | None:
        """Returns a picture [192, 192, 3] uint8, an orange ball above a blue paddle."""
        if self.render_mode is None:
            return None
        board = np.full((SIDE, SIDE, 3), 24, np.uint8)
        board[SIDE - 1, self._paddle] = 80, 160, 255
        board[self._row, self._ball] = 255, 160, 64
        return board.repeat(CELL, 0).repeat(CELL, 1)

    def _observation(self) -> np.ndarray:
        return np.array([self._row, self._ball, self._paddle])
