"""EnvPool: its ids of many suites, all environments stepped together by threads of C++.

pip install -e '.[envpool]'
dreamerv3-jax train --config=envpool --config.env.id=envpool/LunarLander-v3

The paper has no scores for these tasks as EnvPool sets them up. Between them only env.id differs.
For images a larger network is better: envpool:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size1m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'envpool/CartPole-v1'
    config.replay.train_ratio = 256.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
