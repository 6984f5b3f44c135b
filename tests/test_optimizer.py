"""Adaptive clipping, LaProp and the warm-up: by hand, and their laws."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from tiny_agent import config

from dreamerv3_jax.optimizer import clip_by_tensor_norm, make_optimizer, scale_by_laprop

PUBLISHED = dict(momentum=0.9, rms_decay=0.999, epsilon=1e-20)


def clipped(grads, params, clip=0.3, floor=1e-3):
    transformation = clip_by_tensor_norm(clip, floor)
    return transformation.update(grads, transformation.init(params), params)[0]


def run(transformation, grads, params):
    """Updates for a row of gradients, with the parameters held."""
    state, updates = transformation.init(params), []
    for grad in grads:
        update, state = transformation.update(grad, state, params)
        updates.append(update)
    return updates


def test_clipping_by_hand():
    # |g| = 5 and |theta| = 1: scaled by 0.3 / 5.
    updates = clipped(jnp.array([3.0, -4.0]), jnp.array([0.6, 0.8]))
    np.testing.assert_allclose(updates, [0.18, -0.24], rtol=1e-6)


def test_small_gradients_are_not_clipped():
    grad = jnp.array([0.1, 0.2])
    np.testing.assert_array_equal(clipped(grad, jnp.array([3.0, 4.0])), grad)


def test_parameters_at_zero_can_move():
    # |theta| counts as 1e-3 at least: 0.3 * 1e-3 / 5.
    updates = clipped(jnp.array([3.0, 4.0]), jnp.zeros(2))
    np.testing.assert_allclose(updates, [1.8e-4, 2.4e-4], rtol=1e-5)
    np.testing.assert_array_equal(clipped(jnp.zeros(2), jnp.zeros(2)), 0)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(1e-6, 1e3))
def test_clipping_shortens_only(seed, grad_scale, param_scale):
    rng = np.random.default_rng(seed)
    grad = (grad_scale * rng.standard_normal((3, 4))).astype(np.float32)
    param = (param_scale * rng.standard_normal((3, 4))).astype(np.float32)
    update = np.asarray(clipped(grad, param))
    limit = 0.3 * max(1e-3, np.linalg.norm(param))
    expected = min(np.linalg.norm(grad), limit)
    np.testing.assert_allclose(np.linalg.norm(update), expected, rtol=1e-4)
    np.testing.assert_allclose(update / expected, grad / np.linalg.norm(grad), atol=1e-4)


def test_every_tensor_is_clipped_on_its_own_and_as_a_whole():
    grads = {'a': jnp.array([[3.0, 0.0], [0.0, 4.0]]), 'b': jnp.array([0.01, 0.0])}
    params = {'a': jnp.array([[1.0, 0.0], [0.0, 0.0]]), 'b': jnp.array([1.0, 0.0])}
    updates = clipped(grads, params)
    # One norm for the matrix, though one of its rows of parameters is zero.
    np.testing.assert_allclose(updates['a'], [[0.18, 0], [0, 0.24]], rtol=1e-6)
    np.testing.assert_array_equal(updates['b'], grads['b'])


def test_laprop_by_hand():
    # Step 1, g = 2: mean square corrected 4, normalised 1; momentum corrected 1. Step 2, g = -4:
    # mean square 0.999 * 0.004 + 0.001 * 16 = 0.019996, corrected / 0.001999 = 10.003, root
    # 3.16275, normalised -1.264721; momentum 0.9 * 0.1 - 0.1 * 1.264721 = -0.0364721, corrected /
    # 0.19 = -0.191958. (Adam would average first: 0.9 * 0.2 - 0.4 = -0.22, / 0.19 / 3.16275 =
    # -0.3661.)
    updates = run(scale_by_laprop(**PUBLISHED), jnp.array([[2.0], [-4.0]]), jnp.zeros(1))
    np.testing.assert_allclose(updates, [[1.0], [-0.191958]], rtol=1e-4)


def test_first_update_is_the_sign_whatever_the_size():
    grads = jnp.array([1e-8, -1e8, 3.0, 0.0])
    (update,) = run(scale_by_laprop(**PUBLISHED), [grads], jnp.zeros(4))
    np.testing.assert_allclose(update, [1, -1, 1, 0], rtol=1e-5)


def test_equal_gradients_give_updates_of_one():
    updates = run(scale_by_laprop(**PUBLISHED), [jnp.array([-7.0])] * 20, jnp.zeros(1))
    np.testing.assert_allclose(updates, -np.ones((20, 1)), rtol=1e-4)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_laprop_forgets_the_scale(seed, factor):
    grads = jnp.asarray(np.random.default_rng(seed).standard_normal((4, 3)), jnp.float32)
    plain = run(scale_by_laprop(**PUBLISHED), grads, jnp.zeros(3))
    scaled = run(scale_by_laprop(**PUBLISHED), grads * jnp.float32(factor), jnp.zeros(3))
    np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-5)


def test_momentum_of_one_large_gradient_is_short():
    # LaProp remembers the normalised gradient, in which a spike of 1000 among ten ones is no more
    # than 2.4. RMSProp would make a step of that size, Adam one of half and small ones for long.
    grads = [jnp.ones(1)] * 5 + [jnp.full(1, 1000.0)] + [jnp.ones(1)] * 5
    updates = np.abs(run(scale_by_laprop(**PUBLISHED), grads, jnp.zeros(1)))
    assert updates.max() == pytest.approx(1.309, rel=1e-3)


def test_learning_rate_rises_from_zero():
    optimizer = make_optimizer(config(learning_rate=0.1, warmup_updates=4))
    # The parameter is so large that nothing is clipped; equal gradients make LaProp's updates 1.
    updates = run(optimizer, [jnp.ones(1)] * 7, jnp.full(1, 1e6))
    expected = -0.1 * np.array([0, 0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(np.ravel(updates), expected, rtol=1e-4, atol=1e-9)


def test_published_learning_rate():
    optimizer = make_optimizer(config())
    state = optimizer.init(jnp.full(1, 1e6))
    step = jax.jit(optimizer.update)
    sizes = []
    for _ in range(1003):
        update, state = step(jnp.ones(1), state, jnp.full(1, 1e6))
        sizes.append(-float(update[0]))
    # 4e-5 * n / 1000, then constant.
    np.testing.assert_allclose([sizes[i] for i in (0, 1, 500, 1000, 1002)],
        [0, 4e-8, 2e-5, 4e-5, 4e-5], rtol=1e-3)  # fmt: skip


def test_gradients_are_clipped_before_they_are_normalised():
    # A spike is cut to 0.3 |theta| first, and so leaves the mean square almost alone.
    optimizer = make_optimizer(config(learning_rate=1.0, warmup_updates=1))
    grads = [jnp.full(1, x) for x in (0.3, 0.3, 1e4, 0.3)]
    updates = run(optimizer, grads, jnp.ones(1))
    np.testing.assert_allclose(np.ravel(updates)[1:], [-1, -1, -1], rtol=1e-3)


@pytest.mark.parametrize('start', [-3.0, 5.0])
def test_it_descends(start):
    optimizer = make_optimizer(config(learning_rate=0.1, warmup_updates=1))
    x = jnp.full(1, start)
    state = optimizer.init(x)
    step = jax.jit(optimizer.update)
    for _ in range(200):
        update, state = step(2 * (x - 1), state, x)
        x = optax.apply_updates(x, update)
    np.testing.assert_allclose(x, [1], atol=0.1)


def test_without_warm_up_the_rate_is_full_at_once():
    optimizer = make_optimizer(config(learning_rate=0.1, warmup_updates=0))
    updates = run(optimizer, [jnp.ones(1)] * 2, jnp.full(1, 1e6))
    np.testing.assert_allclose(np.ravel(updates), [-0.1, -0.1], rtol=1e-4)
