"""One whole update of pure functions: all losses, one backward pass, optimiser, slow critic."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dreamerv3_jax import rssm
from dreamerv3_jax.actor_critic import actor_critic_losses
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.networks import Networks
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.train_state import TrainState
from dreamerv3_jax.types import Array, Batch, Metrics, Params, ReturnPercentiles, StoredLatent
from dreamerv3_jax.world_model import world_model_losses


def loss_scales(
    observation_specs: Mapping[str, ArraySpec], config: AgentConfig
) -> dict[str, float]:
    """Weight of every loss by name."""
    return {
        **{f'reconstruction/{name}': config.reconstruction_scale for name in observation_specs},
        'reward': config.reward_scale,
        'continue': config.continue_scale,
        'dynamics': config.dynamics_scale,
        'representation': config.representation_scale,
        'actor': config.actor_scale,
        'critic': config.critic_scale,
        'replay_critic': config.replay_critic_scale,
    }


def total_loss(
    params: Params,
    slow_critic: Params,
    percentiles: ReturnPercentiles,
    batch: Batch,
    key: jax.Array | None,
    *,
    networks: Networks,
    observation_specs: Mapping[str, ArraySpec],
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
) -> tuple[Array, tuple[dict[str, Array], StoredLatent, ReturnPercentiles, Metrics]]:
    """The weighted sum of all losses.

    Args:
      params: of all networks.
      slow_critic: moving average of the critic's parameters.
      percentiles: of the returns so far.
      batch: [B, T + 1] steps.
      key: consumed here; None takes the most probable latents.
      networks: all networks.
      observation_specs: of the observation.
      action_specs: of the action.
      config: settings.

    Returns:
      The loss [] float32, and as auxiliary results the unreduced losses by name, the new latents
      [B, T, ...], the new percentiles and the metrics.
    """
    model_key, behaviour_key = (None, None) if key is None else jax.random.split(key)
    model = world_model_losses(
        networks, params, batch, model_key,
        observation_specs=observation_specs, action_specs=action_specs, config=config,
    )  # fmt: skip
    behaviour = actor_critic_losses(
        networks, params, slow_critic, percentiles, model.latent, batch, behaviour_key,
        action_specs=action_specs, config=config,
    )  # fmt: skip
    losses = model.losses | behaviour.losses
    scales = loss_scales(observation_specs, config)
    assert losses.keys() == scales.keys(), (sorted(losses), sorted(scales))
    means = {name: loss.mean() for name, loss in losses.items()}
    total = jnp.sum(jnp.stack([scales[name] * mean for name, mean in means.items()]))
    metrics = (
        {f'loss/{name}': mean for name, mean in means.items()} | model.metrics | behaviour.metrics
    )
    stored = jax.lax.stop_gradient(rssm.store_latent(model.latent))
    return total, (losses, stored, behaviour.percentiles, metrics)


def update(
    compute_gradients: Callable[..., Any],
    apply_gradients: Callable[..., Any],
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StoredLatent, Metrics]:
    """One update of everything; of nothing where the loss or its gradient is not finite.

    Args:
      compute_gradients: the function below with all but state and batch; may be compiled.
      apply_gradients: the function below with optimiser and settings; may be compiled.
      state: before the update.
      batch: [B, T + 1] steps.

    Returns:
      The new state, the latents [B, T, ...] to write back to the replay, and metrics
      {name: [] float32}. Where 'optimizer/skipped' is 1, only the count of updates is new in the
      state, and the latents are worth nothing.
    """
    grads, percentiles, stored, metrics = compute_gradients(state, batch)
    state, measured = apply_gradients(state, grads, percentiles, metrics['loss/total'])
    return state, stored, metrics | measured


def compute_gradients(
    state: TrainState,
    batch: Batch,
    *,
    networks: Networks,
    observation_specs: Mapping[str, ArraySpec],
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
    whole: Callable[[Any], Any],
    split: Callable[[Any], Any],
) -> tuple[dict[str, Params], ReturnPercentiles, StoredLatent, Metrics]:
    """Gradients of all losses, in one backward pass.

    Args:
      state: before the update.
      batch: [B, T + 1] steps.
      networks: all networks.
      observation_specs: of the observation.
      action_specs: of the action.
      config: settings.
      whole: repeats parameters that are split over devices on each of them, see `sharding`.
      split: splits gradients as the parameters are.

    Returns:
      Gradients like the parameters, the new percentiles, the new latents [B, T, ...] and the
      metrics.
    """
    gradient = jax.value_and_grad(total_loss, has_aux=True)
    (total, (_, stored, percentiles, metrics)), grads = gradient(
        whole(state.params), whole(state.slow_critic), state.percentiles, batch, state.key(),
        networks=networks, observation_specs=observation_specs, action_specs=action_specs,
        config=config,
    )  # fmt: skip
    return split(grads), percentiles, stored, metrics | {'loss/total': total}


def apply_gradients(
    state: TrainState,
    grads: dict[str, Params],
    percentiles: ReturnPercentiles,
    total: Array,
    *,
    optimizer: optax.GradientTransformation,
    config: AgentConfig,
) -> tuple[TrainState, Metrics]:
    """Moves parameters and slow critic; only the count where something is not finite.

    Args:
      state: before the update.
      grads: like the parameters.
      percentiles: the new ones.
      total: [] the loss.
      optimizer: of all parameters.
      config: settings.

    Returns:
      The new state and what was measured of the optimiser.
    """
    with jax.named_scope('optimizer'):
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = config.slow_critic_rate
        slow_critic = jax.tree.map(
            lambda slow, new: slow + rate * (new - slow), state.slow_critic, params['critic']
        )
    gradient_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(gradient_norm)
    metrics = {
        'optimizer/skipped': 1.0 - finite,
        'optimizer/gradient_norm': gradient_norm,
        'optimizer/update_norm': optax.tree.norm(updates),
        'optimizer/parameter_norm': optax.tree.norm(params),
    }
    updated = state.replace(
        params=params,
        slow_critic=slow_critic,
        optimizer=optimizer_state,
        percentiles=percentiles,
    )
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return state.replace(updates=state.updates + 1), metrics
