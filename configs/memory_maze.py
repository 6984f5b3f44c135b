"""Memory Maze from images of 64x64 pixels.

pip install -e '.[memorymaze]'
dreamerv3-jax train --config=memory_maze --config.env.id=memorymaze/15x15

Between the sizes of the maze only env.id differs. A smaller network, for a smaller GPU, is
memory_maze:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'memorymaze/9x9'
    config.env.image_size = 64
    config.replay.train_ratio = 32.0
    config.run.steps = 100_000_000
    return config
