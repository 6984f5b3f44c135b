r"""DeepMind manipulation: a robot arm that reaches, lifts, places and stacks, from vectors.

pip install -e '.[dmc]'
dreamerv3-jax train --config=dmc_manipulation --config.env.id=manipulation/stack_2_bricks

The settings are those of dmc_proprio. From a picture, with those of dmc_vision:

dreamerv3-jax train --config=dmc_manipulation:size200m --config.env.kwargs.vision=true \
    --config.env.image_size=64 --config.replay.train_ratio=256

Between the tasks only env.id differs.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size1m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'manipulation/reach_site'
    config.env.kwargs.vision = False
    config.replay.train_ratio = 1024.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
