"""The composed loss: its weights, which step's data goes where, and what its parts are made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_agent as tiny
from tiny_agent import OBSERVATION_SPECS

from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.configs import base
from dreamerv3_jax.normalization import init_return_percentiles
from dreamerv3_jax.types import ReturnPercentiles
from dreamerv3_jax.update import loss_scales

B, T, H = tiny.SEQUENCES, tiny.STEPS, tiny.CONFIG.imagination_length
EQUAL_SCALES = dict.fromkeys(tiny.LOSSES, 1.0)


pytestmark = [pytest.mark.usefixtures('quick_compilation'), pytest.mark.medium]


def run(batch=None, percentiles=None, **params):
    """Results of `total_loss` with batch, percentiles or parameters of some networks replaced."""
    _, slow_critic, _ = tiny.trained()
    batch = tiny.batch() if batch is None else batch
    slow_critic = params.pop('slow_critic', slow_critic)
    trained = ({**tiny.parameters(), **params}, slow_critic, batch.reward)
    percentiles = init_return_percentiles() if percentiles is None else percentiles
    _, results = tiny.loss_function()(trained, percentiles, batch, jax.random.key(3), EQUAL_SCALES)
    return results


def with_bias(network, layer, change):
    """Parameters of a network with the bias of one layer changed."""
    params = tiny.parameters()[network]
    bias = jnp.asarray(change(np.asarray(params[layer]['bias'])), jnp.float32)
    return {**params, layer: {**params[layer], 'bias': bias}}


# The loss.


def test_published_weights():
    config = AgentConfig.from_mapping(base.get_config().agent)
    assert loss_scales({'image': None, 'vector': None}, config) == {
        'reconstruction/image': 1.0,
        'reconstruction/vector': 1.0,
        'reward': 1.0,
        'continue': 1.0,
        'dynamics': 1.0,
        'representation': 0.1,
        'actor': 1.0,
        'critic': 1.0,
        'replay_critic': 0.3,
    }


def test_every_weight_is_its_own():
    names = [name for name in dataclasses.asdict(tiny.CONFIG) if name.endswith('_scale')]
    names = sorted(set(names) - {'entropy_scale', 'slow_critic_scale', 'actor_output_scale'})
    config = tiny.config(**{name: float(i + 2) for i, name in enumerate(names)})
    scales = loss_scales({'x': None}, config)
    assert sorted(scales) == sorted(
        name.removesuffix('_scale').replace('reconstruction', 'reconstruction/x') for name in names
    )
    for name, scale in scales.items():
        assert scale == getattr(config, name.removesuffix('/x') + '_scale')


def test_total_is_the_weighted_sum_of_means():
    total, losses, _, _, metrics = tiny.losses()
    assert set(losses) == set(tiny.LOSSES)
    scales = loss_scales(OBSERVATION_SPECS, tiny.CONFIG)
    expected = sum(scales[name] * np.mean(loss) for name, loss in losses.items())
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for name, loss in losses.items():
        np.testing.assert_allclose(metrics[f'loss/{name}'], np.mean(loss), rtol=1e-5)
        assert loss.dtype == jnp.float32


def test_shapes_of_the_losses():
    losses = tiny.losses()[1]
    shapes = {name: loss.shape for name, loss in losses.items()}
    expected = dict.fromkeys(tiny.LOSSES, (B, T))
    # Every one of the B * T states is imagined from; the last step of a sequence has no target.
    expected |= {'actor': (B * T, H), 'critic': (B * T, H), 'replay_critic': (B, T - 1)}
    assert shapes == expected


def test_free_bits():
    # The least that dynamics and representation cost together is 1 + 0.1 * 1.
    flat = {
        name: {key: jnp.zeros_like(x) for key, x in tiny.parameters()['dynamics'][name].items()}
        for name in ('prior_logits', 'posterior_logits')
    }
    losses = run(dynamics={**tiny.parameters()['dynamics'], **flat})[1]
    assert np.all(losses['dynamics'] == 1) and np.all(losses['representation'] == 1)


def test_stored_latents_are_those_of_the_trained_steps():
    stored = tiny.losses()[2]
    assert stored.deter.shape == (B, T, 16) and stored.deter.dtype == jnp.float32
    assert stored.stoch.shape == (B, T, 4) and stored.stoch.dtype == jnp.uint8
    # Continuing from the first of them gives the rest.
    batch = tiny.batch()
    shifted = jax.tree.map(
        lambda x: np.concatenate([x[:, 1:], x[:, -1:]], 1),
        batch._replace(deter=None, stoch=None),
    )._replace(deter=stored.deter[:, 0], stoch=stored.stoch[:, 0])
    np.testing.assert_allclose(
        run(shifted)[2].deter[:, 0], stored.deter[:, 1], rtol=1e-4, atol=1e-5
    )


# Which step's data goes where.


def changed(field, step, sequence=0):
    """The batch with one entry of one step changed."""
    batch = tiny.batch()

    def change(x):
        x = np.array(x)
        x[sequence, step] = ~x[sequence, step] if x.dtype == bool else x[sequence, step] + 1
        return x

    if isinstance(getattr(batch, field), dict):
        (name,) = {'action': ['move'], 'observation': ['vector']}[field]
        return batch._replace(
            **{field: {**getattr(batch, field), name: change(getattr(batch, field)[name])}}
        )
    return batch._replace(**{field: change(getattr(batch, field))})


def test_of_the_context_step_only_latent_and_action_count():
    expected = tiny.losses()
    for field in ('observation', 'reward', 'is_first', 'is_last', 'is_terminal'):
        jax.tree.map(np.testing.assert_array_equal, run(changed(field, 0)), expected)
    stored = expected[2].deter
    assert np.any(run(changed('action', 0))[2].deter[0, 0] != stored[0, 0])
    start = tiny.batch()._replace(deter=tiny.batch().deter + 1)
    assert np.any(run(start)[2].deter[0, 0] != stored[0, 0])


@pytest.mark.parametrize('step', [1, 3])
def test_an_action_leads_to_the_next_step(step):
    # The action stored with a step was chosen there, so that step's latent does not know it.
    # Latents are counted from the first trained step, steps from the context.
    stored, other = (x[2].deter[0] for x in (tiny.losses(), run(changed('action', step))))
    np.testing.assert_array_equal(stored[:step], other[:step])
    assert np.any(stored[step] != other[step])
    last = run(changed('action', T))
    np.testing.assert_array_equal(last[2].deter, tiny.losses()[2].deter)


@pytest.mark.parametrize('step', [1, 4])
def test_a_reward_belongs_to_the_step_that_received_it(step):
    losses, other = tiny.losses()[1], run(changed('reward', step))[1]
    moved = np.flatnonzero(losses['reward'][0] != other['reward'][0])
    assert moved.tolist() == [step - 1]
    # As a target of the critic it counts for the steps before.
    moved = np.flatnonzero(losses['replay_critic'][0] != other['replay_critic'][0])
    assert moved.tolist() == list(range(step - 1))


def test_a_time_limit_is_not_a_death():
    # Sequence 1 dies at step 2 (trained step 1), sequence 2 is cut there.
    losses = tiny.losses()[1]
    weight = np.any(losses['replay_critic'] != 0, 0)
    assert not losses['replay_critic'][1, 1] and not losses['replay_critic'][2, 1]
    assert weight.all()
    # A time limit does not touch the continue loss, a death does.
    batch = tiny.batch()
    limit = run(batch._replace(is_last=np.zeros_like(batch.is_last)))[1]
    np.testing.assert_array_equal(limit['continue'], losses['continue'])
    immortal = run(batch._replace(is_terminal=np.zeros_like(batch.is_terminal)))[1]
    moved = np.argwhere(np.asarray(immortal['continue'] != losses['continue']))
    assert moved.tolist() == [[1, 1]]
    # The step before the end bootstraps unless it was a death.
    moved = np.argwhere(np.asarray(immortal['replay_critic'] != losses['replay_critic']))
    assert moved.tolist() == [[1, 0]]


def test_what_follows_an_end_does_not_count_for_the_critic():
    losses = tiny.losses()[1]['replay_critic']
    other = run(changed('reward', 4, sequence=2))[1]['replay_critic']
    moved = np.flatnonzero(np.asarray(losses[2] != other[2]))
    assert moved.tolist() == [2]  # the reset at trained step 2, and not the steps before it


# Actor and critic.


def test_a_terminal_start_has_no_weight():
    # If nothing continues, not even the start states do: no step of any trajectory counts.
    nothing = with_bias('continue_', 'output', lambda bias: bias - 1e4)
    losses = run(continue_=nothing)[1]
    assert not np.any(losses['actor']) and not np.any(losses['critic'])
    everything = with_bias('continue_', 'output', lambda bias: bias + 1e4)
    _, losses, _, _, metrics = run(continue_=everything)
    assert metrics['imagined/weight'] == 1 and np.all(losses['critic'] > 0)


def test_weights_start_with_the_continue_of_the_start():
    # A head that gives 1/2 everywhere: weights 1/2, 1/4, 1/8 of the three steps.
    half = run(continue_=jax.tree.map(jnp.zeros_like, tiny.parameters()['continue_']))[-1]
    np.testing.assert_allclose(half['imagined/continue'], 0.5)
    np.testing.assert_allclose(half['imagined/weight'], (0.5 + 0.25 + 0.125) / 3)


def test_advantages_are_divided_by_percentiles_that_include_this_batch():
    far = ReturnPercentiles(jnp.float32(-500), jnp.float32(500))
    plain, scaled = tiny.losses()[-1], run(percentiles=far)[-1]
    assert plain['return/scale'] == 1
    # A hundredth of the way from 1000 to the few units of this batch.
    np.testing.assert_allclose(scaled['return/scale'], 990, rtol=1e-2)
    np.testing.assert_allclose(
        scaled['actor/advantage'] * scaled['return/scale'], plain['actor/advantage'], rtol=1e-4
    )
    np.testing.assert_allclose(scaled['return/scale'], scaled['return/high'] - scaled['return/low'])


def test_returns_come_from_the_online_critic():
    slow_critic = tiny.perturbed(tiny.parameters()['critic'], seed=7)
    expected, other = tiny.losses(), run(slow_critic=slow_critic)
    for name in ('return/mean', 'actor/advantage', 'critic/value', 'loss/actor'):
        np.testing.assert_array_equal(expected[-1][name], other[-1][name])
    for name in ('loss/critic', 'loss/replay_critic', 'critic/slow_value'):
        assert expected[-1][name] != other[-1][name]


def test_replay_returns_bootstrap_from_imagined_ones():
    # Constant predictions: reward 0, value 0 and continue 1/2 make all imagined returns 0. What is
    # left of the replay returns are real rewards, with a critic that knows nothing: ln 255 twice
    # each.
    zeros = {
        name: jax.tree.map(jnp.zeros_like, tiny.parameters()[name]) for name in ('reward', 'critic')
    }
    _, losses, _, _, metrics = run(**zeros, slow_critic=zeros['critic'])
    assert metrics['return/mean'] == 0 and metrics['actor/advantage'] == 0
    alive = np.ones((B, T - 1))
    alive[1:, 1] = 0
    expected = 2 * np.log(255) * alive
    np.testing.assert_allclose(losses['replay_critic'], expected, rtol=1e-5)
