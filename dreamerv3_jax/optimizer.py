"""LaProp with adaptive gradient clipping as optax transformations (paper, "Optimizer")."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.types import Array


def clip_by_tensor_norm(clip: float, floor: float) -> optax.GradientTransformation:
    """Adaptive gradient clipping per tensor: scales g so that `|g| <= clip * max(floor, |theta|)`.

    Norms are over the whole tensor, not per unit as in `optax.adaptive_grad_clip`.
    """

    def clip_tensor(grad: Array, param: Array) -> Array:
        grad_norm = jnp.sqrt(jnp.sum(jnp.square(grad)))
        limit = clip * jnp.maximum(floor, jnp.sqrt(jnp.sum(jnp.square(param))))
        return grad * (1 / jnp.maximum(1.0, grad_norm / limit))

    return optax.stateless(lambda grads, params: jax.tree.map(clip_tensor, grads, params))


class LaPropState(NamedTuple):
    """Moments of `scale_by_laprop`."""

    updates: Array  # [] int32
    mean_square: optax.Updates  # like the parameters
    momentum: optax.Updates  # like the parameters


def scale_by_laprop(
    momentum: float, rms_decay: float, epsilon: float
) -> optax.GradientTransformation:
    """LaProp: divides gradients by their root mean square, then averages, both bias-corrected.

    Momentum over normalised gradients keeps one large gradient from dominating the average as in
    Adam. The published code uses a decay of 0.999 for the mean square where the paper's text says
    0.99.
    """

    def init(params: optax.Params) -> LaPropState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return LaPropState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: optax.Updates, state: LaPropState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LaPropState]:
        del params
        count = optax.safe_increment(state.updates)
        square_correction = 1 / (1 - rms_decay ** count.astype(jnp.float32))
        momentum_correction = 1 / (1 - momentum ** count.astype(jnp.float32))
        mean_square = jax.tree.map(
            lambda mean, grad: rms_decay * mean + (1 - rms_decay) * jnp.square(grad),
            state.mean_square,
            grads,
        )
        average = jax.tree.map(
            lambda mean, grad, square: (
                momentum * mean
                + (1 - momentum) * grad / (jnp.sqrt(square * square_correction) + epsilon)
            ),
            state.momentum,
            grads,
            mean_square,
        )
        updates = jax.tree.map(lambda mean: mean * momentum_correction, average)
        return updates, LaPropState(count, mean_square, average)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: AgentConfig) -> optax.GradientTransformation:
    """Clipping, LaProp, then the learning rate, rising linearly from 0 over the first updates."""
    rate, warmup = config.learning_rate, config.warmup_updates
    schedule = optax.linear_schedule(0.0, rate, warmup) if warmup else rate
    return optax.chain(
        clip_by_tensor_norm(config.gradient_clip, config.gradient_clip_floor),
        scale_by_laprop(config.momentum, config.rms_decay, config.rms_epsilon),
        optax.scale_by_learning_rate(schedule),
    )
