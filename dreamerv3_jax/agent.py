"""The agent as a library: networks, compiled policy and compiled update for given spaces."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax import policy, prediction, sharding, startup, update
from dreamerv3_jax.actions import zero_actions
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.networks import compute_dtype, make_networks
from dreamerv3_jax.optimizer import make_optimizer
from dreamerv3_jax.spaces import ActionAdapter, ArraySpec, ObservationAdapter
from dreamerv3_jax.train_state import TrainState, init_train_state
from dreamerv3_jax.types import Batch, Latent, Metrics, PolicyState, StoredLatent


class Agent:
    """Compiled functions of one agent. It holds no state: states go in and come out.

    Example:
      >>> import gymnasium
      >>> from dreamerv3_jax import Agent, load_config
      >>> env = gymnasium.make('CartPole-v1')
      >>> agent = Agent.from_spaces(
      ...     env.observation_space, env.action_space, load_config('gymnasium:nano').agent)
      >>> train_state, state = agent.init(seed=0), agent.initial_policy_state(count=1)
      >>> observation = {'observation': env.reset(seed=0)[0][None]}
      >>> state, actions, _ = agent.policy(
      ...     train_state.params, state, observation, is_first=np.array([True]), seed=(0, 0))
      >>> actions['action'].shape
      (1, 1)
    """

    def __init__(
        self,
        observation_specs: Mapping[str, ArraySpec],
        action_specs: Mapping[str, ArraySpec],
        config: AgentConfig | Mapping[str, Any],
        mesh: sharding.Devices | None = None,
        acting: jax.Device | None = None,
    ) -> None:
        """Builds the networks; nothing is allocated or compiled yet.

        Args:
          observation_specs: arrays of an observation by name.
          action_specs: arrays of an action by name.
          config: settings, or a mapping of them such as the `agent` part of a preset.
          mesh: devices of the update; by default the first device of this process alone.
          acting: another device, for the policy; by default one of the update's.
        """
        self.observation_specs = dict(sorted(observation_specs.items()))
        self.action_specs = dict(sorted(action_specs.items()))
        self.mesh = mesh or sharding.make_mesh(data=1, devices=jax.local_devices()[:1])
        self.acting = acting
        device = self.mesh.devices.flat[0]
        if not isinstance(config, AgentConfig):
            config = AgentConfig.from_mapping(config)
        self.config = config.on(device.platform, str(getattr(device, 'compute_capability', '')))
        self.networks = make_networks(
            self.observation_specs,
            self.action_specs,
            self.config,
            device.platform,
            self.mesh.size,
        )
        self._optimizer = make_optimizer(self.config)
        self._compute_gradients = functools.partial(
            update.compute_gradients,
            networks=self.networks,
            observation_specs=self.observation_specs,
            action_specs=self.action_specs,
            config=self.config,
            whole=functools.partial(sharding.whole, self.mesh),
            split=functools.partial(sharding.split, self.mesh),
        )
        self._apply_gradients = functools.partial(
            update.apply_gradients, optimizer=self._optimizer, config=self.config
        )
        self.pure_update = functools.partial(
            update.update, self._compute_gradients, self._apply_gradients
        )
        self._compiled_update: Any = None
        self._programs: tuple[Any, ...] = ()  # that it consists of
        act = functools.partial(
            policy.act, self.networks, action_specs=self.action_specs, config=self.config
        )

        def keyed(
            mode: bool, params: Any, state: Any, observation: Any, is_first: Any, seed: Any
        ) -> Any:
            return act(params, state, observation, is_first, _key(seed), mode=mode)

        self._policy = jax.jit(keyed, static_argnums=0)

        def predict(observed: int, params: Any, batch: Batch, seed: Any) -> Any:
            return prediction.open_loop(
                self.networks,
                params,
                batch,
                _key(seed),
                observed=observed,
                observation_specs=self.observation_specs,
                action_specs=self.action_specs,
                config=self.config,
            )

        self._open_loop = jax.jit(predict, static_argnums=0)

    @classmethod
    def from_spaces(
        cls,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        config: AgentConfig | Mapping[str, Any],
        mesh: sharding.Devices | None = None,
    ) -> Self:
        """Builds the agent for gymnasium spaces; the adapters in `spaces` convert between both."""
        observation_specs = ObservationAdapter(observation_space).specs
        return cls(observation_specs, ActionAdapter(action_space).specs, config, mesh)

    def init(self, seed: int) -> TrainState:
        """Returns a fresh state, placed on the mesh."""
        return self._create(np.uint32(seed))

    @functools.cached_property
    def _create(self) -> Callable[[np.uint32], TrainState]:
        def create(seed: jax.Array) -> TrainState:
            observation = {
                name: jnp.zeros((1, *spec.shape), spec.dtype)
                for name, spec in self.observation_specs.items()
            }
            return init_train_state(self.networks, self._optimizer, observation, seed)

        shardings = sharding.state_sharding(self.mesh, jax.eval_shape(create, np.uint32(0)))
        return jax.jit(create, out_shardings=shardings)

    def initial_policy_state(self, count: int) -> PolicyState:
        """State of `count` environments before the first observation, which must be `is_first`."""
        config, dtype = self.config, compute_dtype(self.config)
        deter = jnp.zeros((count, config.deter), dtype)
        stoch = jnp.zeros((count, config.stoch, config.classes), dtype)
        state = PolicyState(Latent(deter, stoch), zero_actions(self.action_specs, count))
        # Placed as the policy returns it: its second call must not compile again.
        return jax.device_put(state, self.acting or sharding.own_device(self.mesh))

    def acting_params(self, state: TrainState) -> Any:
        """Parameters for `policy`, whole on one device of this process.

        They last until the next update, or for good where the policy has a device of its own.
        """
        params = {name: state.params[name] for name in policy.NETWORKS}
        params = sharding.gather(self.mesh, params)
        return jax.device_put(params, self.acting) if self.acting else params

    def policy(
        self,
        params: Any,
        state: PolicyState,
        observation: Mapping[str, np.ndarray],
        is_first: np.ndarray,
        seed: tuple[int, int],
        mode: bool = False,
    ) -> tuple[PolicyState, dict[str, jax.Array], StoredLatent]:
        """Chooses actions for N environments, see `policy.act`.

        Args:
          params: `TrainState.params`, or on several devices what `acting_params` returns.
          state: from the call before, or `initial_policy_state`.
          observation: {name: [N, *shape]}.
          is_first: [N] bool.
          seed: two numbers that together have to differ from call to call.
          mode: the most probable action instead of a sample.

        Returns:
          The new state, actions {name: [N, n]} (continuous ones not clipped), and the latents to
          store.
        """
        words = np.array(seed, np.uint32)
        return self._policy(mode, params, state, dict(observation), is_first, words)

    def open_loop(
        self, params: Any, batch: Batch, *, observed: int, seed: tuple[int, int] = (0, 0)
    ) -> dict[str, prediction.Prediction]:
        """Predicts the images of sequences from their first steps and their actions alone.

        Args:
          params: `TrainState.params`.
          batch: [B, T + 1] steps, such as `steps.to_batch` makes of what `Replay.sample` returns.
          observed: how many of the T steps the model sees, from 1 to T - 1.
          seed: of the latents.

        Returns:
          {name: `Prediction`}, see `prediction.open_loop`; `prediction.video` makes a film of it.
        """
        return self._open_loop(observed, params, batch, np.array(seed, np.uint32))

    def blank_batch(self, batch_size: int, batch_length: int) -> Batch:
        """Zeros [B, T + 1, ...] of the shapes and dtypes that the update takes."""
        steps, config = (batch_size, batch_length + 1), self.config

        def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
            return np.zeros(shape, dtype)

        def arrays(specs: Mapping[str, ArraySpec]) -> dict[str, Any]:
            return {name: zeros((*steps, *spec.shape), spec.dtype) for name, spec in specs.items()}

        return Batch(
            observation=arrays(self.observation_specs),
            action=arrays(self.action_specs),
            reward=zeros(steps, np.float32),
            is_first=zeros(steps, bool),
            is_last=zeros(steps, bool),
            is_terminal=zeros(steps, bool),
            deter=zeros((batch_size, config.deter), np.float32),
            stoch=zeros((batch_size, config.stoch), np.uint8),
        )

    def compile_update(self, batch_size: int, batch_length: int) -> tuple[Any, ...]:
        """Compiles the update for batches of these shapes, of all hosts; or its first call does.

        Returns:
          Its compiled programs (`jax.stages.Compiled`), to be looked at. It is one, but on CPUs the
          optimiser is a second: their compiler keeps a megabyte for every loop of a program.

        Raises:
          UserError: there is one step only, or the sequences do not divide among the devices.
        """
        self._compile(self.blank_batch(batch_size, batch_length))
        return self._programs

    def _compile(self, batch: Batch) -> None:
        if batch.reward.shape[1] < 3:
            raise UserError('The update takes sequences of at least 2 steps, after their context.')
        state = jax.eval_shape(lambda: self.init(0))
        by_state = sharding.state_sharding(self.mesh, state)
        by_row = sharding.batch_sharding(self.mesh, batch.reward.shape[0])
        everywhere = sharding.replicated(self.mesh)
        state, batch = sharding.abstract(state, by_state), sharding.abstract(batch, by_row)
        if self.mesh.devices.flat[0].platform == 'cpu':
            compute_gradients = sharding.compile_for(
                self._compute_gradients,
                state,
                batch,
                out_shardings=(by_state.params, everywhere, by_row, everywhere),
                donate=0,
            )
            apply_gradients = sharding.compile_for(
                self._apply_gradients,
                state,
                state.params,
                sharding.abstract(state.percentiles, everywhere),
                jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
                out_shardings=(by_state, everywhere),
                donate=1,
            )
            self._programs = compute_gradients, apply_gradients
            self._compiled_update = functools.partial(
                update.update, compute_gradients, apply_gradients
            )
        else:
            self._compiled_update = sharding.compile_for(
                self.pure_update,
                state,
                batch,
                out_shardings=(by_state, by_row, everywhere),
                donate=1,
            )
            self._programs = (self._compiled_update,)
        stats = self._programs[0].memory_analysis()  # None where a platform has none
        # One buffer for all temporaries of each device.
        buffers = [stats.temp_size_in_bytes] * len(self.mesh.local_devices) if stats else []
        startup.return_memory(buffers)

    def send(self, batch: Batch) -> Batch:
        """Starts to place a batch on the devices, for `update`. Where there are many hosts, each
        has an equal part of the sequences."""
        processes = {device.process_index for device in self.mesh.devices.flat}
        size = batch.reward.shape[0] * len(processes)
        return sharding.send(batch, sharding.batch_sharding(self.mesh, size))

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, StoredLatent, Metrics]:
        """One update of everything, see `update.update`. Does not wait for the result.

        Args:
          state: is donated; do not use it again.
          batch: [B, T + 1] steps, always of the same shapes; may have been sent before.

        Returns:
          The new state, the latents [B, T, ...] to write back, and metrics {name: []}.
        """
        if not isinstance(batch.reward, jax.Array):
            batch = self.send(batch)
        if self._compiled_update is None:
            self._compile(batch)
        return self._compiled_update(state, batch)

    def parameter_counts(self) -> dict[str, int]:
        """Number of trained parameters by network; computed from shapes."""
        params = jax.eval_shape(lambda: self.init(0)).params
        return {
            name: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
            for name, tree in params.items()
        }


def _key(seed: Any) -> Any:
    """Key of two words, [2] uint32, whatever generator JAX takes by default."""
    return jax.random.wrap_key_data(seed, impl='threefry2x32')
