"""All networks of the agent as (init, apply) pairs: the boundary behind which flax stays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.nets.decoder import Decoder
from dreamerv3_jax.nets.encoder import Encoder, flat_size
from dreamerv3_jax.nets.heads import Actor, Head
from dreamerv3_jax.nets.rssm_cell import RSSMCell
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Array, Params


class Network(NamedTuple):
    """A module with its parameters taken out."""

    module: nn.Module
    remat: bool = False  # gradients compute what is inside again, which need not be kept then
    gradients_in_order: bool = False  # see `parameter_gradients_first`

    def init(self, key: chex.PRNGKey, *inputs: Any) -> Params:
        """Creates parameters for inputs of these shapes."""
        return self.module.init(key, *inputs)['params']

    def __call__(self, params: Params, *inputs: Any, method: str | None = None) -> Any:
        """Applies the module, or one of its methods, with the given parameters."""
        apply: Callable = functools.partial(self.module.apply, method=method)
        if self.remat:
            apply = jax.checkpoint(apply)
        if self.gradients_in_order:
            params, inputs = parameter_gradients_first(params, inputs)
        return apply({'params': params}, *inputs)


@jax.custom_vjp
def parameter_gradients_first(params: Params, inputs: Any) -> tuple[Params, Any]:
    """Returns what it is given; gradients of inputs are computed after those of parameters.

    XLA on CPUs leaves gradients of parameters for the end. Until then it keeps all that they need
    of a decoder, beside what the gradients of the encoder need.

    Args:
      params: tree of arrays of any shapes, with one element at least.
      inputs: tree of arrays of any shapes.
    """
    return params, inputs


def _inputs_last(_: None, grads: tuple[Params, Any]) -> tuple[Params, Any]:
    params, inputs = grads
    # Nothing is left of a barrier on CPUs when operations are ordered. A product by zero stays, as
    # it may be NaN.
    zero = 0.0 * sum(leaf.ravel()[0] for leaf in jax.tree.leaves(params))
    return params, jax.tree.map(lambda x: x + zero.astype(x.dtype), inputs)


parameter_gradients_first.defvjp(lambda *arrays: (arrays, None), _inputs_last)


@dataclasses.dataclass(frozen=True)
class Networks:
    """The seven networks; parameters live in a dict with the same names."""

    dynamics: Network  # RSSMCell
    encoder: Network
    decoder: Network
    reward: Network
    continue_: Network
    actor: Network
    critic: Network

    def init(self, key: chex.PRNGKey, observation: Mapping[str, Array]) -> dict[str, Params]:
        """Creates the parameters of all networks, float32.

        Args:
          key: consumed here.
          observation: {name: [1, *shape]} of any values.
        """
        cell = self.dynamics.module
        deter, stoch = jnp.zeros((1, cell.deter)), jnp.zeros((1, cell.stoch * cell.classes))
        inputs: dict[str, tuple[Any, ...]] = {
            field.name: (deter, stoch) for field in dataclasses.fields(self)
        }
        inputs['encoder'] = (observation,)
        inputs['dynamics'] = (
            deter,
            stoch,
            jnp.zeros((1, cell.action)),
            jnp.zeros((1, cell.tokens)),
        )
        return {
            name: getattr(self, name).init(jax.random.fold_in(key, index), *arguments)
            for index, (name, arguments) in enumerate(sorted(inputs.items()))
        }


def make_networks(
    observation_specs: Mapping[str, ArraySpec],
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
    platform: str | None = None,
    devices: int = 1,
) -> Networks:
    """Builds all networks for the given spaces; nothing is allocated.

    Args:
      observation_specs: of the observation.
      action_specs: of the action.
      config: settings.
      platform: of the devices, such as 'cpu', by default JAX's own. It decides how arrays lie
        in memory; results differ by rounding only.
      devices: among how many batches are split.
    """
    dtype = compute_dtype(config)
    stoch = config.stoch * config.classes
    state = (config.deter, stoch)
    network = functools.partial(Network, remat=config.remat)
    on_cpu = (platform or jax.default_backend()) == 'cpu'
    group = 16 if on_cpu else 0  # one register of numbers
    turn = 2 * group if 2 * group % devices == 0 else 0  # images that fit the caches
    encoder = Encoder(
        observation_specs, config.encoder_layers, config.units, config.depth, dtype, group, turn
    )

    def head(layers: int, outputs: int, output_scale: float) -> Network:
        return network(Head(state, layers, config.units, outputs, output_scale, dtype))

    return Networks(
        dynamics=network(
            RSSMCell(
                deter=config.deter,
                hidden=config.hidden,
                stoch=config.stoch,
                classes=config.classes,
                blocks=config.blocks,
                blocks_axis=0 if on_cpu else 1,
                action=sum(flat_size(spec) for spec in action_specs.values()),
                tokens=encoder.tokens,
                prior_layers=config.prior_layers,
                posterior_layers=config.posterior_layers,
                dtype=dtype,
            )
        ),
        encoder=network(encoder),
        decoder=network(
            Decoder(
                specs=observation_specs,
                deter=config.deter,
                stoch=stoch,
                blocks=config.blocks,
                layers=config.decoder_layers,
                units=config.units,
                depth=config.depth,
                dtype=dtype,
                group=group,
            ),
            gradients_in_order=on_cpu,
        ),
        reward=head(config.reward_layers, config.bins, 0.0),
        continue_=head(config.continue_layers, 1, 1.0),
        actor=network(
            Actor(
                action_specs,
                state,
                config.actor_layers,
                config.units,
                config.actor_output_scale,
                dtype,
            )
        ),
        critic=head(config.critic_layers, config.bins, 0.0),
    )


def compute_dtype(config: AgentConfig) -> jnp.dtype:
    """Dtype of products and activations; one that was not set is that of the first device."""
    capability = str(getattr(jax.devices()[0], 'compute_capability', ''))
    return jnp.dtype(config.on(jax.default_backend(), capability).compute_dtype)
