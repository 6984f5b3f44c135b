"""Atari in 100k agent steps: no sticky actions, each game's own actions, colour, 64x64 pixels.

pip install -e '.[atari]'
dreamerv3-jax train --config=atari100k --config.env.id=atari/breakout

Between the games only env.id differs. A smaller network, for a smaller GPU, is atari100k:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'atari/pong'
    config.env.kwargs.sticky = False
    config.env.kwargs.full_actions = False
    config.env.kwargs.gray = False
    config.env.image_size = 64
    config.env.num_envs = 1
    config.env.repeat = 4
    config.replay.train_ratio = 256.0
    config.run.steps = 400_000
    config.replay.capacity = 110_000  # the whole run
    return config
