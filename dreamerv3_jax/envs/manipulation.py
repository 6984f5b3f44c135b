"""The manipulation tasks of dm_control: a Jaco robot arm that reaches, lifts, places and stacks.

`manipulation/<task>`, for example `manipulation/reach_site` or `manipulation/stack_2_bricks`.
Observes the arm, and besides it the positions of the things, or with `vision=True` the picture of a
camera. Episodes are cut after ten seconds, which are 250 steps.
"""

import logging

import gymnasium

from dreamerv3_jax.envs import dmc, mujoco  # dmc before dm_control: chooses the renderer

# isort: split
from dm_control import manipulation

from dreamerv3_jax.errors import UserError, nearest

_CAMERA = 'front_close'  # of all tasks, and their only one
# Of the search for the arm's first pose, which then tries another one.
logging.getLogger('absl').addFilter(
    lambda record: not record.getMessage().startswith('Failed to converge after')
)


def make(
    name: str,
    *,
    repeat: int,
    image_size: int = 0,
    render_mode: str | None = None,
    vision: bool = False,
) -> gymnasium.Env:
    """Returns the environment of a task.

    Args:
      name: the task as dm_control calls it, without '_features' or '_vision' at the end.
      repeat: control steps for which an action is held.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      vision: observe a picture where the positions of the things would be.

    Raises:
      UserError: there is no such task, or pictures are asked for and cannot be drawn.
    """
    suffix = '_vision' if vision else '_features'
    tasks = [task.removesuffix(suffix) for task in manipulation.ALL if task.endswith(suffix)]
    if name not in tasks:
        kind = ' from pictures' if vision else ''
        raise UserError(f'There is no manipulation task {name!r}{kind}' + nearest(name, tasks))
    if vision or render_mode:
        mujoco.check_renderer()
    env = manipulation.load(name + suffix)
    if vision:
        picture = env.task.task_observables[_CAMERA]
        picture.height = picture.width = image_size or 64
        env.reset()  # or the specs would not know
    return dmc.ControlTask(
        env,
        env.random_state,
        repeat=repeat,
        image_size=0,
        camera=0,
        render_mode=render_mode,
    )
