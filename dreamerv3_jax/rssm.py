"""Scans of the RSSM cell: `observe` along replayed sequences, `imagine` ahead of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax import distributions
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.networks import Network
from dreamerv3_jax.types import Array, Latent, Params, StoredLatent


class Observed(NamedTuple):
    """Result of `observe`."""

    latent: Latent  # [B, T, ...] posterior states
    log_posterior: Array  # [B, T, S, C] float32
    log_prior: Array  # [B, T, S, C] float32


def flat(stoch: Array) -> Array:
    """[..., S, C] -> [..., S * C]."""
    return stoch.reshape(*stoch.shape[:-2], -1)


def restore_latent(stored: StoredLatent, config: AgentConfig, dtype: jnp.dtype) -> Latent:
    """Latent [..., D], [..., S, C] from its stored form; without gradient."""
    return Latent(
        stored.deter.astype(dtype), jax.nn.one_hot(stored.stoch, config.classes, dtype=dtype)
    )


def store_latent(latent: Latent) -> StoredLatent:
    """The form in which the replay keeps a latent."""
    indices = jnp.argmax(latent.stoch, -1).astype(jnp.uint8)
    return StoredLatent(latent.deter.astype(jnp.float32), indices)


def _mask(keep: Array, x: Array) -> Array:
    """Zero where `keep` [N] is false, for x [N, ...]."""
    return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def sample_latent(log_probs: Array, key: chex.PRNGKey | None, dtype: jnp.dtype) -> Array:
    """Samples one-hot groups [..., S, C] with straight-through gradients.

    Args:
      log_probs: [..., S, C] float32.
      key: consumed here; None takes the most probable classes.
      dtype: of the result.
    """
    if key is None:
        index = jnp.argmax(log_probs, -1)
    else:
        index = distributions.categorical_sample(key, log_probs)
    one_hot = jax.nn.one_hot(index, log_probs.shape[-1])
    return distributions.straight_through(one_hot, jnp.exp(log_probs)).astype(dtype)


def observe_step(
    dynamics: Network,
    params: Params,
    latent: Latent,
    action: Array,
    tokens: Array,
    is_first: Array,
    key: chex.PRNGKey | None,
    *,
    unimix: float,
) -> tuple[Latent, Array]:
    """One posterior step.

    Args:
      dynamics: the `RSSMCell`.
      params: of the cell.
      latent: [N, ...] before the step.
      action: [N, U] embedding of the previous action, of a zero action where `is_first`.
      tokens: [N, U] embedding of the tokens.
      is_first: [N] bool, where the latent is reset to zeros.
      key: consumed here; None takes the most probable latent.
      unimix: share of the uniform distribution.

    Returns:
      The posterior latent [N, ...] and its log-probabilities [N, S, C].
    """
    deter, stoch = (_mask(~is_first, x) for x in latent)
    deter = dynamics(params, deter, flat(stoch), action, method='sequence')
    logits = dynamics(params, deter, tokens, method='posterior')
    log_posterior = distributions.unimix(logits, unimix)
    return Latent(deter, sample_latent(log_posterior, key, deter.dtype)), log_posterior


def embed_previous_action(
    dynamics: Network, params: Params, action: Array, is_first: Array
) -> Array:
    """Embeds flat previous actions [..., A] -> [..., U], zeroed where `is_first` [...]."""
    kept = jnp.where(is_first[..., None], jnp.zeros((), action.dtype), action)
    return dynamics(params, kept, method='embed_action')


def observe(
    dynamics: Network,
    params: Params,
    start: Latent,
    action: Array,
    tokens: Array,
    is_first: Array,
    key: chex.PRNGKey | None,
    *,
    unimix: float,
) -> Observed:
    """Runs the posterior along sequences. Only the recurrence itself is inside the scan.

    Args:
      dynamics: the `RSSMCell`.
      params: of the cell.
      start: [B, ...] latent before the first step.
      action: [B, T, A] flat actions taken before each step.
      tokens: [B, T, tokens] of each step's observation.
      is_first: [B, T] bool; latent and previous action are zeroed there.
      key: consumed here; None takes the most probable latents.
      unimix: share of the uniform distribution.
    """
    chex.assert_rank([action, tokens, is_first], [3, 3, 2])
    length = tokens.shape[1]
    embedded_action = embed_previous_action(dynamics, params, action, is_first)
    embedded_tokens = dynamics(params, tokens, method='embed_tokens')
    keys = None if key is None else jax.random.split(key, length)

    def step(latent: Latent, inputs: tuple) -> tuple[Latent, tuple[Latent, Array]]:
        latent, log_posterior = observe_step(dynamics, params, latent, *inputs, unimix=unimix)
        return latent, (latent, log_posterior)

    inputs = jax.tree.map(lambda x: x.swapaxes(0, 1), (embedded_action, embedded_tokens, is_first))
    _, outputs = jax.lax.scan(step, start, (*inputs, keys))
    latent, log_posterior = jax.tree.map(lambda x: x.swapaxes(0, 1), outputs)
    log_prior = distributions.unimix(dynamics(params, latent.deter, method='prior'), unimix)
    return Observed(latent, log_posterior, log_prior)


def imagine(
    dynamics: Network,
    params: Params,
    start: Latent,
    act: Callable[[Latent, chex.PRNGKey], tuple[Array, Any]],
    length: int,
    key: chex.PRNGKey | None,
    *,
    unimix: float,
) -> tuple[Latent, Latent, Any]:
    """Rolls the prior ahead with actions of the policy.

    Args:
      dynamics: the `RSSMCell`.
      params: of the cell.
      start: [N, ...] latents, one trajectory from each.
      act: maps a latent and a key to a flat action [N, A] and a tree to record for this step. What
        it computes there runs while the latent is in the cache.
      length: H.
      key: consumed here; None takes the most probable latents (and gives `act` a fixed key).
      unimix: share of the uniform distribution.

    Returns:
      The latents [H, N, ...] from the start on, the last latent [N, ...] after them, and the
      records [H, ...].
    """
    keys = jax.random.split(jax.random.key(0) if key is None else key, (length, 2))

    def step(latent: Latent, step_keys: chex.PRNGKey) -> tuple[Latent, tuple[Latent, Any]]:
        flat_action, record = act(latent, step_keys[0])
        embedded = dynamics(params, flat_action, method='embed_action')
        deter = dynamics(params, latent.deter, flat(latent.stoch), embedded, method='sequence')
        log_prior = distributions.unimix(dynamics(params, deter, method='prior'), unimix)
        stoch = sample_latent(log_prior, None if key is None else step_keys[1], deter.dtype)
        return Latent(deter, stoch), (latent, record)

    last, (latents, records) = jax.lax.scan(step, start, keys)
    return latents, last, records
