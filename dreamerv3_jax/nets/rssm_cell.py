"""One step of the recurrent state-space model: a block-diagonal GRU with a discrete latent.

Paper, "World model" and extended data; the parts are separate methods so that whatever does not
depend on the recurrence (tokens, actions, priors) can be computed for a whole sequence at once.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from dreamerv3_jax.nets import layers
from dreamerv3_jax.nets.layers import (
    MLP,
    BlockLinear,
    Hidden,
    Linear,
    RMSNorm,
    from_blocks,
    to_blocks,
)
from dreamerv3_jax.types import Array


class RSSMCell(nn.Module):
    """Sequence model, prior and posterior.

    Attributes:
      deter: D.
      hidden: U.
      stoch: S.
      classes: C.
      blocks: G.
      blocks_axis: 0 or 1, see `to_blocks`.
      action: A, width of the flat action.
      tokens: width of the encoder's output.
      prior_layers: hidden layers of the prior.
      posterior_layers: hidden layers of the posterior.
      dtype: compute dtype.
    """

    deter: int
    hidden: int
    stoch: int
    classes: int
    blocks: int
    blocks_axis: int
    action: int
    tokens: int
    prior_layers: int
    posterior_layers: int
    dtype: jnp.dtype

    def setup(self) -> None:
        """Creates all layers."""
        width, groups = self.hidden, self.stoch * self.classes
        block_linear = functools.partial(
            BlockLinear, blocks=self.blocks, axis=self.blocks_axis, dtype=self.dtype
        )
        self.deter_in = Hidden((self.deter,), width, self.dtype)
        self.stoch_in = Hidden((groups,), width, self.dtype)
        self.action_in = Hidden((self.action,), width, self.dtype)
        self.recurrent = block_linear(self.deter + self.blocks * 3 * width, self.deter)
        self.recurrent_norm = RMSNorm(self.deter, self.dtype)
        self.gates = block_linear(self.deter, 3 * self.deter)
        self.prior_hidden = MLP((self.deter,), self.prior_layers, width, self.dtype)
        self.prior_logits = Linear((width,), groups, dtype=self.dtype)
        self.posterior_first = Hidden((self.deter, self.tokens), width, self.dtype)
        self.posterior_hidden = MLP((width,), self.posterior_layers - 1, width, self.dtype)
        self.posterior_logits = Linear((width,), groups, dtype=self.dtype)

    def __call__(
        self, deter: Array, stoch: Array, action: Array, tokens: Array
    ) -> tuple[Array, Array, Array]:
        """One whole step from raw inputs -> the next deter, prior logits and posterior logits."""
        deter = self.sequence(deter, stoch, self.embed_action(action))
        return deter, self.prior(deter), self.posterior(deter, self.embed_tokens(tokens))

    def embed_action(self, action: Array) -> Array:
        """Flat action [..., A], of magnitudes up to 1, -> [..., U]."""
        return self.action_in(action)

    def embed_tokens(self, tokens: Array) -> Array:
        """The tokens' contribution to the posterior's first layer, [..., tokens] -> [..., U]."""
        return self.posterior_first.part(1, tokens)

    def sequence(self, deter: Array, stoch: Array, action: Array) -> Array:
        """Next deterministic state.

        Args:
          deter: [N, D].
          stoch: [N, S * C].
          action: [N, U] from `embed_action`.

        Returns:
          [N, D].
        """
        shared = jnp.concatenate([self.deter_in(deter), self.stoch_in(stoch), action], -1)
        axis = self.blocks_axis
        blocks = to_blocks(deter, self.blocks, axis)
        x = self.recurrent_norm.silu_over_blocks(self.recurrent(blocks, shared), axis)

        def gated(gates: Array, blocks: Array) -> Array:
            reset, candidate, update = jnp.split(gates, 3, -1)
            candidate = jnp.tanh(nn.sigmoid(reset) * candidate)
            update = nn.sigmoid(update - 1)
            return update * candidate + (1 - update) * blocks

        return from_blocks(layers.recompute(gated)(self.gates(x), blocks), axis)

    def prior(self, deter: Array) -> Array:
        """Logits [..., S, C] float32 of the latent as predicted from `deter` [..., D] alone."""
        return self._logits(self.prior_logits(self.prior_hidden(deter)))

    def posterior(self, deter: Array, tokens: Array) -> Array:
        """Logits [..., S, C] float32 given `deter` [..., D] and `embed_tokens` [..., U]."""
        hidden = self.posterior_first.activate(self.posterior_first.part(0, deter) + tokens)
        return self._logits(self.posterior_logits(self.posterior_hidden(hidden)))

    def _logits(self, flat: Array) -> Array:
        return flat.astype(jnp.float32).reshape(*flat.shape[:-1], self.stoch, self.classes)
