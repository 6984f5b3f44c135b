"""A tiny agent with numbers and categories in and out, and a batch for it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.configs import base
from dreamerv3_jax.networks import Networks, make_networks
from dreamerv3_jax.normalization import init_return_percentiles
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.transforms import two_hot_bins
from dreamerv3_jax.types import Batch
from dreamerv3_jax.update import total_loss

OBSERVATION_SPECS = {
    'mode': ArraySpec('discrete', (2,), (3, 2)),
    'vector': ArraySpec('continuous', (3,)),
}
ACTION_SPECS = {
    'button': ArraySpec('discrete', (2,), (3, 2)),
    'move': ArraySpec('continuous', (2,)),
}
WIDTHS = dict(deter=16, hidden=8, stoch=4, classes=4, blocks=4, depth=2, units=8)
LAYERS = dict(encoder_layers=1, decoder_layers=1, prior_layers=1, actor_layers=1, critic_layers=1)
CONFIG = dataclasses.replace(
    AgentConfig.from_mapping(base.get_config('size1m').agent),
    imagination_length=3,
    **WIDTHS,
    **LAYERS,
)
SEQUENCES, STEPS = 3, 5  # B, T
LOSSES = (
    'reconstruction/mode',
    'reconstruction/vector',
    'reward',
    'continue',
    'dynamics',
    'representation',
    'actor',
    'critic',
    'replay_critic',
)


def config(**changes: Any) -> AgentConfig:
    """The tiny settings with some changed."""
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def networks() -> Networks:
    return make_networks(OBSERVATION_SPECS, ACTION_SPECS, CONFIG)


@functools.cache
def parameters() -> dict:
    """Random parameters without zeros, because no gradient passes a layer that starts at zero."""
    observation = {
        name: jnp.zeros((1, *spec.shape), spec.dtype) for name, spec in OBSERVATION_SPECS.items()
    }
    shapes = jax.eval_shape(networks().init, jax.random.key(0), observation)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = perturbed(zeros, seed=1, scale=0.5)
    for name in ('reward', 'critic'):  # keeps predictions within some tens
        params[name]['output']['bias'] -= 3 * np.log1p(np.abs(two_hot_bins(CONFIG.bins)))
    for name in ('prior_logits', 'posterior_logits'):  # keeps the KL above the free bits
        params['dynamics'][name]['kernel'] *= 4
    return params


def perturbed(tree: Any, seed: int, scale: float = 0.1) -> Any:
    """Adds noise to every array of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + scale * rng.standard_normal(x.shape)).astype(x.dtype), tree)


def random_array(spec: ArraySpec, leading: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if spec.kind == 'continuous':
        return rng.standard_normal((*leading, *spec.shape)).astype(np.float32)
    return rng.integers(np.array(spec.classes), size=(*leading, *spec.shape)).astype(np.int32)


def observations(*leading: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: random_array(spec, leading, rng) for name, spec in OBSERVATION_SPECS.items()}


def batch(seed: int = 0) -> Batch:
    """Random sequences: the first has no end, the second a terminal one, the third a time limit."""
    rng = np.random.default_rng(seed)
    shape = (SEQUENCES, STEPS + 1)
    is_last, is_terminal, is_first = (np.zeros(shape, bool) for _ in range(3))
    is_last[1:, 2] = True
    is_terminal[1, 2] = True
    is_first[1:, 3] = True
    action = {name: random_array(spec, shape, rng) for name, spec in ACTION_SPECS.items()}
    return Batch(
        observation=observations(*shape, seed=seed),
        action=action,
        reward=rng.standard_normal(shape).astype(np.float32) * ~is_first,
        is_first=is_first,
        is_last=is_last,
        is_terminal=is_terminal,
        deter=rng.standard_normal((SEQUENCES, WIDTHS['deter'])).astype(np.float32),
        stoch=rng.integers(WIDTHS['classes'], size=(SEQUENCES, WIDTHS['stoch'])).astype(np.uint8),
    )


@functools.cache
def loss_function() -> Any:
    """Compiles `total_loss` for any weights of its losses.

    Returns:
      A function of (trained, percentiles, batch, key, scales) that returns the gradient
      in `trained` (parameters, those of the slow critic, and the rewards) and the results of
      `total_loss`.
    """

    def weighted(trained: tuple, percentiles: Any, batch_: Batch, key: Any, scales: dict) -> tuple:
        params, slow_critic, reward = trained
        total, auxiliary = total_loss(
            params,
            slow_critic,
            percentiles,
            batch_._replace(reward=reward),
            key,
            networks=networks(),
            observation_specs=OBSERVATION_SPECS,
            action_specs=ACTION_SPECS,
            config=CONFIG,
        )
        means = {name: loss.mean() for name, loss in auxiliary[0].items()}
        return sum(scales[name] * mean for name, mean in means.items()), (total, *auxiliary)

    return jax.jit(jax.grad(weighted, has_aux=True))


@functools.cache
def trained() -> tuple:
    slow_critic = perturbed(parameters()['critic'], seed=2)
    return parameters(), slow_critic, batch().reward


@functools.cache
def losses() -> tuple:
    """Total, losses, latents, percentiles and metrics of `total_loss` for the batch."""
    return run_losses(dict.fromkeys(LOSSES, 1.0))[1]


@functools.cache
def gradients(loss: str) -> tuple:
    """Gradient of the mean of one loss in parameters, those of the slow critic, and rewards."""
    return run_losses({name: float(name == loss) for name in LOSSES})[0]


def run_losses(scales: dict[str, float]) -> tuple:
    return loss_function()(trained(), init_return_percentiles(), batch(), jax.random.key(3), scales)
