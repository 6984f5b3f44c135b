"""The agent's state, and the updates of it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dreamerv3_jax import sharding
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.checkpoint import Saved
from dreamerv3_jax.errors import Failure
from dreamerv3_jax.feed import Feed
from dreamerv3_jax.metrics import Means
from dreamerv3_jax.progress import Timer
from dreamerv3_jax.replay import Replay, SampleIndex
from dreamerv3_jax.train_ratio import TrainRatio
from dreamerv3_jax.train_state import TrainState
from dreamerv3_jax.types import Metrics, StoredLatent

MOST_SKIPPED = 10  # updates in a row


class Learner:
    """Makes the updates that are due, and writes their latents to the replay.

    Updates run beside the caller: while one is under way the results of the one before are used and
    the next batch is drawn and sent, so that devices do not wait for it. What is done to the replay
    is done in one order, whenever the devices are done.

    Attributes:
      state: after the last update, which may be under way.
      feed: of batches.
      ratio: of updates to steps.
    """

    def __init__(
        self,
        agent: Agent,
        state: TrainState,
        replay: Replay,
        ratio: TrainRatio,
        *,
        counters: dict[str, int],
        timer: Timer,
        say: Callable[[str], None],
    ) -> None:
        """Prepares; nothing is drawn yet.

        Args:
          agent: makes the updates.
          state: to begin with.
          replay: holds the steps.
          ratio: says how many updates are due.
          counters: of the run; 'updates', 'skipped' and 'skipped_in_a_row' are counted here.
          timer: of the run.
          say: tells the user.
        """
        self.state, self.feed, self.ratio = state, Feed(replay, agent), ratio
        self._agent, self._replay = agent, replay
        self._counters, self._timer, self._say = counters, timer, say
        # Updates whose results were not used: one under way and, for a moment, the one before.
        self._pending: list[tuple[SampleIndex, StoredLatent, Metrics]] = []
        self._metrics = Means()  # of updates whose results were used, since they were taken
        self._newest: Metrics = {}
        self._acting_params: Any = None  # after the last update
        # Accelerators run what they are given in order, so it is given early.
        self._queues = agent.mesh.devices.flat[0].platform != 'cpu'
        self._begun = False  # the newest update was started, and nothing was done after it

    @property
    def acting_params(self) -> Any:
        """Newest parameters for `Agent.policy`; where there are many hosts, all ask at a time.

        On a device of their own they are those before the newest update, which is under way.
        """
        if self._acting_params is None:
            self._acting_params = self._agent.acting_params(self.state)
        return self._acting_params

    def wait(self) -> None:
        """Waits on a CPU until the parameters to act by are there; others queue what uses them."""
        if not self._agent.acting and not self._queues:
            jax.block_until_ready(self.state.updates)

    def begin(self, steps: int, stopped: Callable[[], bool]) -> None:
        """Starts the first update that is due, if its batch was sent; `train` makes the others.

        Then waits for the update before, by which the policy acts, where `wait` did not.

        Args:
          steps: of all environments, from the start of the run.
          stopped: whether to make no further update.
        """
        before = self._newest
        if self.feed.ready:  # the ratio counts from the first batch on
            due = self.ratio.due(steps)
            if due and not stopped():
                self._start()
                due -= 1
            self.ratio.give_back(due)
        if not self._agent.acting and self._queues:
            with self._timer.section('update'):
                jax.block_until_ready(before)

    def train(self, steps: int, stopped: Callable[[], bool]) -> None:
        """Makes the updates that are due after so many steps; those left are due at the next call.

        Args:
          steps: of all environments, from the start of the run.
          stopped: whether to make no further update.

        Raises:
          Failure: too many updates in a row were skipped.
        """
        due = self.ratio.due(steps)
        if self._begun:
            self._go_on()
        while due and not stopped():
            self.update()
            due -= 1
        self.ratio.give_back(due)

    def update(self) -> None:
        """Starts an update, uses the results of the one before, and draws the next batch."""
        self._start()
        self._go_on()

    def _start(self) -> None:
        with self._timer.section('replay'):
            batch, index = self.feed.take()
        with self._timer.section('update'):
            before = self._agent.acting_params(self.state) if self._agent.acting else None
            self.state, latents, metrics = self._agent.update(self.state, batch)
        self._acting_params, self._begun = before, True
        self._pending.append((index, latents, metrics))
        self._newest = metrics
        self._counters['updates'] += 1

    def _go_on(self) -> None:
        self._begun = False
        with self._timer.section('update'):
            for _ in self._pending[:-1]:
                self._use()
        with self._timer.section('replay'):
            self.feed.prepare()

    def finish(self) -> None:
        """Waits for the update under way, if there is one, and writes its latents.

        The next actions are by the newest parameters, as they are when a run goes on.

        Raises:
          Failure: too many updates in a row were skipped.
        """
        with self._timer.section('update'):
            while self._pending:
                self._use()
        self._acting_params = None

    def _use(self) -> None:
        """Uses the results of the first update in the row: its metrics and, if it was not skipped,
        its latents. Of one that was skipped there is no metric but 'optimizer/skipped'."""
        index, latents, metrics = self._pending.pop(0)
        metrics, skipped = jax.device_get(metrics), 'optimizer/skipped'
        if metrics[skipped]:
            self._metrics.add({skipped: metrics[skipped]}, 'train/')
            self._count_skipped(metrics)
            return
        self._metrics.add(metrics, 'train/')
        self._counters['skipped_in_a_row'] = 0
        self._replay.update_latents(index, *map(sharding.own_rows, latents))

    def saved(self, replay: bool) -> Saved:
        """What a checkpoint holds, with the replay or without it, once all updates are finished."""
        held = self.feed.state() if replay else None
        return Saved(self.state, held, {**self._counters, 'ratio': self.ratio.state()})

    def restore(self, saved: Saved) -> None:
        """Goes on from what a checkpoint holds."""
        counters = dict(saved.counters)
        ratio = counters.pop('ratio')
        self.state = saved.state
        self._counters.update(counters)
        if saved.replay is not None:  # else the count starts anew when there is a batch again
            self.feed.load_state(saved.replay)
            self.ratio.load_state(ratio)

    def take_metrics(self) -> dict[str, tuple[float, int]]:
        """Returns and forgets what updates measured whose results were used, see `Means.take`."""
        return self._metrics.take()

    def _count_skipped(self, metrics: Mapping[str, Any]) -> None:
        counters = self._counters
        counters['skipped'] += 1
        counters['skipped_in_a_row'] += 1
        losses = [name for name in metrics if name.startswith('loss/') and name != 'loss/total']
        names = [name for name in losses if not np.isfinite(metrics[name])] or ['the gradient']
        what = f'{", ".join(names)} {"are" if len(names) > 1 else "is"} not finite'
        if counters['skipped_in_a_row'] >= MOST_SKIPPED:
            raise Failure(
                f'{MOST_SKIPPED} updates in a row were skipped, as {what}; look for numbers of '
                'extreme size in what the environment returns. The last checkpoint is kept.'
            )
        if counters['skipped_in_a_row'] == 1:
            number = counters['updates'] - len(self._pending)
            self._say(f'Update {number:,} is skipped, as {what}; nothing has changed.')
