"""Meta-World: fifty tasks for a robot arm.

`metaworld/<task>`, for example `metaworld/reach` or `metaworld/drawer-open`. Objects and goals are
placed anew in every episode, the goal is part of the observation, and episodes are cut after 500
steps. At the end of one, 'log/success' tells whether the task was ever solved in it.
"""

from typing import Any

import gymnasium
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from dreamerv3_jax.envs.mujoco import check_renderer, choose_renderer
from dreamerv3_jax.envs.registered import Success
from dreamerv3_jax.errors import UserError, nearest

choose_renderer()


def make(name: str, *, render_mode: str | None = None) -> gymnasium.Env:
    """Returns the environment of a task.

    Args:
      name: the task, with hyphens.
      render_mode: None or 'rgb_array'.

    Raises:
      UserError: there is no such task, or pictures are asked for and cannot be drawn.
    """
    tasks = {key.removesuffix('-v3'): task for key, task in ALL_V3_ENVIRONMENTS.items()}
    name = name.replace('_', '-').removesuffix('-v3')
    if name not in tasks:
        raise UserError(
            f'There is no Meta-World task {name!r}'
            + nearest(name, tasks, 'names are like drawer-open')
        )
    if render_mode:
        check_renderer()
    return Success(ArmTask(tasks[name], render_mode=render_mode))


class ArmTask(gymnasium.Wrapper):
    """A task whose goal is seen, and which draws its random numbers from its seed."""

    def __init__(self, task: Any, *, render_mode: str | None) -> None:
        env = task(render_mode=render_mode, camera_name='corner', width=320, height=240)
        # What the package itself does for its tasks with an observable goal, but for their seeds.
        env._partially_observable = False
        del env.sawyer_observation_space  # remembered without the goal
        env._set_task_called = True
        env._freeze_rand_vec = False  # else every episode is the same
        env.seeded_rand_vec = True  # else it asks the random numbers of the whole process
        super().__init__(env)
        self._task = env
        self.observation_space = env.sawyer_observation_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode."""
        if seed is not None:
            self._task.seed(seed)  # its reset ignores the seed
        return self.env.reset()

    def render(self) -> np.ndarray:
        """Returns the camera's picture, turned, for the camera hangs upside down."""
        return np.asarray(self.env.render())[::-1, ::-1]
