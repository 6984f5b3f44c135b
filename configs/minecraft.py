"""Minecraft diamond: twelve milestones from bare hands to a diamond, from images and inventory.

dreamerv3-jax train --config=minecraft

MineRL must be installed first: Java 8 and minerl==0.4.4. Without a screen, put `xvfb-run -a` before
the command. A smaller network, for a smaller GPU, is minecraft:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'minecraft/diamond'
    config.env.kwargs.break_speed = 100.0
    config.env.kwargs.length = 36_000
    config.env.image_size = 64
    config.env.num_envs = 64
    config.replay.train_ratio = 32.0
    config.run.steps = 100_000_000
    return config
