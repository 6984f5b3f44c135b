"""Minigrid and BabyAI: grid worlds seen from inside, with a mission in words.

`minigrid/<id>`, for example `minigrid/DoorKey-8x8-v0` or `minigrid/BabyAI-GoToLocal-v0`; without
the version it is the newest. Observes the 7x7 cells ahead as classes (what, colour, state), or with
`vision=True` a picture of them; the direction that the agent faces; and the mission, of which 32
words are read.
"""

import math
from typing import Any, cast

import gymnasium
import numpy as np
from minigrid.core import constants
from minigrid.envs.babyai.core import roomgrid_level

from dreamerv3_jax.envs import registered, text
from dreamerv3_jax.images import resize

# Else it prints a line for every mission that it drops while it looks for one that can be done.
roomgrid_level.print = lambda *values: None

_CLASSES = [
    len(table)
    for table in (constants.OBJECT_TO_IDX, constants.COLOR_TO_IDX, constants.STATE_TO_IDX)
]


def make(
    name: str, *, image_size: int = 0, render_mode: str | None = None, vision: bool = False
) -> gymnasium.Env:
    """Returns the environment.

    Args:
      name: the registered id; 'MiniGrid-' at its start is left out.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      vision: observe a picture of the cells ahead instead of their classes.

    Raises:
      UserError: there is no such environment.
    """
    ids = {
        env_id.removeprefix('MiniGrid-'): env_id
        for env_id in gymnasium.registry
        if env_id.startswith(('MiniGrid-', 'BabyAI-'))
    }
    name = registered.find(name.removeprefix('MiniGrid-'), ids, 'Minigrid')
    env = registered.make(ids[name], render_mode=render_mode)
    return GridView(env, image_size=(image_size or 64) if vision else 0)


class GridView(gymnasium.ObservationWrapper):
    """Observations that a network can read; `image_size` 0 observes classes."""

    def __init__(self, env: gymnasium.Env, *, image_size: int) -> None:
        super().__init__(env)
        self._world: Any = env.unwrapped
        self._image_size = image_size
        parts = cast(gymnasium.spaces.Dict, env.observation_space)
        rows, columns, _ = cast(tuple[int, ...], parts['image'].shape)
        if image_size:
            shape = (image_size, image_size, 3)
            view: gymnasium.Space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        else:
            # What all cells show first, then their colours: a network reads equal things at once.
            counts = np.repeat(_CLASSES, rows * columns).reshape(-1, rows, columns)
            view = gymnasium.spaces.MultiDiscrete(counts)
        self._tile = math.ceil(image_size / max(rows, columns))
        self.observation_space = gymnasium.spaces.Dict(
            image=view, direction=parts['direction'], mission=text.space()
        )

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Translates one observation."""
        image = observation['image']
        if self._image_size:
            image = self._world.get_frame(tile_size=self._tile, agent_pov=True)
            image = resize(image, self._image_size, self._image_size)
        else:
            image = np.moveaxis(image, -1, 0)
        return {
            'image': image,
            'direction': observation['direction'],
            'mission': text.embed(observation['mission']),
        }
