"""Lambda-returns and trajectory weights (paper, "Critic learning", eq. 5)."""

import chex
import jax
import jax.numpy as jnp

from dreamerv3_jax.types import Array


def _discounted(addend: Array, factor: Array, last: Array) -> Array:
    """Solves `R_t = addend_t + factor_t R_{t+1}` backwards, [N, L], with `R_L = last` [N]."""

    def step(later: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        now = inputs[0] + inputs[1] * later
        return now, now

    _, result = jax.lax.scan(step, last, (addend.T, factor.T), reverse=True, unroll=8)
    return result.T


def lambda_returns(reward: Array, continue_: Array, value: Array, *, lambda_: float) -> Array:
    """Returns of imagined trajectories.

    `R_t = r_{t+1} + c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1})`, `R_H = v_H` for t = 0..H-1,
    where the continue probability c already contains the discount.

    Args:
      reward: [N, H + 1] float32; the first is not used.
      continue_: [N, H + 1] float32 in 0..1; the first is not used.
      value: [N, H + 1] float32 of the online critic; the first is not used.
      lambda_: share of the longer return.

    Returns:
      [N, H] float32.
    """
    chex.assert_rank(reward, 2)
    chex.assert_equal_shape([reward, continue_, value])
    reward, continue_, value = reward[:, 1:], continue_[:, 1:], value[:, 1:]
    return _discounted(
        reward + continue_ * (1 - lambda_) * value, continue_ * lambda_, value[:, -1]
    )


def replay_lambda_returns(
    reward: Array,
    is_last: Array,
    is_terminal: Array,
    bootstrap: Array,
    *,
    discount: float,
    lambda_: float,
) -> Array:
    """Returns of replayed trajectories, bootstrapped from imagined returns.

    `R_t = r_{t+1} + live_{t+1} ((1 - cont_{t+1}) b_{t+1} + cont_{t+1} R_{t+1})`, the last R is b,
    with `live = (1 - is_terminal) discount` and `cont = (1 - is_last) lambda`. A truncated episode
    bootstraps, a terminated one does not.

    Args:
      reward: [B, T] float32.
      is_last: [B, T] bool, the step ends an episode in any way.
      is_terminal: [B, T] bool, the step ends an episode by termination.
      bootstrap: [B, T] float32, the return imagined from each step.
      discount: factor per step.
      lambda_: share of the longer return.

    Returns:
      [B, T - 1] float32 for all steps but the last.
    """
    chex.assert_rank(reward, 2)
    chex.assert_equal_shape([reward, is_last, is_terminal, bootstrap])
    live = (1.0 - is_terminal[:, 1:].astype(jnp.float32)) * discount
    continue_ = (1.0 - is_last[:, 1:].astype(jnp.float32)) * lambda_
    addend = reward[:, 1:] + live * (1 - continue_) * bootstrap[:, 1:]
    return _discounted(addend, live * continue_, bootstrap[:, -1])


def trajectory_weights(continue_: Array) -> Array:
    """Probability `w_t = c_0 c_1 ... c_t` that an imagined trajectory still goes on at each step.

    The start state's own continue prediction is included, so a terminal start has a weight near 0.

    Args:
      continue_: [N, L] float32 in 0..1.

    Returns:
      [N, L] float32.
    """
    chex.assert_rank(continue_, 2)
    return jnp.cumprod(continue_, 1)
