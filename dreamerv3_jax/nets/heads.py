"""Heads: reward, continue, actor and critic (paper, "World model", "Actor", "Critic")."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from dreamerv3_jax.nets.encoder import flat_size
from dreamerv3_jax.nets.layers import MLP, Linear
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Array


class Head(nn.Module):
    """MLP on (deter, stoch) with one linear output, for reward, continue and critic.

    Attributes:
      inputs: (D, S * C).
      layers: hidden layers.
      units: of these layers.
      outputs: width of the output.
      output_scale: factor on the output layer's initial weights; 0 makes the first predictions
        exactly 0.
      dtype: compute dtype.
    """

    inputs: tuple[int, int]
    layers: int
    units: int
    outputs: int
    output_scale: float
    dtype: jnp.dtype

    def setup(self) -> None:
        """Creates `mlp` and `output`."""
        self.mlp = MLP(self.inputs, self.layers, self.units, self.dtype)
        self.output = Linear((self.units,), self.outputs, self.output_scale, self.dtype)

    def __call__(self, deter: Array, stoch: Array) -> Array:
        """Maps [..., D] and [..., S * C] -> [..., outputs] float32."""
        return self.output(self.mlp(deter, stoch)).astype(jnp.float32)


class Actor(nn.Module):
    """MLP on (deter, stoch) with outputs per action: logits where discrete, else mean and std.

    Attributes:
      specs: of the action.
      inputs: (D, S * C).
      layers: hidden layers.
      units: of these layers.
      output_scale: factor on the output layers' initial weights.
      dtype: compute dtype.
    """

    specs: Mapping[str, ArraySpec]
    inputs: tuple[int, int]
    layers: int
    units: int
    output_scale: float
    dtype: jnp.dtype

    def setup(self) -> None:
        """Creates `mlp` and per action `logits_<name>`, or `mean_<name>` and `std_<name>`."""
        self.mlp = MLP(self.inputs, self.layers, self.units, self.dtype)
        discrete = [name for name, spec in self.specs.items() if spec.kind == 'discrete']
        self.logits = {name: self._output(name) for name in discrete}
        self.mean = {name: self._output(name) for name in self.specs if name not in discrete}
        self.std = {name: self._output(name) for name in self.specs if name not in discrete}

    def _output(self, name: str) -> Linear:
        return Linear((self.units,), flat_size(self.specs[name]), self.output_scale, self.dtype)

    def __call__(self, deter: Array, stoch: Array) -> dict[str, tuple[Array, ...]]:
        """Maps [..., D], [..., S * C] -> {name: (logits,) or unsquashed (mean, std)} float32."""
        hidden = self.mlp(deter, stoch)
        outputs: dict[str, tuple[Array, ...]] = {}
        for name in sorted(self.specs):
            layers = [layer[name] for layer in (self.logits, self.mean, self.std) if name in layer]
            outputs[name] = tuple(layer(hidden).astype(jnp.float32) for layer in layers)
        return outputs
