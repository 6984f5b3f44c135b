"""Agents and runs that take seconds: tiny networks, short sequences, quick compilation."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dreamerv3_jax import evaluation, loop
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.configs import base
from dreamerv3_jax.loop import Trainer
from dreamerv3_jax.spaces import ActionAdapter, ArraySpec, ObservationAdapter
from dreamerv3_jax.types import Batch

SEQUENCES, STEPS = 4, 8  # B, T
AGENT = dict(deter=32, hidden=8, units=8, depth=2, stoch=4, classes=4, bins=15)
# Updates that change parameters visibly from the first on.
AGENT |= dict(imagination_length=3, learning_rate=3e-4, warmup_updates=1)
AGENT |= {name: 1 for name in base.get_config().agent if name.endswith('_layers')}
COMPILATION = {
    'jax_disable_most_optimizations': True,
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}


def quick_variables(folder: pathlib.Path) -> dict[str, str]:
    """Environment variables that make another process compile quickly, or find it compiled here."""
    names = COMPILATION | {'jax_compilation_cache_dir': folder}
    names |= {'jax_platforms': 'cpu', 'jax_num_cpu_devices': jax.device_count()}
    return {name.upper(): str(value) for name, value in names.items()}


@contextlib.contextmanager
def quick_compilation(folder: pathlib.Path) -> Iterator[None]:
    """Compiles with less optimisation, and every program only once into `folder`."""
    values = COMPILATION | {'jax_compilation_cache_dir': str(folder)}
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def share_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs of the same kind take the same agent: it holds no state but compiled programs."""
    for module in (loop, evaluation):
        monkeypatch.setattr(module, 'Agent', _shared_agent)


_agents: dict[str, Agent] = {}


def _shared_agent(
    observation_specs: Any, action_specs: Any, config: Any, mesh: Any = None, acting: Any = None
) -> Agent:
    key = repr((observation_specs, action_specs, config.to_dict(), mesh and mesh.shape, acting))
    if key not in _agents:
        agent = _agents[key] = Agent(observation_specs, action_specs, config, mesh, acting)
        create = functools.cache(agent.init)

        def init(seed: int) -> Any:
            with jax.ensure_compile_time_eval():  # the agent also asks for the shapes alone
                state = create(seed)
            return jax.tree.map(jnp.copy, state)  # as updates take over the buffers

        agent.init = init
        agent.compile_update = functools.cache(agent.compile_update)
    return _agents[key]


def agent_config(**changes: Any) -> dict[str, Any]:
    return base.get_config('nano').agent.to_dict() | AGENT | changes


def run_config(env_id: str = 'CartPole-v1', **changes: Any) -> ml_collections.ConfigDict:
    """Settings of a tiny run; `changes` by dotted name with '__' for the dot."""
    config = base.get_config('nano')
    config.agent.update(AGENT)
    config.mesh.data = 1
    config.env.update(id=env_id, num_envs=2, vectorization='sync')
    config.replay.update(capacity=2000, train_ratio=32.0, batch_size=SEQUENCES, batch_length=STEPS)
    config.run.update(steps=100, log_every=1e-9, checkpoint_every=1e9)
    for name, value in changes.items():
        *groups, leaf = name.split('__')
        setattr(functools.reduce(getattr, groups, config), leaf, value)
    return config


def ticked(config: ml_collections.ConfigDict, folder: pathlib.Path, count: int) -> Trainer:
    """A trainer after some ticks; to be closed."""
    with contextlib.ExitStack() as stack:
        trainer = stack.enter_context(Trainer(config, folder, 'tiny'))
        for _ in range(count):
            trainer.tick()
        stack.pop_all()
    return trainer


def read_metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    """All lines of a run's metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith('time')}
        for line in lines
    ]


def specs(*spaces: gymnasium.Space) -> tuple[dict[str, ArraySpec], dict[str, ArraySpec]]:
    observation, action = spaces
    return ObservationAdapter(observation).specs, ActionAdapter(action).specs


def random_arrays(
    array_specs: dict[str, ArraySpec], leading: tuple[int, ...], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    arrays = {}
    for name, spec in array_specs.items():
        shape = (*leading, *spec.shape)
        if spec.kind == 'discrete':
            arrays[name] = rng.integers(np.array(spec.classes), size=shape).astype(np.int32)
        elif spec.kind == 'image':
            arrays[name] = rng.integers(256, size=shape).astype(np.uint8)
        else:
            arrays[name] = rng.standard_normal(shape).astype(np.float32)
    return arrays


def random_batch(
    observation_specs: dict[str, ArraySpec], action_specs: dict[str, ArraySpec], seed: int
) -> Batch:
    """Sequences whose rewards differ much between them."""
    rng = np.random.default_rng(seed)
    shape = (SEQUENCES, STEPS + 1)
    is_first, is_last, is_terminal = (np.zeros(shape, bool) for _ in range(3))
    is_last[1:, 3] = is_first[1:, 4] = True
    is_terminal[1, 3] = True
    reward = rng.standard_normal(shape) * 3.0 ** np.arange(SEQUENCES)[:, None]
    return Batch(
        observation=random_arrays(observation_specs, shape, rng),
        action=random_arrays(action_specs, shape, rng),
        reward=(reward * ~is_first).astype(np.float32),
        is_first=is_first,
        is_last=is_last,
        is_terminal=is_terminal,
        deter=rng.uniform(-1, 1, (SEQUENCES, AGENT['deter'])).astype(np.float32),
        stoch=rng.integers(AGENT['classes'], size=(SEQUENCES, AGENT['stoch'])).astype(np.uint8),
    )
