"""Categorical and normal distributions as functions of arrays, always float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax.types import Array


def unimix(logits: Array, share: float) -> Array:
    """Log-probabilities of a categorical mixed with the uniform one (paper, "World model").

    Args:
      logits: [..., C].
      share: of the uniform distribution, 0.01 in the paper.

    Returns:
      [..., C] float32 normalised log-probabilities, at least `log(share / C)`.
    """
    logits = logits.astype(jnp.float32)
    if not share:
        return jax.nn.log_softmax(logits, -1)
    probs = jax.nn.softmax(logits, -1)
    return jnp.log((1 - share) * probs + share / logits.shape[-1])


def categorical_sample(uniform: Array, log_probs: Array) -> Array:
    """Samples class indices by inverting the cumulative distribution.

    Args:
      uniform: [...] independent numbers in [0, 1), one a sample.
      log_probs: [..., C] normalised.

    Returns:
      [...] int32 in 0..C-1.
    """
    classes = log_probs.shape[-1]
    probs = jnp.exp(log_probs)
    upto = np.triu(np.ones((classes, classes - 1), np.float32))
    cumulative = jnp.matmul(probs, upto, precision='highest')  # sum of the first i + 1 classes
    return jnp.sum((cumulative <= uniform[..., None]).astype(jnp.int32), -1)


def straight_through(one_hot: Array, probs: Array) -> Array:
    """A sample whose gradient is that of the probabilities: `sample + p - sg(p)`."""
    return one_hot + (probs - jax.lax.stop_gradient(probs))


def categorical_entropy(log_probs: Array) -> Array:
    """Entropy in nats of normalised `log_probs` [..., C] -> [...]."""
    return -jnp.sum(jnp.exp(log_probs) * log_probs, -1)


def categorical_kl(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) in nats of normalised log-probabilities [..., C] -> [...]."""
    chex.assert_equal_shape([log_p, log_q])
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def categorical_log_prob(log_probs: Array, index: Array) -> Array:
    """Log-probability of class `index` [...] under `log_probs` [..., C] -> [...]."""
    chex.assert_shape(index, log_probs.shape[:-1])
    return jnp.sum(jax.nn.one_hot(index, log_probs.shape[-1]) * log_probs, -1)


def normal_sample(uniform: Array, mean: Array, std: Array) -> Array:
    """Samples [...] from independent normals by inverting their cumulative distribution.

    Args:
      uniform: [...] independent numbers in [0, 1), one a sample.
      mean: [...].
      std: [...].
    """
    least = np.nextafter(np.float32(-1), np.float32(0))  # at -1 the inverse is infinite
    return mean + std * np.float32(np.sqrt(2)) * jax.lax.erf_inv(
        jnp.maximum(2 * uniform - 1, least)
    )


def normal_log_prob(mean: Array, std: Array, value: Array) -> Array:
    """Log-density of independent normals, elementwise [...]."""
    return -0.5 * ((value - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)


def normal_entropy(std: Array) -> Array:
    """Entropy in nats of independent normals, elementwise [...]."""
    return 0.5 * np.log(2 * np.pi * np.e) + jnp.log(std)
