"""DreamerV3 in JAX: a world-model agent with one set of hyperparameters for all domains.

The names below are imported on first use, so that the command line answers before jax is loaded.
"""

import importlib
from typing import Any

_HOMES = {
    'ActionAdapter': 'spaces',
    'Agent': 'agent',
    'AgentConfig': 'config',
    'Batch': 'types',
    'ObservationAdapter': 'spaces',
    'Player': 'evaluation',
    'Replay': 'replay',
    'UserError': 'errors',
    'evaluate': 'evaluation',
    'load_config': 'presets',
    'open_loop': 'evaluation',
    'train': 'loop',
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
