"""A task seen as pictures that a CPU learns within the hour, for a learning curve.

A drone has to stay in the air: its engine pushes it up or, when off, gravity pulls it down, and
gusts add to both. Every step pays 1; touching the ground or the ceiling ends the episode, 200 steps
cut it. A picture of 48 x 48 shows where the drone is but not how fast it moves. Random play lasts
48 steps on average.
"""

from typing import Any

import gymnasium
import numpy as np

STEPS = 200
PUSH, GUST, DRAG = 0.025, 0.01, 0.9  # per step; the air reaches from -1 to 1
PIXELS = 48


class Hover(gymnasium.Env):
    """Actions are 0 for down and 1 for up."""

    metadata = {'render_modes': ['rgb_array'], 'render_fps': 20}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.action_space = gymnasium.spaces.Discrete(2)
        self.observation_space = gymnasium.spaces.Box(0, 255, (PIXELS, PIXELS, 1), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts near the middle, at rest."""
        super().reset(seed=seed)
        self._height, self._speed, self._steps = self.np_random.uniform(-0.2, 0.2), 0.0, 0
        return self._picture(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves the drone for one step."""
        push = PUSH if action else -PUSH
        self._speed = DRAG * self._speed + push + GUST * self.np_random.standard_normal()
        self._height += self._speed
        self._steps += 1
        crashed = bool(abs(self._height) > 1)
        return self._picture(), 1.0, crashed, not crashed and self._steps >= STEPS, {}

    def render(self) -> np.ndarray:
        """Returns the picture as uint8 [48, 48, 3]."""
        return self._picture().repeat(3, -1)

    def _picture(self) -> np.ndarray:
        rows, columns = np.mgrid[:PIXELS, :PIXELS] + 0.5
        middle = PIXELS / 2 - np.clip(self._height, -1, 1) * (PIXELS / 2 - 4)
        # Soft edges, so that the picture shows a part of a pixel.
        inside = np.clip(5 - np.abs(rows - middle), 0, 1) * (np.abs(columns - PIXELS / 2) < 10)
        return np.rint(40 + 200 * inside).astype(np.uint8)[..., None]
