"""What is computed before a loop, and what is left in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamerv3_jax.hoisting import hoist

pytestmark = pytest.mark.usefixtures('quick_compilation')


def scan(params, start, inputs, hoisted):
    def step(state, x):
        kernel = params['kernel'][:2].T
        scale = jnp.exp(params['scale'])
        return scale * (state @ kernel) + x['add'], {'state': state, 'constant': scale, 'x': x}

    if hoisted:
        step = hoist(step, start, jax.tree.map(lambda x: x[0], inputs))
    return jax.lax.scan(step, start, inputs)


def arguments():
    random = np.random.default_rng(0)
    params = {'kernel': random.standard_normal((4, 2)), 'scale': np.array(0.1)}
    inputs = {'add': random.standard_normal((5, 3, 2)), 'unused': None}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, np.ones((3, 2)), inputs))


def test_results_and_gradients_are_the_same():
    plain = scan(*arguments(), hoisted=False)
    jax.tree.map(np.testing.assert_allclose, scan(*arguments(), hoisted=True), plain)

    def loss(hoisted):
        def total(*arguments):
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(scan(*arguments, hoisted)))

        return jax.jit(jax.grad(total, (0, 1)))(*arguments())

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), loss(True), loss(False))


@pytest.mark.parametrize('hoisted', [True, False])
def test_what_parameters_alone_decide_is_not_in_the_loop(hoisted):
    text = str(jax.make_jaxpr(scan, static_argnums=3)(*arguments(), hoisted))
    before, inside = text.split('scan[')
    for operation in ('transpose', ' exp '):
        assert (operation in before) == hoisted
        assert (operation in inside) == (not hoisted)
    assert 'dot_general' in inside


def test_a_step_of_constants_and_of_arguments_only():
    step = hoist(lambda x: (jnp.arange(3.0), 2 * x), 0.0)
    constant, doubled = step(5.0)
    assert constant.tolist() == [0, 1, 2] and doubled == 10
