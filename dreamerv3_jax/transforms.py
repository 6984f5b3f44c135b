"""Symlog and the two-hot coding of scalars (paper, "Robust predictions")."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax.types import Array


def symlog(x: Array) -> Array:
    """Compresses magnitudes: `sign(x) ln(1 + |x|)`, elementwise (paper eq. 9)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Inverse of `symlog`: `sign(x) (exp|x| - 1)`, elementwise (paper eq. 9)."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot_bins(num_bins: int) -> np.ndarray:
    """Returns the bin values `symexp(linspace(-20, 20, num_bins))`, [K] float32 (paper eq. 10).

    One half is computed and mirrored, so the bins are exactly symmetric with an exact 0 in the middle.

    Raises:
      ValueError: `num_bins` is even or less than 3.
    """
    if num_bins < 3 or num_bins % 2 == 0:
        raise ValueError(f'The number of bins must be odd and at least 3, not {num_bins}.')
    positive = np.expm1(np.linspace(0.0, 20.0, num_bins // 2 + 1)).astype(np.float32)
    return np.concatenate([-positive[:0:-1], positive])


def two_hot(value: Array, bins: np.ndarray) -> Array:
    """Encodes scalars as weights on the two neighbouring bins, linear in the value itself.

    Every weight is a triangle over the bin's neighbourhood, so the code is dense arithmetic: no search, no
    gather. Values beyond the ends put the whole weight on the end bin.

    Args:
      value: [...] float32.
      bins: [K] increasing.

    Returns:
      [..., K] float32 weights that sum to 1.
    """
    shape = (1,) * value.ndim + (-1,)
    infinity, gaps = np.full(1, np.inf, np.float32), np.diff(bins)
    below = np.concatenate([-infinity, bins[:-1]]).reshape(shape)
    above = np.concatenate([bins[1:], infinity]).reshape(shape)
    gap_below = np.concatenate([np.ones(1, np.float32), gaps]).reshape(shape)
    gap_above = np.concatenate([gaps, np.ones(1, np.float32)]).reshape(shape)
    value = jnp.clip(value, bins[0], bins[-1])[..., None]
    rising = (value - below) * (1 / gap_below)
    falling = (above - value) * (1 / gap_above)
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def two_hot_mean(logits: Array, bins: np.ndarray) -> Array:
    """Decodes logits to the probability-weighted mean of the bins.

    Bins are summed in pairs from both ends, so uniform probabilities give exactly 0, under jit as well.

    Args:
      logits: [..., K].
      bins: [K], symmetric.

    Returns:
      [...] float32.
    """
    chex.assert_axis_dimension(logits, -1, len(bins))
    probs = jax.nn.softmax(logits.astype(jnp.float32), -1)
    middle = len(bins) // 2
    positive = bins[middle + 1 :].reshape((1,) * (logits.ndim - 1) + (-1,))
    difference = probs[..., middle + 1 :] - probs[..., :middle][..., ::-1]
    return jnp.sum(difference * positive, -1)
