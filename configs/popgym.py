"""POPGym: 42 small tasks that need memory.

pip install -e '.[popgym]'
dreamerv3-jax train --config=popgym --config.env.id=popgym/CountRecallEasy-v0

The paper has no scores for these tasks. Between them only env.id differs.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size12m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'popgym/RepeatPreviousEasy-v0'
    config.replay.train_ratio = 512.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
