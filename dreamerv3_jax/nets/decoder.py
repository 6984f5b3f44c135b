"""Decoder: reconstructs the observation from the model state (paper, "World model")."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from dreamerv3_jax.nets.convolutions import Conv
from dreamerv3_jax.nets.encoder import STAGES, flat_size, image_keys, vector_keys
from dreamerv3_jax.nets.layers import MLP, BlockLinear, Hidden, Linear, RMSNorm, to_blocks
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Array


class Decoder(nn.Module):
    """Vectors from an MLP with one output per name, images from four upsampling stages.

    Attributes:
      specs: of the observation.
      deter: D, width of the deterministic state.
      stoch: S * C, width of the flat stochastic state.
      blocks: of the block-linear projection of the deterministic state.
      layers: hidden layers of the vector MLP.
      units: of these layers.
      depth: channels of the stages are 4, 4, 3 and 2 times this.
      dtype: compute dtype.
      group: images of a group on a CPU, see `Conv`.
    """

    specs: Mapping[str, ArraySpec]
    deter: int
    stoch: int
    blocks: int
    layers: int
    units: int
    depth: int
    dtype: jnp.dtype
    group: int = 0

    def setup(self) -> None:
        """Creates `mlp`, `output_<name>` and the image layers, where the observation needs them."""
        if vectors := vector_keys(self.specs):
            self.mlp = MLP((self.deter, self.stoch), self.layers, self.units, self.dtype)
            self.output = {
                name: Linear((self.units,), flat_size(self.specs[name]), dtype=self.dtype)
                for name in vectors
            }
        if images := image_keys(self.specs):
            height, width = self.specs[images[0]].shape[:2]
            channels = [self.depth * multiple for multiple in reversed(STAGES)]
            self.map_shape = (height // 16, width // 16, channels[0])
            cells = self.map_shape[0] * self.map_shape[1] * channels[0]
            self.from_deter = BlockLinear(self.deter, cells, self.blocks, dtype=self.dtype)
            self.from_stoch_hidden = Hidden((self.stoch,), 2 * self.units, self.dtype)
            self.from_stoch = Linear((2 * self.units,), cells, dtype=self.dtype)
            self.map_norm = RMSNorm(channels[0], self.dtype)
            self.conv = [
                Conv(*pair, self.dtype, self.group)
                for pair in zip(channels, channels[1:], strict=False)
            ]
            self.norm = [RMSNorm(features, self.dtype) for features in channels[1:]]
            self.image = Conv(
                channels[-1],
                sum(self.specs[name].shape[-1] for name in images),
                self.dtype,
                self.group,
            )

    def __call__(self, deter: Array, stoch: Array) -> dict[str, Array]:
        """Predicts every part of the observation.

        Args:
          deter: [..., D].
          stoch: [..., S * C].

        Returns:
          {name: float32}: the mean of an image [..., H, W, C] in 0..1, of symlog(vector) [..., n],
            or the logits of a discrete vector [..., sum(classes)].
        """
        outputs = {}
        if vectors := vector_keys(self.specs):
            hidden = self.mlp(deter, stoch)
            outputs = {name: self.output[name](hidden).astype(jnp.float32) for name in vectors}
        if images := image_keys(self.specs):
            image, start = self._image(deter, stoch), 0
            for name in images:
                channels = self.specs[name].shape[-1]
                outputs[name] = image[..., start : start + channels]
                start += channels
        return outputs

    def _image(self, deter: Array, stoch: Array) -> Array:
        leading = deter.shape[:-1]
        height, width, channels = self.map_shape
        deter, stoch = (x.reshape(-1, x.shape[-1]) for x in (deter, stoch))
        # Each block gives a slice of the channels, so the block axis moves behind the map's sides.
        x = self.from_deter(to_blocks(deter, self.blocks))
        x = x.reshape(self.blocks, -1, height, width, channels // self.blocks)
        x = x.transpose(1, 2, 3, 0, 4).reshape(-1, height, width, channels)
        x = x + self.from_stoch(self.from_stoch_hidden(stoch)).reshape(-1, height, width, channels)
        x = nn.silu(self.map_norm(x))
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = nn.silu(norm(conv.upsampled(x)))
        x = nn.sigmoid(self.image.upsampled(x).astype(jnp.float32))
        return x.reshape(*leading, *x.shape[1:])
