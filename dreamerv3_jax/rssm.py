"""Scans of the RSSM cell: `observe` along replayed sequences, `imagine` ahead of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax import distributions
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.nets import layers
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


def sample_latent(log_probs: Array, uniform: Array | None, dtype: jnp.dtype) -> Array:
    """Samples one-hot groups [..., S, C] with straight-through gradients.

    Args:
      log_probs: [..., S, C] float32.
      uniform: [..., S] random numbers in [0, 1); None takes the most probable classes.
      dtype: of the result.
    """
    if uniform is None:
        index = jnp.argmax(log_probs, -1)
    else:
        index = distributions.categorical_sample(uniform, log_probs)
    one_hot = jax.nn.one_hot(index, log_probs.shape[-1])
    return distributions.straight_through(one_hot, jnp.exp(log_probs)).astype(dtype)


def observe_step(
    dynamics: Network,
    params: Params,
    latent: Latent,
    action: Array,
    tokens: Array,
    is_first: Array,
    uniform: Array | None,
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
      uniform: [N, S] random numbers in [0, 1); None takes the most probable latent.
      unimix: share of the uniform distribution.

    Returns:
      The posterior latent [N, ...] and its log-probabilities [N, S, C].
    """
    deter, stoch = (_mask(jnp.logical_not(is_first), x) for x in latent)
    deter = dynamics(params, deter, flat(stoch), action, method='sequence')
    logits = flat(dynamics(params, deter, tokens, method='posterior'))
    shape = (*logits.shape[:-1], *latent.stoch.shape[-2:])

    def sample(logits: Array, uniform: Array | None) -> tuple[Array, Array]:
        log_posterior = distributions.unimix(logits.reshape(shape), unimix)
        return sample_latent(log_posterior, uniform, deter.dtype), log_posterior

    stoch, log_posterior = layers.recompute(sample)(logits, uniform)
    return Latent(deter, stoch), log_posterior


def embed_previous_action(
    dynamics: Network, params: Params, action: Array, is_first: Array
) -> Array:
    """Embeds flat previous actions [..., A] -> [..., U], zeroed where `is_first` [...]."""
    kept = jnp.where(is_first[..., None], jnp.zeros((), action.dtype), action)
    return dynamics(params, kept, method='embed_action')


def scan_with_batched_gradients(
    step: Callable[[Params, Any, Any], tuple[Any, Any]], params: Params, start: Any, inputs: Any
) -> tuple[Any, Any]:
    """Scans `step` like `jax.lax.scan`, with the gradients of its parameters taken in one batch.

    Differentiating a scan adds up the gradients of all parameters at every step: one read and one
    write of as many numbers as there are parameters, for products with as few rows as the batch.
    Here the backward scan carries states only. With the total gradient of every state in hand, the
    steps no longer depend on each other, and one step over T * N rows gives the same gradients.

    States and outputs are kept with one axis behind N, as TPUs fill the last axis of an array up to
    128 numbers.

    Args:
      step: maps parameters, a state and inputs, each [N, ...], to the next state and an output,
        each row by itself: gradients are taken of T * N rows at once.
      params: of the step.
      start: state [N, ...].
      inputs: [T, N, ...].

    Returns:
      The states after every step and the outputs, [T, N, ...].
    """
    shapes = jax.eval_shape(step, params, start, jax.tree.map(lambda x: x[0], inputs))

    def shaped(xs: Any, like: Any) -> Any:
        return jax.tree.map(lambda x, y: x.reshape(*x.shape[:-1], *y.shape[1:]), xs, like)

    def flattened(xs: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1), xs)

    def flat_step(params: Params, state: Any, inputs: Any) -> tuple[Any, Any]:
        return flattened(step(params, shaped(state, shapes[0]), inputs))

    return shaped(_scan_flat(flat_step, params, flattened(start), inputs), shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_flat(step: Callable, params: Params, start: Any, inputs: Any) -> tuple[Any, Any]:
    return _scan(step, params, start, inputs, None)


def _scan(step: Callable, params: Params, start: Any, inputs: Any, offsets: Any) -> tuple[Any, Any]:
    """Scans; `offsets` [T, N, ...], zeros that are added to the states, receive their gradients."""

    def body(state: Any, xs: tuple[Any, Any]) -> tuple[Any, tuple[Any, Any]]:
        state, output = step(params, state, xs[0])
        if xs[1] is not None:
            state = jax.tree.map(jnp.add, state, xs[1])
        return state, (state, output)

    return jax.lax.scan(body, start, (inputs, offsets))[1]


def _scan_forward(step: Callable, params: Params, start: Any, inputs: Any) -> tuple[Any, Any]:
    length = jax.tree.leaves(inputs)[0].shape[0]
    offsets = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), start)
    results, backward = jax.vjp(functools.partial(_scan, step, params), start, inputs, offsets)
    before = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs[:-1]]), start, results[0])
    return results, (backward, params, before, inputs)


def _scan_backward(step: Callable, residuals: tuple, gradients: tuple) -> tuple[Any, Any, Any]:
    backward, params, before, inputs = residuals
    start_gradient, inputs_gradient, state_gradients = backward(gradients)
    # Sequences first: they may be sharded, and only a first axis can be merged with another then.
    merge = functools.partial(jax.tree.map, lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]))
    before, inputs = merge(before), merge(inputs)
    _, batched = jax.vjp(lambda params: step(params, before, inputs), params)
    (params_gradient,) = batched(merge((state_gradients, gradients[1])))
    return params_gradient, start_gradient, inputs_gradient


_scan_flat.defvjp(_scan_forward, _scan_backward)


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
    uniform = None
    if key is not None:
        groups = dynamics.module.stoch
        uniform = jax.random.uniform(key, (length, tokens.shape[0], groups))

    def step(params: Params, latent: Latent, inputs: tuple) -> tuple[Latent, Array]:
        return observe_step(dynamics, params, latent, *inputs, unimix=unimix)

    inputs = jax.tree.map(lambda x: x.swapaxes(0, 1), (embedded_action, embedded_tokens, is_first))
    outputs = scan_with_batched_gradients(step, params, start, (*inputs, uniform))
    latent, log_posterior = jax.tree.map(lambda x: x.swapaxes(0, 1), outputs)
    log_prior = distributions.unimix(dynamics(params, latent.deter, method='prior'), unimix)
    return Observed(latent, log_posterior, log_prior)


def imagine_step(
    dynamics: Network,
    params: Params,
    latent: Latent,
    action: Array,
    uniform: Array | None,
    *,
    unimix: float,
) -> Latent:
    """One prior step: from latents [N, ...] by embedded actions [N, U]; for `uniform` see
    `observe_step`."""
    deter = dynamics(params, latent.deter, flat(latent.stoch), action, method='sequence')
    log_prior = distributions.unimix(dynamics(params, deter, method='prior'), unimix)
    return Latent(deter, sample_latent(log_prior, uniform, deter.dtype))


def imagine(
    dynamics: Network,
    params: Params,
    start: Latent,
    act: Callable[[Latent, Array], tuple[Array, Any]],
    components: int,
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
      act: maps a latent and random numbers [N, n] in [0, 1) to a flat action [N, A] and a tree
        [N, ...] to record. What it computes there runs while the latent is in the cache.
      components: n.
      length: H.
      key: consumed here; None takes the most probable latents (and gives `act` numbers of 1/2).
      unimix: share of the uniform distribution.

    Returns:
      The latents [N, H, ...] from the start on, the last latent [N, ...] after them, and the
      records [N, H, ...].
    """
    count, groups = start.stoch.shape[:2]
    if key is None:
        uniform, act_uniform = None, jnp.full((length, count, components), 0.5)
    else:  # all at once, as generators take many small operations
        numbers = jax.random.uniform(key, (length, count, groups + components))
        uniform, act_uniform = jnp.split(numbers, [groups], -1)

    def step(latent: Latent, inputs: tuple) -> tuple[Latent, tuple[Latent, Any]]:
        step_uniform, step_act_uniform = inputs
        flat_action, record = act(latent, step_act_uniform)
        embedded = dynamics(params, flat_action, method='embed_action')
        following = imagine_step(dynamics, params, latent, embedded, step_uniform, unimix=unimix)
        return following, (latent, record)

    last, outputs = jax.lax.scan(step, start, (uniform, act_uniform))
    latents, records = jax.tree.map(lambda x: x.swapaxes(0, 1), outputs)
    return latents, last, records


def open_loop(
    dynamics: Network,
    params: Params,
    start: Latent,
    action: Array,
    is_first: Array,
    key: chex.PRNGKey | None,
    *,
    unimix: float,
) -> Latent:
    """Rolls the prior ahead with given actions. Returns the latents [B, T, ...] after each.

    Args:
      dynamics: the `RSSMCell`.
      params: of the cell.
      start: [B, ...] latent before the first step.
      action: [B, T, A] flat actions taken before each step.
      is_first: [B, T] bool; latent and previous action are zeroed there.
      key: consumed here; None takes the most probable latents.
      unimix: share of the uniform distribution.
    """
    chex.assert_rank([action, is_first], [3, 2])
    embedded = embed_previous_action(dynamics, params, action, is_first)
    uniform = None
    if key is not None:
        uniform = jax.random.uniform(key, (action.shape[1], *start.stoch.shape[:-1]))

    def step(latent: Latent, inputs: tuple) -> tuple[Latent, Latent]:
        step_action, step_is_first, step_uniform = inputs
        latent = Latent(*(_mask(jnp.logical_not(step_is_first), x) for x in latent))
        latent = imagine_step(dynamics, params, latent, step_action, step_uniform, unimix=unimix)
        return latent, latent

    inputs = (embedded.swapaxes(0, 1), is_first.swapaxes(0, 1), uniform)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), jax.lax.scan(step, start, inputs)[1])
