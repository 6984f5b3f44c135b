"""Crafter with rewards, from images of 64x64 pixels.

pip install -e '.[crafter]'
dreamerv3-jax train --config=crafter

Without rewards, for exploration: --config.env.id=crafter/noreward
A smaller network, for a smaller GPU, is crafter:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'crafter/reward'
    config.env.image_size = 64
    config.env.num_envs = 1
    config.replay.train_ratio = 512.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
