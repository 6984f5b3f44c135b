"""A run that is stopped and goes on equals the run that was not stopped, bit for bit.

Environments cannot be saved: they begin new episodes. So the stops here come at the ends of
episodes, in an environment whose episodes do not depend on anything but the actions; or they come
anywhere, and the environments are handed on.
"""

import contextlib
import copy
import shutil

import jax
import numpy as np
import pytest
import tiny_runs

from dreamerv3_jax.errors import Failure
from dreamerv3_jax.interrupts import Interrupted
from dreamerv3_jax.learner import MOST_SKIPPED
from dreamerv3_jax.loop import Trainer

TICKS, LENGTH = 72, 3


pytestmark = pytest.mark.usefixtures('quick_compilation', 'shared_agents')


def clockwork_config(**changes):
    """Updates from every kind of sequence: fresh ones, uniform ones, some overwritten by now."""
    changes = {'replay__capacity': 90, 'replay__train_ratio': 52.5, **changes}
    return tiny_runs.run_config('toy_envs:Clockwork', env__kwargs={'length': LENGTH}, **changes)


def everything(trainer):
    """All that a run is, apart from its environments."""
    trainer._learner.finish()
    replay = trainer._learner.feed.state()
    return (
        jax.tree.map(np.array, trainer._learner.state),
        {name: array.copy() for name, array in replay['arrays'].items()},
        replay['metadata'],
        dict(trainer.counters),
        trainer._learner.ratio.state(),
    )


def play(config, folder, stops=(), interrupted=False):
    """Plays all ticks, and saves and starts anew after some of them; returns everything.

    If it is interrupted, a signal comes amid the updates of these ticks, and the environments and
    what the policy remembers of them are handed on.
    """
    trainer = Trainer(config, folder, 'tiny')
    for stop in [*stops, TICKS]:
        while trainer.counters['ticks'] < stop:
            if trainer.counters['ticks'] == stop - 1 and interrupted and stop < TICKS:
                interrupt_after(trainer, 2)
            with contextlib.suppress(Interrupted):
                trainer.tick()
        if stop < TICKS:
            before, env = trainer, copy.copy(trainer._env)
            with trainer:
                trainer.save()
            trainer = Trainer(config, folder, 'tiny')
            if interrupted:
                assert before._learner.ratio._credit >= 1
                records, _ = env.finish()
                env.reset = lambda records=records: records
                trainer._env.close()
                trainer._env, trainer._policy_state = env, before._policy_state
    with trainer:
        return everything(trainer)


def interrupt_after(trainer, updates):
    make_update, last = trainer._learner.update, trainer.counters['updates'] + updates

    def update():
        make_update()
        if trainer.counters['updates'] == last:
            trainer._interrupts.received.append(15)

    trainer._learner.update = update


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])
    assert found[2:] == expected[2:]


def random_stops(seed, period):
    ends = np.arange(period, TICKS, period)
    return sorted(np.random.default_rng(seed).choice(ends, 3, replace=False).tolist())


@pytest.mark.medium
@pytest.mark.parametrize(
    ('on_disk', 'vectorization', 'autoreset', 'period', 'seeds'),
    [
        (False, 'sync', 'next_step', LENGTH + 1, (0, 1)),
        (True, 'sync', 'next_step', LENGTH + 1, (2,)),
        (True, 'async', 'same_step', LENGTH, (3,)),
    ],
)
def test_three_stops_change_nothing(on_disk, vectorization, autoreset, period, seeds, tmp_path):
    config = clockwork_config(
        replay__on_disk=on_disk, env__vectorization=vectorization, env__autoreset=autoreset
    )
    expected = play(config, tmp_path / 'whole')
    state, _, metadata, counters, _ = expected
    assert counters['ticks'] == TICKS and counters['updates'] > 60 < state.updates
    for seed in seeds:
        stops = random_stops(seed, period)
        assert_equal(play(config, tmp_path / str(seed), stops), expected)


@pytest.mark.medium
def test_a_signal_amid_updates_changes_nothing(tmp_path):
    """The updates that were due make way for saving, and are made first when the run goes on."""
    config = tiny_runs.run_config('toy_envs:Counter', replay__train_ratio=128.0)
    config.env.kwargs = {'length': 5}  # four updates per step, and none where episodes end
    stops = [20, 45, 63]
    expected = play(config, tmp_path / 'whole')
    assert_equal(play(config, tmp_path / 'cut', stops, interrupted=True), expected)


@pytest.mark.medium
def test_going_on_twice_is_the_same(tmp_path):
    """Also where episodes begin at random: the seed of a start comes from what was saved."""
    config = tiny_runs.run_config('toy_envs:Counter')
    with tiny_runs.ticked(config, tmp_path / 'one', 20) as trainer:
        trainer.save()
    shutil.copytree(tmp_path / 'one', tmp_path / 'other')
    found = []
    for name in ('one', 'other'):
        with tiny_runs.ticked(config, tmp_path / name, 20) as trainer:
            found.append(everything(trainer))
    assert found[0][3]['ticks'] == 40 and found[0][3]['updates'] > 10
    assert_equal(*found)


def test_skipped_updates_in_a_row_are_counted_across_stops(tmp_path):
    """Or a run that is stopped often would never say that its updates change nothing."""
    config = clockwork_config()
    with tiny_runs.ticked(config, tmp_path, 4) as trainer:
        skipped = {'loss/reward': np.float32(np.nan), 'optimizer/skipped': np.float32(1)}
        trainer._learner._pending = [(None, None, skipped)]
        trainer.save()
    with Trainer(config, tmp_path, 'tiny') as trainer:
        assert trainer.counters['skipped_in_a_row'] == trainer.counters['skipped'] == 1
        trainer.counters['skipped_in_a_row'] = MOST_SKIPPED  # a signal came with the last of them
        trainer.save()
        trainer.counters['ticks'] += 1
        trainer.save()
    with Trainer(config, tmp_path, 'tiny') as trainer:
        trainer._learner._pending = [(None, None, skipped)]
        with pytest.raises(Failure, match='in a row were skipped'):
            trainer._learner.finish()
