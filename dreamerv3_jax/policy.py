"""The acting agent: one posterior step and an action for every environment."""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax import actions as action_lib
from dreamerv3_jax import rssm
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.networks import Networks
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Array, Params, PolicyState, StoredLatent

NETWORKS = ('encoder', 'dynamics', 'actor')  # that acting needs


def act(
    networks: Networks,
    params: Params,
    state: PolicyState,
    observation: Mapping[str, Array],
    is_first: Array,
    key: chex.PRNGKey,
    *,
    mode: bool,
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
) -> tuple[PolicyState, dict[str, Array], StoredLatent]:
    """Updates the latent with an observation and chooses an action.

    Args:
      networks: all networks.
      params: of `NETWORKS` at least.
      state: [N, ...] after the observation before.
      observation: {name: [N, *shape]}.
      is_first: [N] bool; the state is reset there.
      key: consumed here.
      mode: takes the most probable action, not a sample (the latent is sampled in any case).
      action_specs: of the action.
      config: settings.

    Returns:
      The new state, the actions {name: [N, n]} (continuous ones not clipped) and the latent to
      store.
    """
    count, groups = state.latent.stoch.shape[:2]
    numbers = jax.random.uniform(key, (count, groups + action_lib.components(action_specs)))
    latent_uniform, action_uniform = jnp.split(numbers, [groups], -1)
    previous = action_lib.flatten_actions(state.action, action_specs)
    dynamics, dynamics_params = networks.dynamics, params['dynamics']
    tokens = networks.encoder(params['encoder'], observation)
    latent, _ = rssm.observe_step(
        dynamics,
        dynamics_params,
        state.latent,
        rssm.embed_previous_action(dynamics, dynamics_params, previous, is_first),
        dynamics(dynamics_params, tokens, method='embed_tokens'),
        is_first,
        latent_uniform,
        unimix=config.unimix,
    )
    outputs = networks.actor(params['actor'], latent.deter, rssm.flat(latent.stoch))
    distribution = action_lib.make_policy(outputs, action_specs, config)
    if mode:
        actions = action_lib.mode(distribution)
    else:
        actions = action_lib.sample(distribution, action_uniform)
    return PolicyState(latent, actions), actions, rssm.store_latent(latent)
