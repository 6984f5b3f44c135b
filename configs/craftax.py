"""Craftax's version of Crafter from images of 64x64 pixels, in a million steps.

pip install -e '.[craftax]'
dreamerv3-jax train --config=craftax

The larger game with floors: --config.env.id=craftax/full
From numbers instead of images: --config.env.kwargs.pixels=false
A smaller network, for a smaller GPU, is craftax:size12m. The train ratio is that of Crafter.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'craftax/classic'
    config.env.kwargs.pixels = True
    config.env.image_size = 64
    config.replay.train_ratio = 512.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
