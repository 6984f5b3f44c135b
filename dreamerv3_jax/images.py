"""Resizing of images, in numpy."""

import functools
import math

import numpy as np


def resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes images with an antialiased triangle filter.

    When shrinking, the filter is as wide as two output pixels, so that thin things do not vanish
    (what Pillow calls `BILINEAR`). When growing it interpolates linearly between pixel centres.

    Args:
      images: [..., H, W, C] `uint8`, or `float32` from 0 to 255.
      height: rows of the result.
      width: columns of the result.

    Returns:
      [..., height, width, C] `uint8`, rounded to nearest.
    """
    return np.rint(_resample(_resample(images, height, -3), width, -2)).astype(np.uint8)


def _resample(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Returns `float32` values, filtered along an axis counted from the end."""
    shape = (size,) + (1,) * (-axis - 1)
    # A loop over the few inputs of each output instead of a matrix product: BLAS would start its
    # threads for it, which compete with the learner's.
    parts = (
        np.take(values, index, axis) * weight.reshape(shape)
        for index, weight in zip(*_taps(values.shape[axis], size), strict=True)
    )
    total = next(parts)
    for part in parts:
        total += part
    return total


@functools.lru_cache(64)
def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs of every output and their weights, [K, new] `int64` and `float32`."""
    scale = old / new
    reach = max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    first = np.floor(centers - reach).astype(np.int64)
    indices = first + np.arange(math.ceil(2 * reach) + 1)[:, None]
    weights = np.maximum(0.0, 1.0 - np.abs(indices + 0.5 - centers) / reach)
    weights *= (indices >= 0) & (indices < old)
    weights /= weights.sum(0)
    return indices.clip(0, old - 1), weights.astype(np.float32)
