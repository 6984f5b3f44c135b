"""ProcGen: sixteen games with unlimited levels of the hard distribution, images of 64x64 pixels.

pip install -e '.[procgen]'
apt-get install libqt5core5a libqt5gui5
dreamerv3-jax train --config=procgen --config.env.id=procgen/starpilot

The published code draws the game at 96x96 pixels instead, where EnvPool has the 64x64 of ProcGen.
Between the games only env.id differs. A smaller network, for a smaller GPU, is procgen:size12m.
"""

import ml_collections

from dreamerv3_jax.configs import base


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns the settings; see `configs/base.py` for all of them."""
    config = base.get_config(size)
    config.env.id = 'procgen/coinrun'
    config.env.kwargs.distribution = 'hard'
    config.env.image_size = 64
    config.replay.train_ratio = 64.0
    config.run.steps = 50_000_000
    return config
