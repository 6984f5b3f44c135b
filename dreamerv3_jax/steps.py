"""What the replay keeps of one step, and its way from the environments to the update."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dreamerv3_jax.agent import Agent
from dreamerv3_jax.envs import Records
from dreamerv3_jax.types import Batch

FLAGS = ('is_first', 'is_last', 'is_terminal')


def replay_specs(agent: Agent) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of everything that one replay step holds."""
    specs = {
        f'observation/{name}': (spec.shape, spec.dtype)
        for name, spec in agent.observation_specs.items()
    }
    specs |= {
        f'action/{name}': (spec.shape, spec.dtype) for name, spec in agent.action_specs.items()
    }
    specs |= {'reward': ((), np.dtype(np.float32))}
    specs |= {name: ((), np.dtype(bool)) for name in FLAGS}
    specs |= {'deter': ((agent.config.deter,), np.dtype(np.float32))}
    specs |= {'stoch': ((agent.config.stoch,), np.dtype(np.uint8))}
    return specs


def replay_step(
    records: Records, actions: Mapping[str, np.ndarray], latent: dict[str, Any]
) -> dict[str, np.ndarray]:
    """One step of every stream: records with the actions chosen from them, zero where is_last."""
    step = {f'observation/{name}': value for name, value in records.observation.items()}
    for name, value in actions.items():
        ended = records.is_last.reshape(-1, *(1,) * (value.ndim - 1))
        step[f'action/{name}'] = np.where(ended, np.zeros((), value.dtype), value)
    step |= {name: getattr(records, name) for name in ('reward', *FLAGS)}
    return step | latent


def final_step(records: Records, agent: Agent) -> dict[str, np.ndarray]:
    """Last records that no policy saw. Their latents are never used: a reset follows."""
    count = len(records.reward)
    actions = {
        name: np.zeros((count, *spec.shape), spec.dtype)
        for name, spec in agent.action_specs.items()
    }
    latent = {
        'deter': np.zeros((count, agent.config.deter), np.float32),
        'stoch': np.zeros((count, agent.config.stoch), np.uint8),
    }
    return replay_step(records, actions, latent)


def to_batch(sampled: dict[str, np.ndarray]) -> Batch:
    """Arranges what `Replay.sample` returns as the update wants it."""
    fields: dict[str, Any] = {'observation': {}, 'action': {}}
    for name, value in sampled.items():
        part, slash, rest = name.partition('/')
        if slash:
            fields[part][rest] = value
    fields |= {name: sampled[name] for name in ('reward', *FLAGS, 'deter', 'stoch')}
    return Batch(**fields)
