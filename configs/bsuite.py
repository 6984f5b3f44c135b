"""bsuite: small tasks that each ask for one ability, from vectors.

pip install -e '.[bsuite]'
dreamerv3-jax train --config=bsuite --config.env.id=bsuite/memory_len/10

Each task asks for its own number of episodes, 10,000 or 1,000; run.steps is enough for 10,000 of
catch, of nine steps each. Between the tasks only env.id and run.steps differ. The mnist tasks read
the data from a folder: --config.env.kwargs.mnist=<folder>. The published code keeps its usual size
here: bsuite:size200m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size1m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'bsuite/catch/0'
    config.env.kwargs.mnist = ''
    config.env.num_envs = 1
    config.replay.train_ratio = 1024.0
    config.run.steps = 100_000
    config.replay.capacity = 1_000_000  # the whole run of any task
    return config
