"""Minigrid and BabyAI from the classes of the cells ahead and the words of the mission.

pip install -e '.[minigrid]'
dreamerv3-jax train --config=minigrid --config.env.id=minigrid/BabyAI-GoToLocal-v0

From pictures of the cells: --config.env.kwargs.vision=true
The paper has no scores for these tasks. Between them only env.id differs.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size12m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'minigrid/DoorKey-8x8-v0'
    config.env.kwargs.vision = False
    config.replay.train_ratio = 512.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
