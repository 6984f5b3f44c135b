"""Networks as pairs of functions."""

import jax
import jax.numpy as jnp
import tiny_agent

from dreamerv3_jax.networks import make_networks, parameter_gradients_first
from dreamerv3_jax.spaces import ArraySpec


def test_gradients_in_order_are_the_same():
    def loss(params, x, wrapped):
        params, x = parameter_gradients_first(params, x) if wrapped else (params, x)
        return jnp.sum((params['scale'] * x + params['bias']) ** 2)

    params, x = {'scale': jnp.array([2.0, 3.0]), 'bias': jnp.array(1.0)}, jnp.array([5.0, 7.0])
    plain, ordered = (jax.grad(loss, (0, 1))(params, x, wrapped) for wrapped in (False, True))
    assert jax.tree.map(jnp.array_equal, ordered, plain) == jax.tree.map(lambda _: True, plain)
    assert ordered[1].tolist() == [2 * 11 * 2, 2 * 22 * 3]


def test_gradients_of_inputs_wait_for_those_of_parameters():
    """They are computed from all of them, also in the compiled program."""
    params, x = {'a': jnp.zeros((2, 2)), 'b': jnp.ones(3)}, jnp.ones(4, jnp.bfloat16)
    _, backward = jax.vjp(parameter_gradients_first, params, x)
    program = jax.jit(lambda *grads: backward(grads))
    for name, index in ('a', (0, 0)), ('b', 0):
        gradient = jax.tree.map(jnp.ones_like, params)
        found, of_x = program(gradient, x)
        assert of_x.dtype == jnp.bfloat16 and (of_x == 1).all()
        gradient[name] = gradient[name].at[index].set(jnp.nan)
        found, of_x = program(gradient, x)
        assert jnp.isnan(found[name]).sum() == 1 and jnp.isnan(of_x).all()


def test_images_are_pooled_in_turns_that_devices_share():
    specs = {'image': ArraySpec('image', (64, 64, 3))}
    actions = {'action': ArraySpec('discrete', (1,), (2,))}

    def turn(platform, devices):
        networks = make_networks(specs, actions, tiny_agent.config(), platform, devices)
        return networks.encoder.module.turn

    assert [turn('cpu', devices) for devices in (1, 2, 8, 3)] == [32, 32, 32, 0]
    assert turn('tpu', 2) == 0
