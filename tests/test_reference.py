"""Numbers of the published implementation (tests/reference) against ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_agent as small

from dreamerv3_jax import actions, distributions, losses, normalization, returns, rssm, transforms
from dreamerv3_jax.normalization import init_return_percentiles
from dreamerv3_jax.optimizer import make_optimizer
from dreamerv3_jax.update import total_loss


@pytest.fixture(scope='module')
def functions():
    return small.load('functions.npz')


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max() / 100
    )


def test_two_hot(functions):
    bins = transforms.two_hot_bins(255)
    close(np.sort(bins), functions['twohot_bins'])
    logits, targets = functions['twohot_logits'][:, small.bin_order()], functions['twohot_targets']
    close(
        losses.two_hot_loss(jnp.asarray(logits), jnp.asarray(targets), bins),
        functions['twohot_loss'],
    )
    close(transforms.two_hot_mean(jnp.asarray(logits), bins), functions['twohot_pred'])


def test_replay_returns(functions):
    term, last = functions['lr_term'] > 0.5, functions['lr_last'] > 0.5
    result = returns.replay_lambda_returns(
        jnp.asarray(functions['lr_rew']),
        jnp.asarray(last),
        jnp.asarray(term),
        jnp.asarray(functions['lr_boot']),
        discount=1 - 1 / 333,
        lambda_=0.95,
    )
    close(result, functions['lr_ret'])


def test_imagined_returns_and_weights(functions):
    reward, continue_, value = (
        jnp.asarray(functions[name]) for name in ('lr_rew', 'im_con', 'im_val')
    )
    close(returns.lambda_returns(reward, continue_, value, lambda_=0.95), functions['im_ret'])
    close(returns.trajectory_weights(continue_), functions['im_weight'])


def test_kl_and_entropy(functions):
    posterior, prior = (
        distributions.unimix(jnp.asarray(functions[name]), 0.01) for name in ('kl_post', 'kl_prior')
    )
    close(distributions.categorical_kl(posterior, prior).sum(-1), functions['kl'])
    close(distributions.categorical_entropy(posterior).sum(-1), functions['ent_post'])


def test_optimizer(functions):
    optimizer = make_optimizer(small.CONFIG)
    params = {'w': jnp.asarray(functions['opt_w0']), 'b': jnp.asarray(functions['opt_b0'])}
    state = optimizer.init(params)
    start = params
    for step in range(30):
        grads = {
            'w': jnp.asarray(functions['opt_gw'][step]),
            'b': jnp.asarray(functions['opt_gb'][step]),
        }
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        close(params['w'], functions['opt_w'][step])
        close(params['b'], functions['opt_b'][step])
    # The parameters hardly move in warm-up, so their movement is compared on its own, to what f32
    # can show.
    moved = np.asarray(params['w'] - start['w'])
    np.testing.assert_allclose(
        moved, functions['opt_w'][-1] - functions['opt_w0'], rtol=1e-2, atol=1e-7
    )


def test_return_normalisation(functions):
    state = init_return_percentiles()
    for step, batch in enumerate(functions['rn_x']):
        state = normalization.update_return_percentiles(
            state, jnp.asarray(batch), low_percentile=5.0, high_percentile=95.0, rate=0.01
        )
        close(state.low, functions['rn_lo'][step])
        close(normalization.return_scale(state, limit=1.0), functions['rn_scale'][step])


@pytest.fixture(scope='module')
def agent():
    return small.load('agent_small.npz')


@pytest.fixture(scope='module')
def computed(agent):
    """Loss, gradients and latents: latents at their mode, actions half a deviation off the mean."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributions, 'normal_sample', lambda uniform, mean, std: mean + 0.5 * std)
        params, slow_critic = small.parameters(agent)
        function = jax.jit(
            jax.value_and_grad(
                lambda *arguments: total_loss(
                    *arguments,
                    None,
                    networks=small.NETWORKS,
                    observation_specs=small.OBSERVATION_SPECS,
                    action_specs=small.ACTION_SPECS,
                    config=small.CONFIG,
                ),
                has_aux=True,
            )
        )
        (total, auxiliary), grads = function(
            params, slow_critic, init_return_percentiles(), small.batch(agent)
        )
    return total, *auxiliary, grads


@pytest.mark.medium
def test_agent_latents(agent, computed):
    stored = computed[2]
    close(stored.deter, agent['deter'], 1e-4)
    np.testing.assert_array_equal(stored.stoch, agent['stoch'].argmax(-1))


LOSSES = {
    'dyn': 'dynamics',
    'rep': 'representation',
    'rew': 'reward',
    'con': 'continue',
    'position': 'reconstruction/position',
    'velocity': 'reconstruction/velocity',
    'mode': 'reconstruction/mode',
    'policy': 'actor',
    'value': 'critic',
    'repval': 'replay_critic',
}


@pytest.mark.medium
@pytest.mark.parametrize('name', LOSSES)
def test_agent_losses(agent, computed, name):
    loss = computed[1][LOSSES[name]]
    if name in ('policy', 'value'):
        loss = loss.mean(-1).reshape(4, 8)
    close(loss, agent[f'loss:{name}'], 1e-4)


@pytest.mark.medium
def test_agent_total(agent, computed):
    close(computed[0], agent['total'], 1e-4)


@pytest.mark.medium
def test_agent_metrics(agent, computed):
    metrics = computed[4]
    names = {
        'world_model/prior_entropy': 'dyn_ent',
        'world_model/posterior_entropy': 'rep_ent',
        'actor/entropy': 'ent/action',
        'actor/advantage': 'adv',
        'actor/advantage_magnitude': 'adv_mag',
    }
    for ours, theirs in names.items():
        close(metrics[ours], agent[f'metric:{theirs}'], 1e-4)


@pytest.mark.medium
def test_agent_gradients(agent, computed):
    grads, count = computed[-1], 0
    for name, expected in agent.items():
        if name.startswith('gradnorm:'):
            node = grads
            for part in small.our_path(name[9:]):
                node = node[part]
            np.testing.assert_allclose(
                jnp.linalg.norm(node.reshape(-1)), expected, rtol=1e-4, err_msg=name
            )
            count += 1
    assert count == len(jax.tree.leaves(grads))


def test_actions_are_clipped_for_the_model(agent):
    action = {'action': jnp.array([[2.0, -0.5]])}
    np.testing.assert_allclose(actions.flatten_actions(action, small.ACTION_SPECS), [[1.0, -0.5]])
    assert rssm.flat(jnp.zeros((2, 8, 4))).shape == (2, 32)
