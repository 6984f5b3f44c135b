"""Encoder: turns an observation into the tokens that the posterior sees (paper, "World model")."""

import itertools
from collections.abc import Mapping

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamerv3_jax.nets.convolutions import Conv
from dreamerv3_jax.nets.layers import MLP, RMSNorm
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.transforms import symlog
from dreamerv3_jax.types import Array

STAGES = (2, 3, 4, 4)  # channels of the convolutions in multiples of `depth`; each halves the sides


def flat_size(spec: ArraySpec) -> int:
    """Width of a vector observation or action as the networks see it (one-hot where discrete)."""
    return sum(spec.classes) if spec.kind == 'discrete' else spec.shape[0]


def one_hots(index: Array, classes: tuple[int, ...]) -> Array:
    """Concatenated one-hot codes of components: [..., n] int -> [..., sum(classes)] float32."""
    parts, first = [], 0
    for size, run in itertools.groupby(classes):  # at once, for a grid has hundreds of components
        count = len(list(run))
        codes = jax.nn.one_hot(index[..., first : first + count], size)
        parts.append(codes.reshape(*codes.shape[:-2], count * size))
        first += count
    return jnp.concatenate(parts, -1)


def image_keys(specs: Mapping[str, ArraySpec]) -> list[str]:
    """Names of the images, sorted."""
    return sorted(name for name, spec in specs.items() if spec.kind == 'image')


def vector_keys(specs: Mapping[str, ArraySpec]) -> list[str]:
    """Names of everything that is not an image, sorted."""
    return sorted(name for name, spec in specs.items() if spec.kind != 'image')


class Encoder(nn.Module):
    """Vectors through an MLP, images through four convolution stages; both flattened and joined.

    Attributes:
      specs: of the observation; all images share their sides.
      layers: hidden layers of the vector MLP.
      units: of these layers.
      depth: channels of the stages are 2, 3, 4 and 4 times this.
      dtype: compute dtype.
      group: images of a group on a CPU, see `Conv`.
      turn: images at a time on a CPU, see `Conv`.
    """

    specs: Mapping[str, ArraySpec]
    layers: int
    units: int
    depth: int
    dtype: jnp.dtype
    group: int = 0
    turn: int = 0

    def setup(self) -> None:
        """Creates `mlp` and the stages `conv_i`, `norm_i`, as far as the observation needs them."""
        vectors, images = vector_keys(self.specs), image_keys(self.specs)
        if vectors:
            width = sum(flat_size(self.specs[name]) for name in vectors)
            self.mlp = MLP((width,), self.layers, self.units, self.dtype)
        if images:
            channels = [sum(self.specs[name].shape[-1] for name in images)]
            channels += [self.depth * multiple for multiple in STAGES]
            self.conv = [
                Conv(*pair, self.dtype, self.group, self.turn)
                for pair in zip(channels, channels[1:], strict=False)
            ]
            self.norm = [RMSNorm(features, self.dtype) for features in channels[1:]]

    @property
    def tokens(self) -> int:
        """Width of the output."""
        width = self.units if vector_keys(self.specs) else 0
        if images := image_keys(self.specs):
            height, width_, _ = self.specs[images[0]].shape
            width += (height // 16) * (width_ // 16) * STAGES[-1] * self.depth
        return width

    def __call__(self, observation: Mapping[str, Array]) -> Array:
        """Encodes {name: [..., *shape]} -> [..., tokens]."""
        parts = []
        if vectors := vector_keys(self.specs):
            parts.append(
                self.mlp(
                    jnp.concatenate([self._vector(name, observation[name]) for name in vectors], -1)
                )
            )
        if images := image_keys(self.specs):
            chex.assert_type([observation[name] for name in images], jnp.uint8)
            image = jnp.concatenate([observation[name] for name in images], -1)
            parts.append(self._image(image))
        return jnp.concatenate(parts, -1)

    def _vector(self, name: str, value: Array) -> Array:
        spec = self.specs[name]
        return one_hots(value, spec.classes) if spec.kind == 'discrete' else symlog(value)

    def _image(self, image: Array) -> Array:
        leading = image.shape[:-3]
        x = image.reshape(-1, *image.shape[-3:]).astype(self.dtype) * (1 / 255) - 0.5
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = nn.silu(norm(conv.pooled(x)))
        return x.reshape(*leading, -1)
