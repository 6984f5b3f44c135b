"""A drone learns from pictures to stay in the air, on a laptop's CPU. The first thing to run.

dreamerv3-jax train --config=quickstart

It plays, learns and logs to runs/quickstart-Hover-v0-cpu-seed0. The same command again goes on
where the run stopped. Watch the learned policy with

dreamerv3-jax evaluate runs/quickstart-Hover-v0-cpu-seed0 --video=hover.mp4
"""

import ml_collections

from dreamerv3_jax.configs import gymnasium


def get_config(size: str = 'cpu') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = gymnasium.get_config(size)
    config.env.id = 'Hover-v0'
    config.env.vectorization = 'sync'
    # Steps cost next to nothing here and updates all the time, so there are many for each update.
    config.replay.train_ratio = 64.0
    config.run.steps = 11_200
    config.replay.capacity = 200_000  # room to go on
    return config
