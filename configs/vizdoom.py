"""ViZDoom from images of 64x64 pixels, and health or ammunition where the scenario tells them.

pip install -e '.[vizdoom]'
dreamerv3-jax train --config=vizdoom --config.env.id=vizdoom/deadly_corridor

Where several buttons are needed at once, as in deathmatch: --config.env.kwargs.combine=true
The paper has no scores for these tasks. Between them only env.id differs. A smaller network, for a
smaller GPU, is vizdoom:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'vizdoom/basic'
    config.env.image_size = 64
    config.env.kwargs.combine = False
    config.env.repeat = 4
    config.replay.train_ratio = 256.0
    config.run.steps = 4_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
