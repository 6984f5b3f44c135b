"""World-model losses on replayed sequences (paper eq. 2 and 3)."""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax import distributions, losses, rssm
from dreamerv3_jax.actions import flatten_actions
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.networks import Networks, compute_dtype
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.transforms import two_hot_bins
from dreamerv3_jax.types import Array, Batch, Latent, Metrics, Params, StoredLatent


class WorldModelLosses(NamedTuple):
    """Result of `world_model_losses`."""

    losses: dict[str, Array]  # {name: [B, T]} unweighted
    latent: Latent  # [B, T, ...] posterior states, with gradient
    metrics: Metrics


def world_model_losses(
    networks: Networks,
    params: Params,
    batch: Batch,
    key: chex.PRNGKey | None,
    *,
    observation_specs: Mapping[str, ArraySpec],
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
) -> WorldModelLosses:
    """Infers latents of a batch; scores reconstruction, reward, continue, dynamics, representation.

    The stored latent of the context step is the initial state; the T steps after it are trained on.
    All gradients flow into the latents.

    Args:
      networks: all networks.
      params: of all networks.
      batch: [B, T + 1] steps.
      key: consumed here; None takes the most probable latents.
      observation_specs: of the observation.
      action_specs: of the action.
      config: settings.
    """
    start = rssm.restore_latent(
        StoredLatent(batch.deter, batch.stoch), config, compute_dtype(config)
    )
    previous = flatten_actions(jax.tree.map(lambda x: x[:, :-1], batch.action), action_specs)
    observation, reward, is_first, is_terminal = jax.tree.map(
        lambda x: x[:, 1:], (batch.observation, batch.reward, batch.is_first, batch.is_terminal)
    )
    tokens = networks.encoder(params['encoder'], observation)
    observed = rssm.observe(
        networks.dynamics, params['dynamics'], start, previous, tokens, is_first, key,
        unimix=config.unimix,
    )  # fmt: skip
    state = (observed.latent.deter, rssm.flat(observed.latent.stoch))

    outputs = networks.decoder(params['decoder'], *state)
    result = {
        f'reconstruction/{name}': _reconstruction_loss(outputs[name], observation[name], spec)
        for name, spec in observation_specs.items()
    }
    reward_logits = networks.reward(params['reward'], *state)
    result['reward'] = losses.two_hot_loss(reward_logits, reward, two_hot_bins(config.bins))
    continue_logit = networks.continue_(params['continue_'], *state)[..., 0]
    result['continue'] = losses.continue_loss(continue_logit, is_terminal, discount=config.discount)
    result['dynamics'], result['representation'], kl = losses.kl_losses(
        observed.log_posterior, observed.log_prior, free_nats=config.free_nats
    )
    metrics = {
        'world_model/kl': kl.mean(),
        'world_model/prior_entropy': _group_entropy(observed.log_prior),
        'world_model/posterior_entropy': _group_entropy(observed.log_posterior),
    }
    return WorldModelLosses(result, observed.latent, metrics)


def _reconstruction_loss(output: Array, target: Array, spec: ArraySpec) -> Array:
    if spec.kind == 'image':
        return losses.image_loss(output, target)
    if spec.kind == 'continuous':
        return losses.continuous_loss(output, target)
    return losses.discrete_loss(output, target, spec.classes)


def _group_entropy(log_probs: Array) -> Array:
    return jnp.sum(distributions.categorical_entropy(jax.lax.stop_gradient(log_probs)), -1).mean()
