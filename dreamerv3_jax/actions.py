"""Distributions over actions: one categorical per discrete component, one normal per number."""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax import distributions
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.nets.encoder import one_hots
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Array

Actions = dict[str, Array]


class Categoricals(NamedTuple):
    """Independent categoricals of possibly unequal class counts."""

    log_probs: tuple[Array, ...]  # n arrays [..., classes_i] float32, normalised


class Normals(NamedTuple):
    """Independent normals."""

    mean: Array  # [..., n] float32 in -1..1
    std: Array  # [..., n] float32


Policy = dict[str, Categoricals | Normals]


def make_policy(
    outputs: Mapping[str, tuple[Array, ...]], specs: Mapping[str, ArraySpec], config: AgentConfig
) -> Policy:
    """Turns the actor's raw outputs into distributions.

    Discrete: 1% uniform is mixed in, as the paper says; the published code drops it by mistake.
    Continuous: mean `tanh(m)`, deviation `(max - min) sigmoid(s + 2) + min`.
    """
    policy: Policy = {}
    for name, spec in specs.items():
        if spec.kind == 'discrete':
            (logits,), start, parts = outputs[name], 0, []
            for classes in spec.classes:
                parts.append(
                    distributions.unimix(logits[..., start : start + classes], config.unimix)
                )
                start += classes
            policy[name] = Categoricals(tuple(parts))
        else:
            mean, std = outputs[name]
            spread = config.max_std - config.min_std
            policy[name] = Normals(
                jnp.tanh(mean), spread * jax.nn.sigmoid(std + 2) + config.min_std
            )
    return policy


def components(specs: Mapping[str, ArraySpec]) -> int:
    """How many numbers an action has, which is how many random ones `sample` takes."""
    return sum(spec.shape[0] for spec in specs.values())


def sample(policy: Policy, uniform: Array) -> Actions:
    """Samples {name: [..., n]}, int32 classes or float32 numbers.

    Args:
      policy: from `make_policy`.
      uniform: [..., components] independent numbers in [0, 1), by sorted names.
    """
    actions, start = {}, 0
    for name, part in sorted(policy.items()):
        count = len(part.log_probs) if isinstance(part, Categoricals) else part.mean.shape[-1]
        own = uniform[..., start : start + count]
        start += count
        if isinstance(part, Categoricals):
            pairs = zip(jnp.moveaxis(own, -1, 0), part.log_probs, strict=True)
            actions[name] = jnp.stack(
                [distributions.categorical_sample(*pair) for pair in pairs], -1
            )
        else:
            actions[name] = distributions.normal_sample(own, part.mean, part.std)
    chex.assert_axis_dimension(uniform, -1, start)
    return actions


def mode(policy: Policy) -> Actions:
    """The most probable action {name: [..., n]}."""
    return {
        name: jnp.stack(
            [jnp.argmax(log_probs, -1).astype(jnp.int32) for log_probs in part.log_probs], -1
        )
        if isinstance(part, Categoricals)
        else part.mean
        for name, part in policy.items()
    }


def log_prob(policy: Policy, actions: Actions) -> Array:
    """Log-probability of {name: [..., n]}, summed over all components -> [...]."""
    total: Array | float = 0.0
    for name, part in policy.items():
        action = jax.lax.stop_gradient(actions[name])
        if isinstance(part, Categoricals):
            for index, log_probs in enumerate(part.log_probs):
                total += distributions.categorical_log_prob(log_probs, action[..., index])
        else:
            total += jnp.sum(distributions.normal_log_prob(part.mean, part.std, action), -1)
    return jnp.asarray(total)


def entropy(policy: Policy) -> Array:
    """Entropy in nats, summed over all components -> [...]."""
    total: Array | float = 0.0
    for part in policy.values():
        if isinstance(part, Categoricals):
            total += sum(
                distributions.categorical_entropy(log_probs) for log_probs in part.log_probs
            )
        else:
            total += jnp.sum(distributions.normal_entropy(part.std), -1)
    return jnp.asarray(total)


def flatten_actions(actions: Mapping[str, Array], specs: Mapping[str, ArraySpec]) -> Array:
    """The flat action vector as the RSSM sees it.

    Names in sorted order, discrete ones as one-hot, each number divided by `max(1, |a|)` without
    gradient through the divisor: the model sees a sampled action as the environment executes it.

    Args:
      actions: {name: [..., n]}.
      specs: of the action space.

    Returns:
      [..., A] float32.
    """
    parts = [
        one_hots(actions[name], spec.classes) if spec.kind == 'discrete' else actions[name]
        for name, spec in sorted(specs.items())
    ]
    flat = jnp.concatenate(parts, -1)
    return flat / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(flat)))


def zero_actions(specs: Mapping[str, ArraySpec], count: int) -> Actions:
    """Placeholder actions {name: [count, n]} for the start of an episode."""
    dtypes = {
        name: jnp.int32 if spec.kind == 'discrete' else jnp.float32 for name, spec in specs.items()
    }
    return {name: jnp.zeros((count, *spec.shape), dtypes[name]) for name, spec in specs.items()}
