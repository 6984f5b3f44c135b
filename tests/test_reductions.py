"""Maxima and sums: by hand, against numpy, and their gradients."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from dreamerv3_jax import reductions

pytestmark = pytest.mark.usefixtures('quick_compilation')
WIDTHS = [1, 15, 16, 17, 32, 255]


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_by_hand():
    x = jnp.array([[1.0, 5.0, 2.0], [-3.0, -1.0, -2.0]])
    assert reductions.max_of_rows(x).tolist() == [5, -1]
    assert reductions.sum_of_rows(x).tolist() == [8, -6]
    close(reductions.log_sum_exp(jnp.log(jnp.array([1.0, 2.0, 5.0]))), np.log(8))


@pytest.mark.parametrize('width', WIDTHS)
def test_rows(width):
    x = random(2, 3, width)
    assert np.array_equal(reductions.max_of_rows(x), np.max(x, -1))
    close(reductions.sum_of_rows(x), np.sum(x, -1))
    close(reductions.log_sum_exp(x), jax.nn.logsumexp(x, -1))


@pytest.mark.parametrize('position', [0, 15, 16, 31, 32, 39])
def test_a_number_counts_wherever_it_stands(position):
    x = jnp.full((1, 40), -1.0).at[0, position].set(2.0)
    assert reductions.max_of_rows(x).tolist() == [2]
    assert reductions.sum_of_rows(x).tolist() == [-37]
    nan = x.at[0, position].set(jnp.nan)
    assert np.isnan(reductions.max_of_rows(nan)).all()
    assert np.isnan(reductions.log_sum_exp(nan)).all()


def test_large_numbers_do_not_overflow():
    assert reductions.log_sum_exp(jnp.array([1000.0, 1000.0])) == 1000 + np.float32(np.log(2))
    assert reductions.log_sum_exp(jnp.array([-1000.0, -2000.0])) == -1000


@pytest.mark.parametrize('width', WIDTHS)
def test_gradients(width):
    x, weight = random(32, width), random(32, seed=1)
    close(jax.grad(lambda x: reductions.sum_of_rows(x) @ weight)(x), jnp.tile(weight, (width, 1)).T)
    gradient = jax.grad(lambda x: reductions.log_sum_exp(x) @ weight)(x)
    close(gradient, weight[:, None] * jax.nn.softmax(x, -1))
    assert not np.any(jax.grad(lambda x: reductions.max_of_rows(x).sum())(x))


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=70), st.floats(-20, 20, width=32)
)
def test_log_sum_exp_moves_with_its_input(values, shift):
    x = np.array(values, np.float32)
    moved = reductions.log_sum_exp(jnp.asarray(x + np.float32(shift)))
    np.testing.assert_allclose(moved, reductions.log_sum_exp(jnp.asarray(x)) + shift, atol=1e-4)


def test_other_platforms_reduce_as_they_do():
    text = str(
        jax.export.export(jax.jit(reductions.max_of_rows), platforms=['tpu'])(
            jax.ShapeDtypeStruct((4, 255), jnp.float32)
        ).mlir_module()
    )
    assert 'slice' not in text and text.count('stablehlo.reduce(') == 1
