"""Layers shared by all networks: initialisers, linear, block-linear, normalisation, hidden layers.

Every hidden layer is Linear -> RMSNorm -> SiLU. Parameters are float32; products are computed in
the module's `dtype`, normalisation in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamerv3_jax.reductions import sum_of_rows
from dreamerv3_jax.types import Array

RMS_EPSILON = 1e-4


def truncated_normal(fan_in: int, scale: float = 1.0) -> nn.initializers.Initializer:
    """Weights from a normal truncated at two deviations, `1.1368 / sqrt(fan_in)` wide, times scale.

    The factor restores the deviation that truncation takes away.
    """

    def init(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
        normal = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
        return normal * (scale * 1.1368 * math.sqrt(1 / fan_in))

    return init


def rows(x: Array) -> Array:
    """[..., n] -> [N, n].

    The gradient of a product of rows is a plain product of two matrices. With more axes, XLA
    on CPU transposes an operand first and computes all that leads up to it again on the way.
    """
    return x.reshape(-1, x.shape[-1])


def along_last(vector: Array, like: Array) -> Array:
    """Broadcasts `vector` [n] against the last axis of `like` [..., n]."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """[N, m] @ [m, n] -> [N, n], or of blocks [G, N, m] @ [G, m, n] -> [G, N, n].

    The transposed kernel, by which gradients are multiplied, is computed with the result: a scan
    does so once, before its first step.
    """
    return x @ kernel


def _product_forward(x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array]]:
    kept = x.value if kernel.perturbed else None
    return x.value @ kernel.value, (kept, kernel.value.mT)


def _product_backward(
    residuals: tuple[Array | None, Array], gradient: Array
) -> tuple[Array, Array | None]:
    x, transposed = residuals
    x_gradient = gradient @ transposed
    if x is None:
        return x_gradient, None
    if gradient.shape[-1] < x.shape[-1]:  # the longer rows are the quicker ones
        return x_gradient, (gradient.mT @ x).mT
    return x_gradient, x.mT @ gradient


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Linear(nn.Module):
    """Linear layer over the concatenation of one or more inputs, which is never built.

    Attributes:
      inputs: widths of the inputs, in the order of the rows of the kernel [sum(inputs), features].
      features: width of the output.
      scale: factor on the initial weights.
      dtype: of the product.
    """

    inputs: tuple[int, ...]
    features: int
    scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameters `kernel` and `bias`."""
        inputs = sum(self.inputs)
        self.kernel = self.param(
            'kernel', truncated_normal(inputs, self.scale), (inputs, self.features)
        )
        self.bias = self.param('bias', nn.initializers.zeros, (self.features,))

    def part(self, index: int, x: Array) -> Array:
        """Contribution of input `index` [..., inputs[index]] without bias -> [..., features]."""
        start = sum(self.inputs[:index])
        kernel = self.kernel[start : start + self.inputs[index]].astype(self.dtype)
        return product(rows(x).astype(self.dtype), kernel).reshape(*x.shape[:-1], self.features)

    def sum_of_parts(self, *xs: Array) -> Array:
        """Maps inputs [..., inputs[i]] -> [..., features], still without bias."""
        assert len(xs) == len(self.inputs), (len(xs), self.inputs)
        first, *rest = (self.part(index, x) for index, x in enumerate(xs))
        return sum(rest, first)

    def __call__(self, *xs: Array) -> Array:
        """Maps inputs [..., inputs[i]] -> [..., features]."""
        x = self.sum_of_parts(*xs)
        return (rows(x) + self.bias.astype(self.dtype)[None]).reshape(x.shape)


class BlockLinear(nn.Module):
    """Block-diagonal linear layer: block g maps its slice of the input to its slice of the output.

    The kernel is [blocks, inputs / blocks, features / blocks]; its initial width follows from the
    whole input, as in the published code, not from one block's.

    Attributes:
      inputs: width of the input.
      features: width of the output.
      blocks: G.
      axis: of the blocks, see `to_blocks`.
      dtype: of the product.
    """

    inputs: int
    features: int
    blocks: int
    axis: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameters `kernel` and `bias`."""
        shape = (self.blocks, self.inputs // self.blocks, self.features // self.blocks)
        self.kernel = self.param('kernel', truncated_normal(self.inputs), shape)
        self.bias = self.param('bias', nn.initializers.zeros, (self.features,))

    def __call__(self, x: Array, shared: Array | None = None) -> Array:
        """Maps `x` [G, N, own] block by block -> [G, N, features / G]; or [N, G, ...], see `axis`.

        Args:
          x: from `to_blocks`.
          shared: [N, m], the further input that every block sees whole, so that
            `G * (own + m) == inputs`; the rows of a block's kernel are its slice of `x`, then
            `shared`.
        """
        own = x.shape[-1]
        kernel = self.kernel.astype(self.dtype)
        out = product(jnp.moveaxis(x.astype(self.dtype), self.axis, 0), kernel[:, :own])
        out = jnp.moveaxis(out, 0, self.axis)
        bias = self.bias.astype(self.dtype)
        if shared is None:
            return out + jnp.expand_dims(bias.reshape(self.blocks, -1), 1 - self.axis)
        dense = kernel[:, own:].transpose(1, 0, 2).reshape(shared.shape[-1], self.features)
        shared = product(shared.astype(self.dtype), dense) + bias[None]
        return out + to_blocks(shared, self.blocks, self.axis)


def to_blocks(x: Array, blocks: int, axis: int = 0) -> Array:
    """[N, D] -> [G, N, D / G], or [N, G, D / G] with `axis` 1.

    With the blocks first, every product and everything elementwise after it runs over contiguous
    memory, which a CPU needs; the transposition takes a copy, of which accelerators gain nothing.
    """
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, -1), 1, axis)


def from_blocks(x: Array, axis: int = 0) -> Array:
    """Inverse of `to_blocks`: [G, N, D / G], or [N, G, D / G] with `axis` 1, -> [N, D].

    A transposition would be fused with the arithmetic before it, which on CPU then runs number by
    number over strided memory; a concatenation is not.
    """
    return _side_by_side(x, len(x)) if axis == 0 else x.reshape(x.shape[0], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _side_by_side(x: Array, blocks: int) -> Array:
    """[G, N, n] -> [N, G * n]. Its gradient is one copy; by itself each block would be padded."""
    return jnp.concatenate(list(x), -1)


_side_by_side.defvjp(
    lambda x, _: (jnp.concatenate(list(x), -1), None),
    lambda blocks, _, gradient: (to_blocks(gradient, blocks),),
)


def recompute(function: Callable) -> Callable:
    """A function whose gradient computes again what is inside, except roots of norms.

    A scan then keeps the inputs and these at every step, and writes no more. Outside of scans XLA
    sees that the results are there already.
    """

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name == 'rsqrt'

    return jax.checkpoint(function, prevent_cse=False, policy=kept)


@jax.custom_jvp
def inverse_root(x: Array) -> Array:
    """One over the square root of x [...] > 0; its gradient needs the result only."""
    return jax.lax.rsqrt(x)


@inverse_root.defjvp
def _inverse_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    result = jax.lax.rsqrt(*primals)
    return result, -0.5 * result * result * result * tangents[0]


def inverse_rms(x: Array, axes: tuple[int, ...]) -> Array:
    """One over the root mean square of float32 x over `axes`, which stay with size 1."""
    square = jnp.square(x)
    if len(axes) == 1:
        total = jnp.sum(square, axes, keepdims=True)
    else:  # over blocks, which only CPUs do in two steps
        total = sum_of_rows(jnp.sum(square, axes[:-1], keepdims=True))[..., None]
    return inverse_root(total * (1 / math.prod(x.shape[axis] for axis in axes)) + RMS_EPSILON)


def rms_norm(x: Array, axes: tuple[int, ...], scale: Array, dtype: jnp.dtype) -> Array:
    """Divides x [...] by its root mean square over `axes`, in float32, and multiplies by `scale`,
    which broadcasts against it. The result has the given dtype."""
    x = x.astype(jnp.float32)
    return (x * inverse_rms(x, axes) * scale).astype(dtype)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32; a learned scale, no shift."""

    features: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameter `scale`."""
        self.scale = self.param('scale', nn.initializers.ones, (self.features,))

    def __call__(self, x: Array) -> Array:
        """Normalises [..., features]; the epsilon 1e-4 stands inside the root."""
        return rms_norm(x, (-1,), along_last(self.scale, x), self.dtype)

    def silu_over_blocks(self, x: Array, axis: int = 0) -> Array:
        """SiLU of normalised [G, N, features / G], see `to_blocks`, over all features of a row."""

        def activate(x: Array, scale: Array) -> Array:
            return nn.silu(rms_norm(x, (axis, 2), scale, self.dtype))

        scale = jnp.expand_dims(self.scale.reshape(x.shape[axis], -1), 1 - axis)
        return recompute(activate)(x, scale)


def normalised_silu(x: Array, bias: Array, scale: Array) -> Array:
    """`silu(RMSNorm(x + bias))` over the last axis, in float32 whatever the dtype of x.

    Args:
      x: [N, n], the result of a product.
      bias: [n] float32.
      scale: [n] float32.

    Returns:
      [N, n] in the dtype of x.
    """
    y = x.astype(jnp.float32) + bias[None]
    return nn.silu(rms_norm(y, (-1,), scale[None], jnp.float32)).astype(x.dtype)


class Hidden(nn.Module):
    """Hidden layer: Linear -> RMSNorm -> SiLU over one or more inputs."""

    inputs: tuple[int, ...]
    features: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the layers `linear` and `norm`."""
        self.linear = Linear(self.inputs, self.features, dtype=self.dtype)
        self.norm = RMSNorm(self.features)

    def part(self, index: int, x: Array) -> Array:
        """Contribution of input `index` to the linear layer, for one known ahead of the rest."""
        return self.linear.part(index, x)

    def activate(self, summed_parts: Array) -> Array:
        """Finishes the layer from the sum of all parts [..., features]."""
        inputs = rows(summed_parts), self.linear.bias, self.norm.scale
        x = recompute(normalised_silu)(*inputs)
        return x.reshape(summed_parts.shape)

    def __call__(self, *xs: Array) -> Array:
        """Maps inputs [..., inputs[i]] -> [..., features]."""
        return self.activate(self.linear.sum_of_parts(*xs))


class MLP(nn.Module):
    """`layers` hidden layers of `units`; the first takes one or more inputs."""

    inputs: tuple[int, ...]
    layers: int
    units: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the layers `hidden_0`, `hidden_1`, ..."""
        self.hidden = [
            Hidden(self.inputs if index == 0 else (self.units,), self.units, self.dtype)
            for index in range(self.layers)
        ]

    def __call__(self, *xs: Array) -> Array:
        """Maps inputs [..., inputs[i]] -> [..., units]."""
        for layer in self.hidden:
            xs = (layer(*xs),)
        return xs[0]
