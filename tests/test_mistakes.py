"""Mistakes that others made with this algorithm, and the tests that fail when they are put in.

Lambda-return off by one: test_returns (slow loops, by hand).
Action, observation or reward paired off by one: test_total_loss
    (test_an_action_leads_to_the_next_step, test_a_reward_belongs_to_the_step_that_received_it),
    test_loop (test_replay_holds_the_true_stream), test_corridor (test_the_corridor_is_learned).
Free bits per group: test_losses (test_free_bits_hold_for_the_sum_of_the_groups).
KL, imagination or policy without unimix: test_rssm (*_one_percent_uniform), test_actions
    (test_one_percent_is_uniform).
Balance weights swapped: test_losses
    (test_dynamics_moves_the_prior_and_representation_the_posterior), test_total_loss
    (test_published_weights, test_every_weight_is_its_own).
Previous action not reset, or one step late: test_rssm (test_nothing_passes_a_reset), test_policy
    (test_the_state_is_remembered_until_a_reset), test_envs
    (test_streams_equal_hand_stepped_environments).
Truncation treated as termination: test_returns (test_termination_does_not_bootstrap_*),
    test_total_loss (test_a_time_limit_is_not_a_death).
Root continue missing from the weights: test_returns (test_weights_by_hand), test_total_loss
    (test_weights_start_with_the_continue_of_the_start, test_a_terminal_start_has_no_weight).
Two-hot decode not exactly 0 at the start: test_transforms
    (test_equal_logits_decode_to_exactly_zero), test_nets (*_start_at_exactly_zero).
Large values clipped wrongly: test_transforms (test_values_beyond_the_bins_go_to_the_end_bins,
    test_large_values_are_not_clipped_early).
Block-linear fan-in: test_layers (test_block_linear_starts_with_the_fan_in_of_the_whole_input).
Epsilon of RMSNorm: test_layers (test_epsilon_of_rms_norm).
Carry of a scan changes its dtype under bfloat16: test_rssm (test_scans_carry_the_compute_dtype),
    test_update (test_bfloat16_*).
Latents written to the wrong steps, or never: test_replay, test_replay_model, test_corridor
    (test_latents_are_written_back_to_where_they_were_sampled), test_loop (test_training_ticks).
Actor plays with stale parameters: test_corridor (test_the_policy_always_has_the_newest_parameters),
    test_policy (test_the_agent_acts_with_the_parameters_it_is_given).
Actor plays with another environment's state: test_corridor
    (test_every_environment_keeps_its_state), test_policy (test_environments_do_not_see_each_other).
Evaluation samples: test_policy (test_the_mode_*, test_the_agent_takes_the_mode_only_if_asked),
    test_corridor (test_a_player_takes_the_most_probable_action_unless_told_otherwise).
Frame skip ends after the first episode: test_envs
    (test_repeat_is_counted_exactly_and_ends_with_the_episode).
Black first Atari frame: test_suites (test_first_frame_shows_only_the_first_screen).
Gradients of replay critic, critic or actor where they do not belong: below, and test_losses.
"""

import jax
import numpy as np
import pytest
import tiny_agent as tiny

MODEL = {'dynamics', 'encoder'}
TRAINED = {
    'reconstruction/mode': MODEL | {'decoder'},
    'reconstruction/vector': MODEL | {'decoder'},
    'reward': MODEL | {'reward'},
    'continue': MODEL | {'continue_'},
    'dynamics': MODEL,
    'representation': MODEL,
    # On replayed states the critic shapes the model; on imagined ones none leaves the two.
    'replay_critic': MODEL | {'critic'},
    'actor': {'actor'},
    'critic': {'critic'},
}


pytestmark = pytest.mark.usefixtures('quick_compilation')


def nonzero(tree):
    return any(np.any(x) for x in jax.tree.leaves(tree))


@pytest.mark.medium
@pytest.mark.parametrize('loss', TRAINED)
def test_each_loss_trains_its_networks(loss):
    params, _, _ = tiny.gradients(loss)
    assert {name for name, tree in params.items() if nonzero(tree)} == TRAINED[loss]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))


def test_every_loss_is_listed():
    assert set(TRAINED) == set(tiny.LOSSES)


def layers(tree):
    """Names of the parts of the recurrent model that learn."""
    return {name for name, layer in tree['dynamics'].items() if nonzero(layer)}


def test_reward_shapes_the_latents():
    # Through the sampled posterior, and through the recurrent state back to actions and latents
    # before.
    learned = layers(tiny.gradients('reward')[0])
    assert {'posterior_logits', 'posterior_first', 'gates', 'recurrent', 'action_in'} <= learned
    assert not learned & {'prior_logits', 'prior_hidden'}
    assert layers(tiny.gradients('replay_critic')[0]) == learned


def test_dynamics_trains_the_prior_and_representation_does_not():
    prior = {'prior_logits', 'prior_hidden'}
    assert prior <= layers(tiny.gradients('dynamics')[0])
    assert not prior & layers(tiny.gradients('representation')[0])
    assert {'posterior_logits', 'posterior_first'} <= layers(tiny.gradients('representation')[0])


@pytest.mark.parametrize('loss', ['actor', 'critic', 'replay_critic'])
def test_targets_do_not_learn(loss):
    # Neither the slow critic nor what the returns are made of; only the reward head fits the
    # rewards.
    _, slow_critic, reward = tiny.gradients(loss)
    assert not nonzero(slow_critic) and not np.any(reward)


def test_reconstruction_learns_all_of_the_decoder():
    for name, other in (('mode', 'vector'), ('vector', 'mode')):
        decoder = tiny.gradients(f'reconstruction/{name}')[0]['decoder']
        learned = {layer for layer, tree in decoder.items() if nonzero(tree)}
        assert learned == {'mlp', f'output_{name}'} and f'output_{other}' in decoder


def test_all_parts_of_the_actor_learn():
    actor = tiny.gradients('actor')[0]['actor']
    assert all(nonzero(layer) for layer in actor.values())
    assert set(actor) == {'mlp', 'logits_button', 'mean_move', 'std_move'}
