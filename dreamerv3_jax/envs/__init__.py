"""Vectorised environments that speak the agent's language.

`make` turns the environment settings of a preset into a `VectorEnvironment`, whose `reset` and
`step` return `Records`: flat observation arrays with reward, `is_first`, `is_last` and
`is_terminal`. Nothing in here imports JAX, so that worker processes start fast.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dreamerv3_jax import startup
from dreamerv3_jax.envs.native import Native
from dreamerv3_jax.envs.processes import Processes
from dreamerv3_jax.envs.registry import Settings, suite_of
from dreamerv3_jax.envs.stream import FinalRecords, Records, empty_records
from dreamerv3_jax.envs.vector import InProcess, VectorEnvironment, close_quietly, open_stream
from dreamerv3_jax.errors import UserError

MOST_RESTARTS = 3  # of an environment in a row

__all__ = ['FinalRecords', 'Records', 'VectorEnvironment', 'empty_records', 'make']


def make(
    config: Any,
    seed: int,
    *,
    render: bool = False,
    restart: bool = True,
    part: tuple[int, int] = (0, 1),
) -> VectorEnvironment:
    """Builds the environments of a preset.

    Args:
      config: the `env` part of a preset: id, kwargs, num_envs, repeat, image_size, vectorization,
        autoreset and timeout (described in `configs/base.py`).
      seed: every environment gets a seed of its own, derived from this one and its index.
      render: make `VectorEnvironment.render` draw, for environments that can.
      restart: build environments that fail again and go on, unless they fail time after time.
      part: (index, count) to build one of several equal parts of them.

    Raises:
      UserError: a setting is wrong, the id is unknown, a package is missing, or the spaces of the
        environment are not supported.
    """
    startup.find_modules_here()
    settings = _settings(config, seed, render, restart, part)
    suite = suite_of(settings.id)
    if suite and suite.vector:
        if suite.installed and config.vectorization not in ('auto', 'native'):
            raise UserError(
                f'{settings.id} steps its environments together by itself; use '
                "env.vectorization='auto'."
            )
        return Native(settings)
    if config.vectorization == 'native':
        return Native(settings)
    if config.vectorization == 'async':
        return Processes(settings)
    if config.vectorization == 'sync' or len(settings.seeds) == 1 or os.name == 'nt':
        return InProcess(settings)
    if suite:
        return Processes(settings)
    # What draws pictures is slow enough to be worth a process.
    first = open_stream(settings, 0)
    if any(spec.kind == 'image' for spec in first.observation_specs.values()):
        close_quietly(first)
        return Processes(settings)
    return InProcess(settings, first)


def _settings(
    config: Any, seed: int, render: bool, restart: bool, part: tuple[int, int]
) -> Settings:
    choices = {
        'vectorization': ('auto', 'sync', 'async', 'native'),
        'autoreset': ('next_step', 'same_step'),
    }
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise UserError(f'env.{name} is one of {", ".join(allowed)}, not {config[name]!r}.')
    for name in ('num_envs', 'repeat'):
        if config[name] < 1:
            raise UserError(f'env.{name} must be at least 1, not {config[name]}.')
    if not config.timeout > 0:
        raise UserError(f'env.timeout must be more than 0 seconds, not {config.timeout}.')
    if not config.id:
        raise UserError('Name the environment in env.id, for example CartPole-v1.')
    index, count = part
    size = config.num_envs // count
    sequences = np.random.SeedSequence(seed).spawn(config.num_envs)[index * size :][:size]
    return Settings(
        id=config.id,
        kwargs=_plain(config.kwargs),
        repeat=config.repeat,
        image_size=config.image_size,
        autoreset=config.autoreset,
        render=render,
        restarts=MOST_RESTARTS if restart else 0,
        timeout=config.timeout,
        # 31 bits, as some environments take no more.
        seeds=tuple(int(sequence.generate_state(1)[0] >> 1) for sequence in sequences),
    )


def _plain(value: Any) -> Any:
    """Returns a ConfigDict as dictionaries and lists, as `evaluate` will read it from JSON."""
    if hasattr(value, 'to_dict'):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
