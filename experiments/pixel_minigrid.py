"""A small task from pixels: walk to the green square of an empty 5x5 MiniGrid, from a random start.

The agent sees RGB pictures of the 7x7 cells in front of it (56x56, which the library resizes to the
nearest size that its networks take) and chooses among 7 actions.

pip install minigrid
dreamerv3-jax train --config=gymnasium:micro --config.env.id=experiments.pixel_minigrid:make ...
"""

import gymnasium
from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper


def make(render_mode: str | None = None) -> gymnasium.Env:
    """Returns the environment; its observation is one uint8 image."""
    env = gymnasium.make('MiniGrid-Empty-Random-5x5-v0', render_mode=render_mode)
    return ImgObsWrapper(RGBImgPartialObsWrapper(env))
