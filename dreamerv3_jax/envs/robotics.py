"""Gymnasium-Robotics: robot arms, hands and mazes with goals.

`robotics/<id>`, for example `robotics/FetchReach-v4` or `robotics/AntMaze_UMaze`; without the
version it is the newest. Observes 'observation', 'achieved_goal' and 'desired_goal' where there are
goals. At the end of an episode 'log/success' tells whether the goal was ever reached, and in the
kitchen 'log/tasks' how many tasks were completed. Fetch and Hand have older versions that need a
package which is no longer maintained.
"""

import contextlib
import io
from typing import Any

import gymnasium

from dreamerv3_jax.envs import registered
from dreamerv3_jax.envs.mujoco import check_renderer, choose_renderer

with contextlib.redirect_stderr(io.StringIO()):  # news about its versions, in every process
    import gymnasium_robotics

gymnasium.register_envs(gymnasium_robotics)
choose_renderer()


def make(name: str, *, render_mode: str | None = None) -> gymnasium.Env:
    """Returns the environment.

    Args:
      name: the registered id.
      render_mode: None or 'rgb_array'.

    Raises:
      UserError: there is no such environment, or pictures are asked for and cannot be drawn.
    """
    names = [
        env_id
        for env_id, spec in gymnasium.registry.items()
        if str(spec.entry_point).startswith('gymnasium_robotics.')
    ]
    name = registered.find(name, names, 'Gymnasium-Robotics')
    if render_mode:
        check_renderer()
    env = registered.make(name, render_mode=render_mode)
    return Kitchen(env) if name.startswith('FrankaKitchen') else registered.Success(env)


class Kitchen(gymnasium.Wrapper):
    """Reports at the end of an episode how many of the tasks were completed."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Takes one step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info['log/tasks'] = float(len(info['episode_task_completions']))
        return observation, reward, terminated, truncated, info
