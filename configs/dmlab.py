"""DMLab-30: first-person levels from images of 64x64 pixels and written instructions.

dreamerv3-jax train --config=dmlab --config.env.id=dmlab/language_execute_random_task

DeepMind Lab is no package of pip's: build it as its docs/users/build.md says. Between the levels
only env.id differs. A smaller network, for a smaller GPU, is dmlab:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'dmlab/rooms_watermaze'
    config.env.image_size = 64
    config.env.repeat = 4
    config.replay.train_ratio = 32.0
    config.run.steps = 100_000_000
    return config
