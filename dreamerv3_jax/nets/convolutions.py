"""Convolutions with the pooling or upsampling around them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax.nets.layers import along_last, truncated_normal
from dreamerv3_jax.types import Array

MANY_CHANNELS = 16  # fewer of them leave registers and matrix units half empty
_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def convolve(x: Array, kernel: Array) -> Array:
    """Stride 1, same padding: [N, H, W, n], [k, k, n, m] -> [N, H, W, m]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=_DIMENSIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_in_groups(x: Array, kernel: Array, group: int) -> Array:
    """`convolve` for a CPU, whose gradient reads groups of images.

    The gradient of a kernel is a convolution whose features are the N images, so that XLA gathers
    each pixel from all of them, far apart in memory. Here the features are the images of a group,
    and the groups stand on top of each other as one tall image, with rows of zeros in between.

    Args:
      x: [N, H, W, n].
      kernel: [k, k, n, m], of an odd k.
      group: number of images, which divides N.

    Returns:
      [N, H, W, m].
    """
    return convolve(x, kernel)


def _convolve_forward(x: Array, kernel: Array, group: int) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel), (x, kernel)


def _convolve_backward(
    group: int, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    _, backward = jax.vjp(lambda x: convolve(x, kernel), x)
    margin = kernel.shape[0] // 2

    def groups(x: Array) -> Array:  # [N, H, W, n] -> [N / group, group, H + margin, W, n]
        x = x.reshape(-1, group, *x.shape[1:])
        return jnp.pad(x, ((0, 0), (0, 0), (0, margin), (0, 0), (0, 0)))

    width, inputs, features = x.shape[2], x.shape[3], gradient.shape[3]
    tall_x = groups(x).transpose(4, 0, 2, 3, 1).reshape(inputs, -1, width, group)
    tall_gradient = groups(gradient).transpose(0, 2, 3, 1, 4).reshape(-1, width, group, features)
    kernel_gradient = jax.lax.conv_general_dilated(
        tall_x, tall_gradient, (1, 1), ((margin, margin),) * 2, dimension_numbers=_DIMENSIONS
    )
    return *backward(gradient), kernel_gradient.transpose(1, 2, 0, 3)


convolve_in_groups.defvjp(_convolve_forward, _convolve_backward)


class Conv(nn.Module):
    """5x5 convolution, stride 1, same padding; kernel [5, 5, inputs, features], bias [features].

    `pooled` and `upsampled` are exact, cheaper forms of the layer followed by pooling or preceded
    by upsampling; they fold the 5x5 kernel into a 3x3 one between space-to-depth forms of the
    images.

    Attributes:
      inputs: n.
      features: m.
      dtype: of the products.
      group: of `convolve_in_groups`, where it divides the number of images; 0 is `convolve`.
      turn: of `pool_in_turns`, where it divides the number of images; a multiple of the group.
    """

    inputs: int
    features: int
    dtype: jnp.dtype = jnp.float32
    group: int = 0
    turn: int = 0

    def setup(self) -> None:
        """Creates the parameters `kernel` and `bias`."""
        init = truncated_normal(25 * self.inputs)
        self.kernel = self.param('kernel', init, (5, 5, self.inputs, self.features))
        self.bias = self.param('bias', nn.initializers.zeros, (self.features,))

    def _convolve(self, x: Array, kernel: Array) -> Array:
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.group and len(x) % self.group == 0:
            return convolve_in_groups(x, kernel, self.group)
        return convolve(x, kernel)

    def _add_bias(self, x: Array) -> Array:
        return x + along_last(self.bias.astype(self.dtype), x)

    def __call__(self, x: Array) -> Array:
        """Convolves images [N, H, W, inputs] -> [N, H, W, features]."""
        return self._add_bias(self._convolve(x, self.kernel))

    def pooled(self, x: Array) -> Array:
        """`max_pool(conv(x))`: [N, H, W, inputs] -> [N, H/2, W/2, features]."""
        if self.inputs >= MANY_CHANNELS:  # the folded kernel has 1.44 times as many weights
            return max_pool(self(x))
        fold = jnp.asarray(_pool_fold())
        kernel = jnp.einsum('abio,apmx,bqny->xypqimno', self.kernel, fold, fold)
        kernel = kernel.reshape(3, 3, 4 * self.inputs, 4 * self.features)
        x = space_to_depth(x)
        if self.turn and len(x) % self.turn == 0:
            x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
            x = pool_in_turns(x, kernel, self.turn, self.group)
        else:
            x = largest(*jnp.split(self._convolve(x, kernel), 4, -1))
        return self._add_bias(x)

    def upsampled(self, x: Array) -> Array:
        """`conv(nearest_upsample(x))`: [N, H, W, inputs] -> [N, 2H, 2W, features]."""
        fold = jnp.asarray(_upsample_fold())
        kernel = jnp.einsum('abio,axd,bye->xyideo', self.kernel, fold, fold)
        kernel = kernel.reshape(3, 3, self.inputs, 4 * self.features)
        return self._add_bias(depth_to_space(self._convolve(x, kernel)))


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
    """2x2 maximum, [N, 2H, 2W, C] -> [N, H, W, C]."""
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f'Images of {x.shape[1]}x{x.shape[2]} pixels cannot be halved.')
    return largest(*(x[:, row::2, column::2] for row in range(2) for column in range(2)))


@jax.custom_vjp
def largest(*arrays: Array) -> Array:
    """Maximum of four arrays, by element, whose gradient goes in equal parts to all that are it.

    Of slices, as the gradient of a maximum over windows is a scatter. That of `jnp.maximum` would
    decide each pair by itself, with a division each. The arrays are not kept for the gradient, but
    a bit of each element.
    """
    return functools.reduce(jnp.maximum, arrays)


def _largest_forward(*arrays: Array) -> tuple[Array, Array]:
    most = largest(*arrays)
    bits = [(array == most).astype(jnp.uint8) << bit for bit, array in enumerate(arrays)]
    # Or else compilers of accelerators may keep the arrays, to find the bits again.
    return most, jax.lax.optimization_barrier(functools.reduce(jnp.bitwise_or, bits))


def _largest_backward(bits: Array, gradient: Array) -> tuple[Array, ...]:
    chosen = [bits >> bit & 1 for bit in range(4)]
    part = gradient / functools.reduce(jnp.add, chosen).astype(gradient.dtype)
    return tuple(jnp.where(is_most == 1, part, jnp.zeros((), part.dtype)) for is_most in chosen)


largest.defvjp(_largest_forward, _largest_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def pool_in_turns(x: Array, kernel: Array, turn: int, group: int) -> Array:
    """`largest` of the four parts of what `convolve_in_groups` returns, for a CPU.

    What is convolved is four times as large as its maximum. It is computed for some images at a
    time, so that caches hold it, and is never whole.

    Args:
      x: [N, H, W, n].
      kernel: [k, k, n, 4 m], of an odd k.
      turn: images at a time. It divides N, and devices divide it.
      group: of `convolve_in_groups`.

    Returns:
      [N, H, W, m].
    """
    return _pool_forward(x, kernel, turn, group)[0]


def _pool_forward(
    x: Array, kernel: Array, turn: int, group: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    turns = x.reshape(turn, -1, *x.shape[1:])  # each device takes its images in turn

    def take_turn(number: Array, results: list[Array]) -> list[Array]:
        parts = jnp.split(convolve(turns[:, number], kernel), 4, -1)
        return [
            jax.lax.dynamic_update_index_in_dim(whole, part, number, 1)
            for whole, part in zip(results, _largest_forward(*parts), strict=True)
        ]

    shape = (*turns.shape[:-1], kernel.shape[-1] // 4)
    start = [jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.uint8)]
    results = jax.lax.fori_loop(0, turns.shape[1], take_turn, start)
    most, bits = (result.reshape(-1, *shape[2:]) for result in results)
    return most, (x, kernel, bits)


def _pool_backward(
    turn: int, group: int, residuals: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel, bits = residuals
    _, backward = jax.vjp(lambda x, kernel: convolve_in_groups(x, kernel, group), x, kernel)
    return backward(jnp.concatenate(_largest_backward(bits, gradient), -1))


pool_in_turns.defvjp(_pool_forward, _pool_backward)


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
