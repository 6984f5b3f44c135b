"""LaProp with adaptive gradient clipping as optax transformations (paper, "Optimizer").

Those with a state take `finite`, [] bool: where it is false, the state stays and the updates are 0.
Each array is chosen where it is computed. By one choice at the end, between the whole old state and
the new one, moments and parameters would be computed, and copied, more than once.
"""

from typing import Any, NamedTuple

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
) -> optax.GradientTransformationExtraArgs:
    """LaProp: divides gradients by their root mean square, then averages, both bias-corrected.

    Momentum over normalised gradients keeps one large gradient from dominating the average as in
    Adam. The published code uses a decay of 0.999 for the mean square where the paper's text says
    0.99.

    Where `finite` is false, the state stays and the updates are 0, whatever the gradients are.
    """

    def init(params: optax.Params) -> LaPropState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return LaPropState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: optax.Updates,
        state: LaPropState,
        params: optax.Params | None = None,
        *,
        finite: Array | bool = True,
        **_: Any,
    ) -> tuple[optax.Updates, LaPropState]:
        del params
        count = optax.safe_increment(state.updates)
        square_correction = 1 / (1 - rms_decay ** count.astype(jnp.float32))
        momentum_correction = 1 / (1 - momentum ** count.astype(jnp.float32))
        mean_square = jax.tree.map(
            lambda mean, grad: jnp.where(
                finite, rms_decay * mean + (1 - rms_decay) * jnp.square(grad), mean
            ),
            state.mean_square,
            grads,
        )
        average = jax.tree.map(
            lambda mean, grad, square: jnp.where(
                finite,
                momentum * mean
                + (1 - momentum) * grad / (jnp.sqrt(square * square_correction) + epsilon),
                mean,
            ),
            state.momentum,
            grads,
            mean_square,
        )
        correction = jnp.where(finite, momentum_correction, 0.0)  # `average` is finite in any case
        updates = jax.tree.map(lambda mean: mean * correction, average)
        count = jnp.where(finite, count, state.updates)
        return updates, LaPropState(count, mean_square, average)

    return optax.GradientTransformationExtraArgs(init, update)


def hold_state(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state where `finite` is false; updates have to be 0 there before they come here."""

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        finite: Array | bool = True,
        **_: Any,
    ) -> tuple[optax.Updates, Any]:
        updates, moved = transformation.update(updates, state, params)
        return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def make_optimizer(config: AgentConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping, LaProp, then the learning rate, rising linearly from 0 over the first updates."""
    rate, warmup = config.learning_rate, config.warmup_updates
    schedule = optax.linear_schedule(0.0, rate, warmup) if warmup else rate
    return optax.chain(
        clip_by_tensor_norm(config.gradient_clip, config.gradient_clip_floor),
        scale_by_laprop(config.momentum, config.rms_decay, config.rms_epsilon),
        hold_state(optax.scale_by_learning_rate(schedule)),
    )
