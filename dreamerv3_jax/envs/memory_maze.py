"""Memory Maze: coloured balls to find again and again in a maze.

`memorymaze/9x9`, `11x11`, `13x13` or `15x15`. The border of the picture has the colour of the ball
to go to. Episodes are cut after 1000, 2000, 3000 and 4000 steps.
"""

import importlib
import logging
import os
import sys
import types
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs import registration

from dreamerv3_jax.envs.mujoco import check_renderer, choose_renderer
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.images import resize

choose_renderer()
from dm_control.locomotion.props import target_sphere  # noqa: E402  # before the maze chooses

_SIZES = ('9x9', '11x11', '13x13', '15x15')
_LEAST_SIDE = 64  # pixels; smaller pictures are all border


def _import_tasks() -> Any:
    """Imports the package, which wants to register itself with gymnasium's predecessor `gym`."""
    stand_ins = {
        'gym': gymnasium,
        'gym.spaces': gymnasium.spaces,
        'gym.envs': gymnasium.envs,
        'gym.envs.registration': registration,
    }
    before = {name: sys.modules.get(name) for name in stand_ins}
    renderer = os.environ.get('MUJOCO_GL')
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module('memory_maze.tasks')
    finally:  # nobody else is to find them under these names
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        if renderer is None:
            os.environ.pop('MUJOCO_GL', None)


class _Ball(target_sphere.TargetSphere):
    """The same, but the search for who touches it, 50 times a step, is left out where nobody does.

    It is a loop in Python over all contacts, which took two thirds of the time.
    """

    def _update_activation(self, physics: Any) -> None:
        if (physics.data.contact.geom == self._geom_id).any():
            super()._update_activation(physics)


_tasks = _import_tasks()
_maze: Any = sys.modules['memory_maze.maze']
_maze.target_sphere = types.SimpleNamespace(TargetSphere=_Ball)
# A warning in every episode that says nothing: the balls to find do not move.
logging.getLogger('absl').addFilter(
    lambda record: 'Cannot set velocity on Entity' not in record.getMessage()
)


def make(name: str, *, image_size: int = 0, render_mode: str | None = None) -> gymnasium.Env:
    """Returns the environment.

    Args:
      name: size of the maze.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.

    Raises:
      UserError: there is no such size, or pictures cannot be drawn.
    """
    if name not in _SIZES:
        raise UserError(f'A maze is one of {", ".join(_SIZES)}, not {name!r}.')
    check_renderer()
    env: gymnasium.Env = Maze(name, image_size=image_size or 64)
    env.render_mode = render_mode
    return env


class Maze(gymnasium.Env):
    """A maze behind gymnasium's interface."""

    metadata = {'render_modes': ['rgb_array'], 'render_fps': 4}

    def __init__(self, size: str, *, image_size: int) -> None:
        self._create = getattr(_tasks, f'memory_maze_{size}')
        self._image_size = image_size
        self._env: Any = None
        self._picture = np.zeros((image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Box(0, 255, self._picture.shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(6)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Builds a new maze."""
        super().reset(seed=seed)
        if self._env is None or seed is not None:
            self.close()
            self._env = self._create(
                image_only_obs=True,
                camera_resolution=max(_LEAST_SIDE, self._image_size),
                seed=int(self.np_random.integers(2**31 - 1)),
            )
        self._look(self._env.reset())
        return self._picture, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one step; there is no end but the time limit."""
        time_step = self._env.step(int(action))
        self._look(time_step)
        terminated = time_step.last() and time_step.discount == 0
        truncated = time_step.last() and not terminated
        return self._picture, float(time_step.reward), terminated, truncated, {}

    def _look(self, time_step: Any) -> None:
        self._picture = time_step.observation
        if len(self._picture) != self._image_size:
            self._picture = resize(self._picture, self._image_size, self._image_size)

    def render(self) -> np.ndarray:
        """Returns the picture that is observed."""
        return self._picture

    def close(self) -> None:
        """Frees the simulation and what draws it."""
        if self._env is not None:
            self._env.close()
            self._env = None
