"""Catch on a laptop's CPU, the first thing to run.

dreamerv3-jax train --config=quickstart

It plays, learns and logs to runs/quickstart-Catch-v0-cpu-seed0. The same command again goes on
where the run stopped. Watch what was learned with

dreamerv3-jax evaluate runs/quickstart-Catch-v0-cpu-seed0 --episodes=5 --video=catch.mp4
"""

import ml_collections

from dreamerv3_jax.configs import gymnasium


def get_config(size: str = 'cpu') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = gymnasium.get_config(size)
    config.env.id = 'Catch-v0'
    config.env.num_envs = 16
    config.env.vectorization = 'sync'
    # Steps cost next to nothing here and updates all the time, so there are many for each update.
    config.replay.train_ratio = 32.0
    config.run.steps = 32_000
    config.replay.capacity = 200_000  # room to go on
    return config
