"""Symlog and the two-hot coding of scalars (paper, "Robust predictions")."""

import chex
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax import reductions
from dreamerv3_jax.types import Array


def symlog(x: Array) -> Array:
    """Compresses magnitudes: `sign(x) ln(1 + |x|)`, elementwise (paper eq. 9)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Inverse of `symlog`: `sign(x) (exp|x| - 1)`, elementwise (paper eq. 9)."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot_bins(num_bins: int) -> np.ndarray:
    """Returns the bin values `symexp(linspace(-20, 20, num_bins))`, [K] float32 (paper eq. 10).

    Their order is: the negative ones from the smallest magnitude up, the positive ones likewise,
    then 0. Mirrored bins so lie half an array apart, where they can be paired without reversing
    anything. One half is computed and mirrored, so the bins are exactly symmetric.

    Raises:
      ValueError: `num_bins` is even or less than 3.
    """
    if num_bins < 3 or num_bins % 2 == 0:
        raise ValueError(f'The number of bins must be odd and at least 3, not {num_bins}.')
    positive = np.expm1(np.linspace(0.0, 20.0, num_bins // 2 + 1)[1:]).astype(np.float32)
    return np.concatenate([-positive, positive, np.zeros(1, np.float32)])


def two_hot(value: Array, bins: np.ndarray) -> Array:
    """Encodes scalars as weights on the two neighbouring bins, linear in the value itself.

    Every weight is a triangle over the bin's neighbourhood, so the code is dense arithmetic: no
    search, no gather. Values beyond the ends put the whole weight on the end bin.

    Args:
      value: [...] float32.
      bins: [K] from `two_hot_bins`.

    Returns:
      [..., K] float32 weights that sum to 1.
    """
    ordered, rank = np.sort(bins), np.argsort(np.argsort(bins))
    infinity, one = np.full(1, np.inf, np.float32), np.ones(1, np.float32)
    neighbours = (
        np.concatenate([-infinity, ordered[:-1]]),  # the bin below
        np.concatenate([ordered[1:], infinity]),  # the bin above
        1 / np.concatenate([one, np.diff(ordered)]),
        1 / np.concatenate([np.diff(ordered), one]),
    )
    below, above, slope_below, slope_above = (
        x[rank].reshape((1,) * value.ndim + (-1,)) for x in neighbours
    )
    value = jnp.clip(value, ordered[0], ordered[-1])[..., None]
    triangle = jnp.minimum((value - below) * slope_below, (above - value) * slope_above)
    return jnp.clip(triangle, 0.0, 1.0)


def two_hot_mean(logits: Array, bins: np.ndarray) -> Array:
    """Decodes logits to the probability-weighted mean of the bins.

    Bins are summed in pairs from both ends, so uniform probabilities give exactly 0, under jit as
    well.

    Args:
      logits: [..., K].
      bins: [K] from `two_hot_bins`.

    Returns:
      [...] float32.

    Raises:
      ValueError: the bins are in another order.
    """
    chex.assert_axis_dimension(logits, -1, len(bins))
    half = len(bins) // 2
    positive = bins[half : 2 * half]
    if bins[-1] != 0 or not np.array_equal(bins[:half], -positive):
        raise ValueError('The bins must be in the order of two_hot_bins.')
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - reductions.max_of_rows(logits)[..., None])
    difference = weights[..., half : 2 * half] - weights[..., :half]
    positive = positive.reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.sum(difference * positive, -1) / jnp.sum(weights, -1)
