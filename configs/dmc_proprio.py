r"""DeepMind Control Suite from vectors: joint positions, velocities and the like.

pip install -e '.[dmc]'
dreamerv3-jax train --config=dmc_proprio --config.env.id=dmc/cheetah_run

The published scores were made with 12M parameters, an action repeat of 2 and half the train ratio,
in 500k environment frames:

dreamerv3-jax train --config=dmc_proprio:size12m --config.env.id=dmc/cheetah_run \
    --config.env.repeat=2 --config.replay.train_ratio=512 --config.run.steps=5e5

Between the tasks only env.id differs.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size1m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'dmc/walker_walk'
    config.replay.train_ratio = 1024.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
