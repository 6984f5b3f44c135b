"""The DeepMind Control Suite.

`dmc/<domain>_<task>`, for example `dmc/walker_walk` or `dmc/ball_in_cup_catch`. Observes what the
task gives out, or with `vision=True` only the picture of a camera.
"""

from typing import Any

import gymnasium
import numpy as np

from dreamerv3_jax.envs.mujoco import check_renderer, choose_renderer
from dreamerv3_jax.errors import UserError, nearest

choose_renderer()
from dm_control import suite  # noqa: E402

_CAMERAS = {'quadruped': 2}  # the others show their task best from camera 0


def make(
    name: str,
    *,
    repeat: int,
    image_size: int = 0,
    render_mode: str | None = None,
    vision: bool = False,
    camera: int = -1,
) -> gymnasium.Env:
    """Returns the environment of a task.

    Args:
      name: domain and task, joined with '_'.
      repeat: control steps for which an action is held.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      vision: observe the picture 'image' instead of the task's vectors.
      camera: number of the camera; -1 for the usual one of the domain.

    Raises:
      UserError: there is no such task, or pictures are asked for and cannot be drawn.
    """
    # Those of lqr have no time limit, and draw their world before they can be seeded.
    tasks = {f'{x}_{task}': (x, task) for x, task in suite.ALL_TASKS if x != 'lqr'}
    if name not in tasks:
        raise UserError(
            f'There is no control task {name!r}' + nearest(name, tasks, 'names are <domain>_<task>')
        )
    if vision or render_mode:
        check_renderer()
    domain, task = tasks[name]
    env = suite.load(domain, task)
    return ControlTask(
        env,
        env.task.random,
        repeat=repeat,
        image_size=(image_size or 64) if vision else 0,
        camera=camera if camera >= 0 else _CAMERAS.get(domain, 0),
        render_mode=render_mode,
    )


class ControlTask(gymnasium.Env):
    """A task of dm_control; `image_size` 0 observes what it gives out, else only a picture."""

    metadata = {'render_modes': ['rgb_array']}

    def __init__(
        self,
        env: Any,
        random: np.random.RandomState,
        *,
        repeat: int,
        image_size: int,
        camera: int,
        render_mode: str | None,
    ) -> None:
        self.render_mode = render_mode
        self._repeat = repeat
        self._image_size = image_size
        self._camera = camera
        self._env = env
        self._random = random  # all the randomness of the task
        self.metadata = {**self.metadata, 'render_fps': 1 / self._env.control_timestep() / repeat}
        action = self._env.action_spec()
        self.action_space = gymnasium.spaces.Box(
            action.minimum, action.maximum, action.shape, action.dtype
        )
        parts: dict[str, gymnasium.Space] = {
            name: _space(spec) for name, spec in self._env.observation_spec().items()
        }
        if image_size:
            parts = {'image': _picture_space(image_size, image_size)}
        self._shapes = {name: space.shape or () for name, space in parts.items()}
        self.observation_space = gymnasium.spaces.Dict(parts)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self._random.seed(seed)
        return self._observation(self._env.reset()), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Holds the action for `repeat` control steps or until the episode ends."""
        reward = 0.0
        for _ in range(self._repeat):
            time_step = self._env.step(action)
            reward += float(time_step.reward)
            if time_step.last():
                break
        # The suite's time limits come with discount 1: life would go on.
        terminated = time_step.last() and time_step.discount == 0
        truncated = time_step.last() and not terminated
        return self._observation(time_step), reward, terminated, truncated, {}

    def render(self) -> np.ndarray:
        """Returns a picture larger than the one that is observed."""
        return self._env.physics.render(240, 320, camera_id=self._camera)

    def close(self) -> None:
        """Frees the simulation and what draws it."""
        self._env.close()

    def _observation(self, time_step: Any) -> dict[str, np.ndarray]:
        if self._image_size:
            side = self._image_size
            return {'image': self._env.physics.render(side, side, camera_id=self._camera)}
        return {
            name: np.reshape(value, self._shapes[name])
            for name, value in time_step.observation.items()
        }


def _space(spec: Any) -> gymnasium.spaces.Box:
    if spec.dtype == np.uint8:
        return _picture_space(*spec.shape[-3:-1])
    return gymnasium.spaces.Box(-np.inf, np.inf, spec.shape or (1,), np.float64)


def _picture_space(height: int, width: int) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8)
