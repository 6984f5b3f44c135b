"""The small agent of `reference/agent_small.npz`: its spaces, settings, parameters and batch."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.configs import base
from dreamerv3_jax.networks import make_networks
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.transforms import two_hot_bins
from dreamerv3_jax.types import Batch

FOLDER = pathlib.Path(__file__).parent / 'reference'
OBSERVATION_SPECS = {
    'mode': ArraySpec('discrete', (1,), (3,)),
    'position': ArraySpec('continuous', (5,)),
    'velocity': ArraySpec('continuous', (3,)),
}
ACTION_SPECS = {'action': ArraySpec('continuous', (2,))}
CONFIG = dataclasses.replace(
    AgentConfig.from_mapping(base.get_config('size1m').agent),
    deter=64,
    hidden=16,
    stoch=8,
    classes=4,
    units=24,
)
NETWORKS = make_networks(OBSERVATION_SPECS, ACTION_SPECS, CONFIG)


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file of published numbers."""
    with np.load(FOLDER / name) as file:
        return dict(file)


def _layer(path: str) -> list[str]:
    """Our path of a hidden layer's parameters under the name of the published code."""
    simple = {
        'con/head/logit': 'continue_/output',
        'rew/head/logits': 'reward/output',
        'val/head/logits': 'critic/output',
        'pol/head/action/mean': 'actor/mean_action',
        'pol/head/action/stddev': 'actor/std_action',
        'dyn/dynhid0': 'dynamics/recurrent',
        'dyn/dynhid0norm': 'dynamics/recurrent_norm',
        'dyn/dyngru': 'dynamics/gates',
        'dyn/priorlogit': 'dynamics/prior_logits',
        'dyn/obslogit': 'dynamics/posterior_logits',
    }
    hidden = {'dyn/obs0': 'dynamics/posterior_first'}
    hidden |= {
        f'dyn/dynin{i}': f'dynamics/{name}_in'
        for i, name in enumerate(['deter', 'stoch', 'action'])
    }
    hidden |= {f'dyn/prior{i}': f'dynamics/prior_hidden/hidden_{i}' for i in range(2)}
    hidden |= {f'enc/mlp{i}': f'encoder/mlp/hidden_{i}' for i in range(3)}
    simple |= {name: f'{ours}/linear' for name, ours in hidden.items()}
    simple |= {f'{name}norm': f'{ours}/norm' for name, ours in hidden.items()}
    simple |= {f'dec/vec/{key}/logits': f'decoder/output_{key}' for key in OBSERVATION_SPECS}
    simple |= {f'dec/vec/{key}/pred': f'decoder/output_{key}' for key in OBSERVATION_SPECS}
    heads = {'con': 'continue_', 'rew': 'reward', 'val': 'critic', 'pol': 'actor', 'dec': 'decoder'}
    for short, ours in heads.items():
        for i in range(3):
            simple[f'{short}/mlp/linear{i}'] = f'{ours}/mlp/hidden_{i}/linear'
            simple[f'{short}/mlp/norm{i}'] = f'{ours}/mlp/hidden_{i}/norm'
    return simple[path].split('/')


def our_path(name: str) -> list[str]:
    """Path in our parameter tree of the published parameter `name`, such as 'dyn/obs0/kernel'."""
    layer, leaf = name.rsplit('/', 1)
    return [*_layer(layer), leaf]


def bin_order() -> np.ndarray:
    """Indices that bring two-hot bins from increasing order to ours."""
    bins = two_hot_bins(CONFIG.bins)
    return np.argsort(np.argsort(bins))


def nested(flat: dict[str, np.ndarray]) -> dict:
    """Builds our parameter tree from {published name: array}."""
    tree: dict = {}
    for name, value in flat.items():
        node = tree
        *parents, leaf = our_path(name)
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf in ('kernel', 'bias') and value.shape[-1] == CONFIG.bins:
            value = value[..., bin_order()]
        # The published decoder alone concatenates stoch before deter.
        if name == 'dec/mlp/linear0/kernel':
            value = np.roll(value, CONFIG.deter, 0)
        node[leaf] = jnp.asarray(value)
    return tree


def parameters(data: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Our parameters, and the slow critic's."""
    named = {name[7:]: value for name, value in data.items() if name.startswith('params:')}
    slow = {
        f'val/{name[8:]}': value for name, value in named.items() if name.startswith('slowval/')
    }
    trained = {
        name: value for name, value in named.items() if not name.startswith(('slowval', 'retnorm'))
    }
    return nested(trained), nested(slow)['critic']


def batch(data: dict[str, np.ndarray]) -> Batch:
    """The recorded batch, [4, 9]."""
    value = {
        name[5:]: jnp.asarray(value) for name, value in data.items() if name.startswith('data:')
    }
    return Batch(
        observation={
            'mode': value['mode'][..., None],
            'position': value['position'],
            'velocity': value['velocity'],
        },
        action={'action': value['action']},
        reward=value['reward'],
        is_first=value['is_first'],
        is_last=value['is_last'],
        is_terminal=value['is_terminal'],
        deter=value['dyn/deter'][:, 0],
        stoch=jnp.argmax(value['dyn/stoch'][:, 0], -1).astype(jnp.uint8),
    )
