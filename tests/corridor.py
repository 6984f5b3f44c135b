"""A corridor in which only the right action pays, and an agent that learns it in seconds."""

from typing import Any

import gymnasium
import ml_collections
import numpy as np

from dreamerv3_jax.agent import Agent
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.configs import base
from dreamerv3_jax.spaces import ArraySpec

DOORS, LENGTH = 3, 5


class Corridor(gymnasium.Env):
    """Every room shows which of its doors leads on. That one pays 1, any other ends the episode."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            {
                'door': gymnasium.spaces.Discrete(DOORS),
                'room': gymnasium.spaces.Box(0.0, float(LENGTH), (1,), np.float32),
            }
        )
        self.action_space = gymnasium.spaces.Discrete(DOORS)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._room = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        right = int(action) == self._door
        self._room += right
        return self._observation(), float(right), not right, self._room == LENGTH, {}

    def _observation(self) -> dict[str, Any]:
        self._door = int(self.np_random.integers(DOORS))
        return {'door': self._door, 'room': np.array([self._room], np.float32)}


def config(**changes: Any) -> ml_collections.ConfigDict:
    """Settings of a run in the corridor; `changes` are flat, as in `{'env.num_envs': 1}`."""
    result = base.get_config('nano')
    result.update_from_flattened_dict(
        {
            'env.id': 'corridor:Corridor',
            'env.num_envs': 4,
            'env.vectorization': 'sync',
            'replay.capacity': 4000,
            'replay.train_ratio': 32.0,
            'replay.batch_size': 8,
            'replay.batch_length': 8,
            'mesh.data': 1,
            'agent.deter': 32,
            'agent.hidden': 16,
            'agent.stoch': 12,
            'agent.classes': 4,
            'agent.blocks': 4,
            'agent.units': 16,
            'agent.encoder_layers': 1,
            'agent.decoder_layers': 1,
            'agent.prior_layers': 1,
            'agent.actor_layers': 1,
            'agent.critic_layers': 1,
            'agent.imagination_length': 5,
            'agent.learning_rate': 1e-3,
            'agent.warmup_updates': 10,
        }
        | changes
    )
    return result


OBSERVATION_SPECS = {
    'door': ArraySpec('discrete', (1,), (DOORS,)),
    'room': ArraySpec('continuous', (1,)),
}
ACTION_SPECS = {'action': ArraySpec('discrete', (1,), (DOORS,))}
AGENT_CONFIG = AgentConfig.from_mapping(config().agent)
_AGENTS: dict[str, Agent] = {}


def agent(
    observation_specs: Any = OBSERVATION_SPECS,
    action_specs: Any = ACTION_SPECS,
    settings: Any = AGENT_CONFIG,
    mesh: Any = None,
    acting: None = None,
) -> Agent:
    """Builds an `Agent`, or returns the compiled one of before: agents hold no state."""
    if not isinstance(settings, AgentConfig):
        settings = AgentConfig.from_mapping(settings)
    key = repr((sorted(observation_specs.items()), sorted(action_specs.items()), settings))
    if key not in _AGENTS:
        _AGENTS[key] = Agent(observation_specs, action_specs, settings, mesh)
    return _AGENTS[key]
