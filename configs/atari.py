"""Atari 57 in 200M frames: sticky actions, all 18 actions, gray images of 96x96 pixels.

pip install -e '.[atari]'
dreamerv3-jax train --config=atari --config.env.id=atari/breakout

The published paper describes colour images of 64x64 pixels; the published code, and this preset,
use gray ones of 96x96. The former: --config.env.kwargs.gray=false --config.env.image_size=64
Between the games only env.id differs. A smaller network, for a smaller GPU, is atari:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'atari/pong'
    config.env.kwargs.sticky = True
    config.env.kwargs.full_actions = True
    config.env.kwargs.gray = True
    config.env.image_size = 96
    config.env.repeat = 4
    config.replay.train_ratio = 32.0
    config.run.steps = 200_000_000
    return config
