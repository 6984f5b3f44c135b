"""DeepMind Control Suite from images of 64x64 pixels.

pip install -e '.[dmc]'
dreamerv3-jax train --config=dmc_vision --config.env.id=dmc/cheetah_run

The published scores were made with an action repeat of 2: --config.env.repeat=2. A machine without
a screen needs libegl1 or libosmesa6; MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses between them.
Between the tasks only env.id differs. A smaller network, for a smaller GPU, is dmc_vision:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'dmc/walker_walk'
    config.env.kwargs.vision = True
    config.env.image_size = 64
    config.replay.train_ratio = 256.0
    config.run.steps = 1_000_000
    config.replay.capacity = 1_000_000  # the whole run
    return config
