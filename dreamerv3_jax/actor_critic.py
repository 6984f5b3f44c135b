"""Actor and critic, trained on imagination and the critic on replay too (paper eq. 5 to 7)."""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax import actions as action_lib
from dreamerv3_jax import losses, normalization, returns, rssm
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.networks import Networks
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.transforms import two_hot_bins, two_hot_mean
from dreamerv3_jax.types import Array, Batch, Latent, Metrics, Params, ReturnPercentiles

sg = jax.lax.stop_gradient


class ActorCriticLosses(NamedTuple):
    """Result of `actor_critic_losses`."""

    losses: dict[str, Array]  # actor [N, H], critic [N, H], replay_critic [B, T - 1]; unweighted
    percentiles: ReturnPercentiles  # updated
    metrics: Metrics


class Imagined(NamedTuple):
    """Trajectories from every replayed state; nothing in them carries a gradient."""

    state: tuple[Array, Array]  # ([N, H, D], [N, H, S * C]), all but the last
    actions: dict[str, Array]  # {name: [N, H, n]}
    slow_value: Array  # [N, H] float32
    last_value: Array  # [N] float32, of the online critic in the last state
    reward: Array  # [N, H + 1] float32
    continue_: Array  # [N, H + 1] float32, probabilities that contain the discount


def imagine_trajectories(
    networks: Networks,
    params: Params,
    slow_critic: Params,
    start: Latent,
    key: chex.PRNGKey | None,
    *,
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
) -> Imagined:
    """Imagines H steps from each start state [N, ...] with sampled actions; consumes the key."""
    params, slow_critic, start = sg((params, slow_critic, start))
    bins = two_hot_bins(config.bins)

    def score(latent: Latent) -> tuple[Array, Array]:
        state = (latent.deter, rssm.flat(latent.stoch))
        reward = two_hot_mean(networks.reward(params['reward'], *state), bins)
        return reward, jax.nn.sigmoid(networks.continue_(params['continue_'], *state)[..., 0])

    def value(critic: Params, latent: Latent) -> Array:
        return two_hot_mean(networks.critic(critic, latent.deter, rssm.flat(latent.stoch)), bins)

    def act(latent: Latent, uniform: Array) -> tuple[Array, tuple]:
        outputs = networks.actor(params['actor'], latent.deter, rssm.flat(latent.stoch))
        actions = action_lib.sample(action_lib.make_policy(outputs, action_specs, config), uniform)
        record = (actions, value(slow_critic, latent), *score(latent))
        return action_lib.flatten_actions(actions, action_specs), record

    latents, last, (actions, slow_value, reward, continue_) = rssm.imagine(
        networks.dynamics,
        params['dynamics'],
        start,
        act,
        action_lib.components(action_specs),
        config.imagination_length,
        key,
        unimix=config.unimix,
    )
    last_reward, last_continue = score(last)
    return Imagined(
        state=(latents.deter, rssm.flat(latents.stoch)),
        actions=actions,
        slow_value=slow_value,
        last_value=value(params['critic'], last),
        reward=jnp.concatenate([reward, last_reward[:, None]], 1),
        continue_=jnp.concatenate([continue_, last_continue[:, None]], 1),
    )


def actor_critic_losses(
    networks: Networks,
    params: Params,
    slow_critic: Params,
    percentiles: ReturnPercentiles,
    latent: Latent,
    batch: Batch,
    key: chex.PRNGKey | None,
    *,
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
) -> ActorCriticLosses:
    """Losses of actor and critic.

    Args:
      networks: all networks.
      params: of all networks.
      slow_critic: moving average of the critic's parameters.
      percentiles: of the returns so far; updated before they are used.
      latent: [B, T, ...] posterior states; the replay critic's gradient flows into them, no other.
      batch: [B, T + 1] steps that they come from.
      key: consumed here; None takes the most probable latents.
      action_specs: of the action.
      config: settings.
    """
    start = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), latent)
    imagined = imagine_trajectories(
        networks, params, slow_critic, start, key, action_specs=action_specs, config=config
    )
    bins = two_hot_bins(config.bins)
    logits = networks.critic(params['critic'], *imagined.state)
    value = jnp.concatenate([sg(two_hot_mean(logits, bins)), imagined.last_value[:, None]], 1)
    result = returns.lambda_returns(
        imagined.reward, imagined.continue_, value, lambda_=config.return_lambda
    )
    percentiles = normalization.update_return_percentiles(
        percentiles,
        result,
        low_percentile=config.return_low_percentile,
        high_percentile=config.return_high_percentile,
        rate=config.return_rate,
    )
    scale = normalization.return_scale(percentiles, limit=config.return_limit)
    advantage = (result - value[:, :-1]) / scale
    weight = returns.trajectory_weights(imagined.continue_)[:, :-1]

    policy = action_lib.make_policy(
        networks.actor(params['actor'], *imagined.state), action_specs, config
    )
    entropy = action_lib.entropy(policy)
    actor = losses.actor_loss(
        action_lib.log_prob(policy, imagined.actions), entropy, advantage, weight,
        entropy_scale=config.entropy_scale,
    )  # fmt: skip
    critic = weight * losses.critic_loss(
        logits, result, imagined.slow_value, bins, slow_scale=config.slow_critic_scale
    )
    replay_critic = _replay_critic_loss(
        networks, params, latent, batch, result[:, 0], imagined.slow_value[:, 0], config
    )
    metrics = {
        'return/mean': result.mean(),
        'return/low': percentiles.low,
        'return/high': percentiles.high,
        'return/scale': scale,
        'critic/value': value.mean(),
        'critic/slow_value': imagined.slow_value.mean(),
        'critic/replay_value': value[:, 0].mean(),
        'actor/entropy': entropy.mean(),
        'actor/advantage': advantage.mean(),
        'actor/advantage_magnitude': jnp.abs(advantage).mean(),
        'imagined/reward': imagined.reward.mean(),
        'imagined/continue': imagined.continue_.mean(),
        'imagined/weight': weight.mean(),
    }
    all_losses = {'actor': actor, 'critic': critic, 'replay_critic': replay_critic}
    return ActorCriticLosses(all_losses, percentiles, metrics)


def _replay_critic_loss(
    networks: Networks,
    params: Params,
    latent: Latent,
    batch: Batch,
    imagined_return: Array,
    slow_value: Array,
    config: AgentConfig,
) -> Array:
    """Critic loss on real rewards [B, T - 1].

    The return bootstraps from `imagined_return` [N]; `slow_value` [N] is the slow critic's of the
    same states. Steps that end an episode have weight 0.
    """
    reward, is_last, is_terminal = (
        x[:, 1:] for x in (batch.reward, batch.is_last, batch.is_terminal)
    )
    result = returns.replay_lambda_returns(
        reward,
        is_last,
        is_terminal,
        imagined_return.reshape(reward.shape),
        discount=config.discount,
        lambda_=config.return_lambda,
    )
    logits = networks.critic(params['critic'], latent.deter, rssm.flat(latent.stoch))
    loss = losses.critic_loss(
        logits[:, :-1],
        result,
        slow_value.reshape(reward.shape)[:, :-1],
        two_hot_bins(config.bins),
        slow_scale=config.slow_critic_scale,
    )
    return (1.0 - is_last[:, :-1].astype(jnp.float32)) * loss
