"""Training through the real loop: what flows where, and that a corridor is learned."""

import copy
from pathlib import Path
from typing import NamedTuple

import corridor
import jax
import numpy as np
import pytest

from dreamerv3_jax import evaluation, loop, policy
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.replay import Replay

ENVS, LENGTH = 4, corridor.LENGTH


pytestmark = pytest.mark.usefixtures('quick_compilation')


class Call(NamedTuple):
    name: str
    arguments: tuple
    result: object


def recorded(patch, owner, name, calls):
    """Appends copies of arguments and results of a method to `calls`, in the order of the calls."""
    method = getattr(owner, name)

    def wrapper(self, *arguments, **kwargs):
        before = copied((*arguments, *kwargs.values()))
        result = method(self, *arguments, **kwargs)
        # Not when only shapes are asked for.
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(result)):
            calls.append(Call(name, before, copied(result)))
        return result

    patch.setattr(owner, name, wrapper)


def copied(tree):
    return jax.tree.map(lambda x: np.array(x) if hasattr(x, 'shape') else copy.copy(x), tree)


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """All calls of a run of 30 ticks, in order, and its folder."""
    calls: list[Call] = []
    folder = tmp_path_factory.mktemp('corridor')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'Agent', corridor.agent)
        for name in ('init', 'policy', 'update'):
            recorded(patch, Agent, name, calls)
        for name in ('add', 'sample', 'update_latents'):
            recorded(patch, Replay, name, calls)
        with loop.Trainer(corridor.config(), folder, 'corridor') as trainer:
            recorded(patch, type(trainer._env), 'start', calls)
            recorded(patch, type(trainer._env), 'finish', calls)
            for _ in range(30):
                trainer.tick()
            trainer.save()
    return calls, folder


def of(run, *names):
    return [call for call in run[0] if call.name in names]


# What flows where.


@pytest.mark.medium
def test_the_policy_always_has_the_newest_parameters(run):
    newest, updates = None, 0
    for call in of(run, 'init', 'update', 'policy'):
        if call.name == 'init':
            newest = call.result.params
        elif call.name == 'update':
            newest, updates = call.result[0].params, updates + 1
        else:
            equal(call.arguments[0], {name: newest[name] for name in policy.NETWORKS})
    assert updates > 10


@pytest.mark.medium
def test_updates_build_on_one_another(run):
    state = of(run, 'init')[-1].result
    for call in of(run, 'update'):
        equal(call.arguments[0], state)
        state = call.result[0]


@pytest.mark.medium
def test_every_environment_keeps_its_state(run):
    policies = of(run, 'policy')
    for before, after in zip(policies, policies[1:], strict=False):
        equal(after.arguments[1], before.result[0])
    assert len(policies) == 30


@pytest.mark.medium
def test_every_call_of_the_policy_has_its_own_seed(run):
    assert len({call.arguments[4] for call in of(run, 'policy')}) == 30


@pytest.mark.medium
def test_actions_reach_the_environments_and_observations_the_policy(run):
    calls = of(run, 'policy', 'start', 'finish')
    assert [call.name for call in calls] == ['policy', 'start', 'finish'] * 30
    acting, starts, finishes = calls[::3], calls[1::3], calls[2::3]
    for act, start, finish, after in zip(acting, starts, finishes, acting[1:], strict=False):
        equal(start.arguments[0], act.result[1])
        equal(after.arguments[2], finish.result[0].observation)
        equal(after.arguments[3], finish.result[0].is_first)


@pytest.mark.medium
def test_everything_but_acting_is_done_while_environments_step(run):
    """But for the first update of each step, which starts just before they do."""
    order = [call.name for call in of(run, 'policy', 'start', 'add', 'sample', 'update', 'finish')]
    for name, after in {'add': 'start', 'sample': 'start', 'update': 'policy'}.items():
        places = [place for place, found in enumerate(order) if found == name]
        assert len(places) > 10
        for place in places:
            start = place - order[place::-1].index(after)
            assert not {'finish', 'policy'} & set(order[start + 1 : place])
    between = ' '.join(order).split('policy')[1:]  # from one choice of actions to the next
    assert all(text.split('start')[0].count('update') <= 1 for text in between)


@pytest.mark.medium
def test_batches_are_what_was_sampled(run):
    *samples, ahead = of(run, 'sample')
    for sample, update in zip(samples, of(run, 'update'), strict=True):
        batch, drawn = update.arguments[1], sample.result[0]
        for name in ('reward', 'is_first', 'is_last', 'is_terminal', 'deter', 'stoch'):
            equal(getattr(batch, name), drawn[name])
        for name, value in batch.observation.items():
            equal(value, drawn[f'observation/{name}'])
        equal(batch.action, {'action': drawn['action/action']})


@pytest.mark.medium
def test_latents_are_written_back_to_where_they_were_sampled(run):
    samples, updates, written = (of(run, name) for name in ('sample', 'update', 'update_latents'))
    del samples[-1]  # for the next update
    assert len(written) == len(updates) > 10
    for sample, update, write in zip(samples, updates, written, strict=True):
        index, deter, stoch = write.arguments
        equal(index, sample.result[1])
        equal(deter, update.result[1].deter)
        equal(stoch, update.result[1].stoch)
    # Each batch is drawn while an update is under way; the one before was written back by then.
    order = [call.name for call in of(run, 'sample', 'update', 'update_latents')]
    first = ['sample', 'update', 'sample', 'update']
    turns = ['update_latents', 'sample', 'update'] * (len(updates) - 2)
    assert order == [*first, *turns, 'update_latents', 'sample', 'update_latents']


# Evaluation.


@pytest.mark.medium
@pytest.mark.parametrize('sample', [False, True])
def test_a_player_takes_the_most_probable_action_unless_told_otherwise(run, sample, monkeypatch):
    monkeypatch.setattr(evaluation, 'Agent', corridor.agent)
    calls: list[Call] = []
    recorded(monkeypatch, Agent, 'policy', calls)
    options = {'sample': True} if sample else {}
    player = evaluation.Player(
        run[1], corridor.OBSERVATION_SPECS, corridor.ACTION_SPECS, count=ENVS, **options
    )
    played = []
    for step in range(12):
        observation = {
            'door': np.full((ENVS, 1), step % 3, np.int32),
            'room': np.zeros((ENVS, 1), np.float32),
        }
        played.append(player.act(observation, np.full(ENVS, step % 6 == 0))['action'])
    parameters = of(run, 'update')[-1].result[0].params
    best = []
    for before, call, action in zip([None, *calls], calls, played, strict=False):
        equal(call.arguments[0], parameters)
        equal(call.result[1]['action'], action)
        if before is not None:
            equal(call.arguments[1], before.result[0])
        latent = call.result[0].latent
        stoch = latent.stoch.reshape(ENVS, -1)
        actor = corridor.agent().networks.actor
        (logits,) = actor(parameters['actor'], latent.deter, stoch)['action']
        best.append(np.array_equal(action[:, 0], logits.argmax(-1)))
    # A hardly trained policy is close to uniform: 48 samples are all the best with probability
    # 1e-20.
    assert all(best) if not sample else not all(best)
    assert len({call.arguments[4] for call in calls}) == 12


# Learning.


def returns_of(trainer):
    """Collects the returns of the episodes that end, in a list that grows with the ticks."""
    returns: list[float] = []
    add = trainer._writer.add_episode
    trainer._writer.add_episode = lambda score, length: (returns.append(score), add(score, length))
    return returns


@pytest.mark.medium
def test_the_corridor_is_learned(tmp_path: Path, monkeypatch):
    """Chance opens half a door of five."""
    monkeypatch.setattr(loop, 'Agent', corridor.agent)
    with loop.Trainer(corridor.config(), tmp_path, 'corridor') as trainer:
        returns = returns_of(trainer)
        for _ in range(1200):
            trainer.tick()
            if len(returns) > 100 and np.mean(returns[-60:]) > 4.6:
                break
        assert np.mean(returns[:40]) < 1.5
        assert np.mean(returns[-60:]) > 4.6, np.mean(returns[-60:])
        trainer.save()
    monkeypatch.setattr(evaluation, 'Agent', corridor.agent)
    # In some episodes of a good policy a latent is drawn from the 1% of the uniform distribution.
    # Policies of several seeds had means from 4.5 to 4.9.
    result = evaluation.evaluate(tmp_path, episodes=100)
    assert result['mean'] > 4.5 and result['lengths'].count(LENGTH) >= 75
