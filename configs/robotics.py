"""Gymnasium-Robotics from vectors: robot arms, hands and mazes with goals.

pip install -e '.[robotics]'
dreamerv3-jax train --config=robotics --config.env.id=robotics/FetchPickAndPlaceDense-v4

The paper has no scores for these tasks. Between them only env.id differs.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size12m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'robotics/FetchReach-v4'
    config.replay.train_ratio = 512.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
