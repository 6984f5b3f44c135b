r"""Any environment of gymnasium, or your own: vectors, images, nested spaces, any actions.

dreamerv3-jax train --config=gymnasium --config.env.id=Pendulum-v1

A function of yours that returns a gymnasium environment goes by its import path:

dreamerv3-jax train --config=gymnasium \
    --config.env.id=my_package.my_module:make_env --config.env.kwargs.level=3

What may differ between environments, and nothing else: the train ratio (1024 where steps are dear,
32 where they are cheap), the number of environments, the action repeat, the number of steps and the
size (gymnasium:size12m).
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size1m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.num_envs = 4
    config.replay.train_ratio = 256.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
