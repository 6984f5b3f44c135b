"""Convolutions with the pooling or upsampling around them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax.nets.layers import along_last, truncated_normal
from dreamerv3_jax.types import Array

MANY_CHANNELS = 16  # fewer of them leave registers and matrix units half empty


def convolve(x: Array, kernel: Array) -> Array:
    """Stride 1, same padding: [N, H, W, n], [k, k, n, m] -> [N, H, W, m]."""
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=dimensions)


class Conv(nn.Module):
    """5x5 convolution, stride 1, same padding; kernel [5, 5, inputs, features], bias [features].

    `pooled` and `upsampled` are exact, cheaper forms of the layer followed by pooling or preceded
    by upsampling; they fold the 5x5 kernel into a 3x3 one between space-to-depth forms of the
    images.
    """

    inputs: int
    features: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameters `kernel` and `bias`."""
        init = truncated_normal(25 * self.inputs)
        self.kernel = self.param('kernel', init, (5, 5, self.inputs, self.features))
        self.bias = self.param('bias', nn.initializers.zeros, (self.features,))

    def _add_bias(self, x: Array) -> Array:
        return x + along_last(self.bias.astype(self.dtype), x)

    def __call__(self, x: Array) -> Array:
        """Convolves images [N, H, W, inputs] -> [N, H, W, features]."""
        return self._add_bias(convolve(x.astype(self.dtype), self.kernel.astype(self.dtype)))

    def pooled(self, x: Array) -> Array:
        """`max_pool(conv(x))`: [N, H, W, inputs] -> [N, H/2, W/2, features]."""
        if self.inputs >= MANY_CHANNELS:  # the folded kernel has 1.44 times as many weights
            return max_pool(self(x))
        fold = jnp.asarray(_pool_fold())
        kernel = jnp.einsum('abio,apmx,bqny->xypqimno', self.kernel, fold, fold)
        kernel = kernel.reshape(3, 3, 4 * self.inputs, 4 * self.features)
        x = convolve(space_to_depth(x.astype(self.dtype)), kernel.astype(self.dtype))
        return self._add_bias(_max_of_four(jnp.split(x, 4, -1)))

    def upsampled(self, x: Array) -> Array:
        """`conv(nearest_upsample(x))`: [N, H, W, inputs] -> [N, 2H, 2W, features]."""
        fold = jnp.asarray(_upsample_fold())
        kernel = jnp.einsum('abio,axd,bye->xyideo', self.kernel, fold, fold)
        kernel = kernel.reshape(3, 3, self.inputs, 4 * self.features)
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        return self._add_bias(depth_to_space(x))


def space_to_depth(x: Array) -> Array:
    """[N, 2H, 2W, C] -> [N, H, W, 4 C]; channels ordered by row phase, column phase, channel."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // 2, w // 2, 4 * c)


def depth_to_space(x: Array) -> Array:
    """Inverse of `space_to_depth`: [N, H, W, 4 C] -> [N, 2H, 2W, C]."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, 2 * h, 2 * w, c // 4)


def max_pool(x: Array) -> Array:
    """2x2 maximum, [N, 2H, 2W, C] -> [N, H, W, C]: slices, on CPU much faster than a window."""
    return _max_of_four([x[:, row::2, column::2] for row in range(2) for column in range(2)])


def _max_of_four(xs: list[Array]) -> Array:
    return jnp.maximum(jnp.maximum(xs[0], xs[1]), jnp.maximum(xs[2], xs[3]))


def _upsample_fold() -> np.ndarray:
    """[5, 3, 2]: row a of a 5-tap kernel at output phase d reads row `(d + a - 2) // 2 + 1`."""
    fold = np.zeros((5, 3, 2), np.float32)
    for a in range(5):
        for d in range(2):
            fold[a, (d + a - 2) // 2 + 1, d] = 1
    return fold


def _pool_fold() -> np.ndarray:
    """[5, 2, 2, 3]: row a at output phase m reads phase p of row x of the space-to-depth image."""
    fold = np.zeros((5, 2, 2, 3), np.float32)
    for a in range(5):
        for m in range(2):
            fold[a, (m + a - 2) % 2, m, (m + a - 2) // 2 + 1] = 1
    return fold
