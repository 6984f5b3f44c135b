"""A small task of our own, seen as pictures, that a CPU learns while you wait: the quickstart.

A drone has to stay in the air: its engine pushes it up or, when off, gravity pulls it down, and
gusts add to both. Every step pays 1; touching the ground or the ceiling ends the episode, and 200
steps cut it. Where the drone is, a picture of 48 x 48 shows. Random play lasts some 50 steps, one
action alone 10.
"""

from typing import Any

import gymnasium
import numpy as np

PUSH, GUST, DRAG = 0.025, 0.01, 0.9  # per step; the air reaches from -1 to 1
PIXELS, ZOOM = 48, 8


class Hover(gymnasium.Env):
    """Registered as `Hover-v0`, with a time limit.

    Observations are uint8 [48, 48, 1]; actions are 0 for down and 1 for up.
    """

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
        self._height, self._speed, self._up = self.np_random.uniform(-0.2, 0.2), 0.0, False
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves the drone for one step."""
        self._up = bool(action)
        push = PUSH if self._up else -PUSH
        self._speed = DRAG * self._speed + push + GUST * self.np_random.standard_normal()
        self._height += self._speed
        return self._observation(), 1.0, bool(abs(self._height) > 1), False, {}

    def _observation(self) -> np.ndarray:
        down, right = _distances(self._height, zoom=1)
        # Soft edges, so that the picture shows a part of a pixel.
        inside = np.clip(5 - np.abs(down), 0, 1) * (np.abs(right) < 10)
        return np.rint(40 + 200 * inside).astype(np.uint8)[..., None]

    def render(self) -> np.ndarray:
        """Returns a picture for people, uint8 [384, 384, 3]; the flame shows the engine."""
        down, right = _distances(self._height, ZOOM)
        evening = np.linspace(0, 1, PIXELS * ZOOM)[:, None, None]
        picture = np.broadcast_to(
            (1 - evening) * (18, 26, 58) + evening * (196, 112, 92), (*down.shape, 3)
        )

        def paint(colour: tuple[int, int, int], inside: np.ndarray) -> np.ndarray:
            share = np.clip(inside * ZOOM, 0, 1)[..., None]
            return (1 - share) * picture + share * np.array(colour)

        if self._up:
            picture = paint((255, 190, 60), np.minimum(2 - np.abs(right) - (down - 3) / 2.5, down))
        picture = paint((235, 238, 245), 4.5 - np.hypot(np.maximum(np.abs(right) - 5.5, 0), down))
        picture = paint((58, 74, 120), 2 - np.hypot(np.maximum(np.abs(right) - 3, 0), down + 0.8))
        return np.rint(picture).astype(np.uint8)


def _distances(height: float, zoom: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far below and right of the drone each pixel is, in pixels of the observation."""
    rows, columns = (np.mgrid[: PIXELS * zoom, : PIXELS * zoom] + 0.5) / zoom
    middle = PIXELS / 2 - np.clip(height, -1, 1) * (PIXELS / 2 - 4)
    return rows - middle, columns - PIXELS / 2
