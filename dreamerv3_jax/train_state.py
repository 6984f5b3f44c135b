"""Everything that an update changes, as one tree of arrays."""

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from dreamerv3_jax.networks import Networks
from dreamerv3_jax.normalization import init_return_percentiles
from dreamerv3_jax.types import Array, Params, ReturnPercentiles


class TrainState(flax.struct.PyTreeNode):
    """Arrays only: it can be donated, sharded and written to disk as it is."""

    params: dict[str, Params]  # float32, by network
    slow_critic: Params  # float32, moving average of params['critic']
    optimizer: Any  # state of the optax transformation
    percentiles: ReturnPercentiles
    updates: Array  # [] int32, updates done
    seed: Array  # [] uint32; the key of an update is folded in from it and `updates`

    def key(self) -> chex.PRNGKey:
        """Key of the next update; it is consumed there."""
        return jax.random.fold_in(jax.random.key(self.seed), self.updates)


def init_train_state(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    observation: dict[str, Array],
    seed: Array,
) -> TrainState:
    """Fresh parameters; the slow critic starts as a copy of the critic.

    Args:
      networks: all networks.
      optimizer: of all parameters.
      observation: {name: [1, *shape]} of any values.
      seed: [] uint32.
    """
    # The initialiser's key lies apart from those of the updates, which fold in counters from 0.
    params = networks.init(jax.random.fold_in(jax.random.key(seed), 2**31), observation)
    return TrainState(
        params=params,
        slow_critic=jax.tree.map(jnp.copy, params['critic']),
        optimizer=optimizer.init(params),
        percentiles=init_return_percentiles(),
        updates=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
    )
