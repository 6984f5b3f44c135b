"""Losses as functions of arrays: predictions and targets in, one float32 loss per step out."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax import distributions
from dreamerv3_jax.reductions import log_sum_exp
from dreamerv3_jax.transforms import symlog, two_hot
from dreamerv3_jax.types import Array

sg = jax.lax.stop_gradient


def two_hot_loss(logits: Array, target: Array, bins: np.ndarray) -> Array:
    """Cross entropy of the softmax of `logits` [..., K] with two-hot `target` [...] -> [...]."""
    chex.assert_shape(target, logits.shape[:-1])
    logits = logits.astype(jnp.float32)
    return log_sum_exp(logits) - jnp.sum(two_hot(target, bins) * logits, -1)


def continue_loss(logit: Array, is_terminal: Array, *, discount: float) -> Array:
    """Binary cross entropy of `logit` [...] with soft target `(1 - is_terminal) discount` -> [...].

    The discount in the target makes the predicted probability contain it (published code).
    """
    chex.assert_equal_shape([logit, is_terminal])
    target = (1.0 - is_terminal.astype(jnp.float32)) * discount
    return -target * jax.nn.log_sigmoid(logit) - (1 - target) * jax.nn.log_sigmoid(-logit)


def continuous_loss(prediction: Array, target: Array) -> Array:
    """Squared error of `prediction` [..., n] to `symlog(target)`, summed over a vector -> [...]."""
    chex.assert_equal_shape([prediction, target])
    return jnp.sum(jnp.square(prediction - symlog(target.astype(jnp.float32))), -1)


def discrete_loss(logits: Array, target: Array, classes: tuple[int, ...]) -> Array:
    """Cross entropy of `logits` [..., sum(classes)] with int `target` [..., n], summed -> [...]."""
    chex.assert_axis_dimension(logits, -1, sum(classes))
    chex.assert_axis_dimension(target, -1, len(classes))
    total, start, first = jnp.zeros(logits.shape[:-1]), 0, 0
    for size, run in itertools.groupby(classes):  # at once, for a grid has hundreds of components
        count = len(list(run))
        part = logits[..., start : start + count * size].astype(jnp.float32)
        log_probs = jax.nn.log_softmax(part.reshape(*part.shape[:-1], count, size), -1)
        index = target[..., first : first + count]
        total -= jnp.sum(distributions.categorical_log_prob(log_probs, index), -1)
        start, first = start + count * size, first + count
    return total


def image_loss(prediction: Array, target: Array) -> Array:
    """Squared error in 0..1, summed over pixels and channels.

    Args:
      prediction: [..., H, W, C] in 0..1.
      target: [..., H, W, C] uint8.

    Returns:
      [...] float32.
    """
    chex.assert_equal_shape([prediction, target])
    chex.assert_type(target, jnp.uint8)
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32) * (1 / 255)
    return jnp.sum(jnp.square(error), (-3, -2, -1))


def kl_losses(
    log_posterior: Array, log_prior: Array, *, free_nats: float
) -> tuple[Array, Array, Array]:
    """Dynamics and representation losses with free bits (paper eq. 3).

    `dyn = max(free, KL(sg(post) || prior))`, `rep = max(free, KL(post || sg(prior)))`. The KL is
    summed over the groups before it is clipped.

    Args:
      log_posterior: [..., S, C] normalised log-probabilities.
      log_prior: [..., S, C] normalised log-probabilities.
      free_nats: below which a loss is constant.

    Returns:
      Dynamics loss [...], representation loss [...] and the unclipped KL [...], in nats.
    """
    chex.assert_equal_shape([log_posterior, log_prior])
    dynamics = jnp.sum(distributions.categorical_kl(sg(log_posterior), log_prior), -1)
    representation = jnp.sum(distributions.categorical_kl(log_posterior, sg(log_prior)), -1)
    return jnp.maximum(free_nats, dynamics), jnp.maximum(free_nats, representation), sg(dynamics)


def actor_loss(
    log_prob: Array, entropy: Array, advantage: Array, weight: Array, *, entropy_scale: float
) -> Array:
    """REINFORCE with an entropy bonus, for discrete and continuous actions alike (paper eq. 6).

    `sg(w) * -(log pi(a|s) sg(advantage) + entropy_scale * entropy)`.

    Args:
      log_prob: [N, H] of the imagined actions, summed over all action components.
      entropy: [N, H] of the policy in nats, summed over all action components.
      advantage: [N, H] normalised.
      weight: [N, H] trajectory weights.
      entropy_scale: 3e-4 in the paper.

    Returns:
      [N, H] float32.
    """
    chex.assert_rank(log_prob, 2)
    chex.assert_equal_shape([log_prob, entropy, advantage, weight])
    return sg(weight) * -(log_prob * sg(advantage) + entropy_scale * entropy)


def critic_loss(
    logits: Array, returns: Array, slow_value: Array, bins: np.ndarray, *, slow_scale: float
) -> Array:
    """Cross entropy to the returns plus the same to the slow critic's values (paper eq. 5).

    `CE(critic, sg(R)) + slow_scale * CE(critic, sg(slow value))`. Cross entropy is linear in its
    target, so both share one pass over the logits.

    Args:
      logits: [..., K].
      returns: [...].
      slow_value: [...] decoded from the slow critic.
      bins: [K].
      slow_scale: 1.0 in the paper.

    Returns:
      [...] float32.
    """
    chex.assert_equal_shape([returns, slow_value])
    chex.assert_shape(returns, logits.shape[:-1])
    logits = logits.astype(jnp.float32)
    target = two_hot(sg(returns), bins) + slow_scale * two_hot(sg(slow_value), bins)
    return (1 + slow_scale) * log_sum_exp(logits) - jnp.sum(target * logits, -1)
