"""What a run prints about itself before it begins."""

from collections.abc import Mapping
from pathlib import Path

import jax
import ml_collections

from dreamerv3_jax import hosts
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.configs import base
from dreamerv3_jax.replay import bytes_per_step
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.steps import replay_specs


def agent_rows(config: ml_collections.ConfigDict, agent: Agent) -> dict[str, str]:
    """Returns by name what is to know of an agent and of the replay that it needs."""
    replay, counts = config.replay, agent.parameter_counts()
    step_bytes = bytes_per_step(replay_specs(agent))
    return {
        'observation': _listed(agent.observation_specs),
        'action': _listed(agent.action_specs),
        'parameters': f'{sum(counts.values()):,} ({base.size_of(config.agent)}): '
        + ', '.join(f'{name.strip("_")} {count:,}' for name, count in counts.items()),
        'mesh': f'data={agent.mesh.shape["data"]} fsdp={agent.mesh.shape["fsdp"]}'
        + (', one acts' if config.mesh.acting else ''),
        'replay': f'{replay.capacity:,} steps x {step_bytes:,} bytes = '
        f'{step_bytes * replay.capacity / 1e9:.2f} GB '
        + ('on disk' if replay.on_disk else 'of memory'),
    }


def _listed(specs: Mapping[str, ArraySpec]) -> str:
    return ', '.join(f'{name}: {spec}' for name, spec in specs.items())


def lines(config: ml_collections.ConfigDict, logdir: Path, preset: str, agent: Agent) -> list[str]:
    """Returns lines of a name and what is to know about it."""
    replay, rows = config.replay, agent_rows(config, agent)
    devices = jax.devices()
    per_update = replay.batch_size * replay.batch_length / replay.train_ratio
    rows = {
        'run': f'{logdir} (preset {preset}, seed {config.seed})',
        'environment': f'{config.env.id}, {config.env.num_envs} in parallel, '
        f'repeat {config.env.repeat}',
        'observation': rows['observation'],
        'action': rows['action'],
        'parameters': rows['parameters'],
        'devices': f'{len(devices)} {devices[0].platform} ({devices[0].device_kind}), '
        f'mesh {rows["mesh"]}',
        'hosts': f'{hosts.count()}, which share environments, replay and batch equally',
        'replay': rows['replay'],
        'training': f'one update every {per_update:g} steps '
        f'(train ratio {replay.train_ratio:g}), until {config.run.steps:,} frames',
    }
    if hosts.count() == 1:
        del rows['hosts']
    return [f'{name:12} {text}' for name, text in rows.items()]
