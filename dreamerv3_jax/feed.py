"""Batches on their way from the replay to the update."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dreamerv3_jax import hosts
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.replay import Replay, SampleIndex
from dreamerv3_jax.steps import to_batch
from dreamerv3_jax.types import Batch

_BATCH, _INDEX = 'next/batch/', 'next/index/'  # of names in a saved state


class Feed:
    """Draws the next batch, and sends it to the devices, while an update is under way.

    So that batch does not hold what happens meanwhile: its first latents are at most one update
    older than they could be. What was drawn is part of the state, or a run that goes on would not
    equal one that was not stopped.
    """

    def __init__(self, replay: Replay, agent: Agent) -> None:
        """Draws nothing yet."""
        self._replay, self._agent = replay, agent
        self._drawn: tuple[dict[str, np.ndarray], SampleIndex] | None = None
        self._sent: Batch | None = None

    @property
    def ready(self) -> bool:
        """Whether a batch was drawn and sent."""
        return self._sent is not None

    def prepare(self) -> None:
        """Draws the next batch and starts to send it, unless that was done before."""
        if self._drawn is None:
            self._drawn = self._replay.sample()
        if self._sent is None:
            self._sent = self._agent.send(to_batch(self._drawn[0]))

    def take(self) -> tuple[Batch, SampleIndex]:
        """Returns the batch on the devices, and where it came from.

        Raises:
          RuntimeError: none was prepared, and the replay does not hold one.
        """
        self.prepare()
        assert self._drawn is not None and self._sent is not None
        batch, index = self._sent, self._drawn[1]
        self._drawn = self._sent = None
        return batch, index

    def state(self) -> dict[str, Any]:
        """Returns the state of the replay, see there, with the batch that was prepared.

        Where there are many hosts, each returns its own arrays and the metadata of all of them.
        """
        state = self._replay.state()
        arrays = dict(state['arrays'])
        if self._drawn is not None:
            sampled, index = self._drawn
            arrays |= {f'{_BATCH}{name}': array for name, array in sampled.items()}
            arrays |= {f'{_INDEX}{name}': array for name, array in index._asdict().items()}
        prefix = _prefix(hosts.index(), hosts.count())
        return {
            'arrays': {prefix + name: array for name, array in arrays.items()},
            'metadata': {'hosts': hosts.gather(state['metadata'])},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned, given the arrays of all hosts.

        Where there are more hosts or fewer than before, the streams are dealt out anew, and nothing
        is prepared.

        Raises:
          UserError: the replay has another layout.
        """
        saved = state['metadata'].get('hosts', [state['metadata']])  # of an older version
        states = [
            {'arrays': _starting_with(_prefix(index, len(saved)), state['arrays']), 'metadata': x}
            for index, x in enumerate(saved)
        ]
        self._drawn = self._sent = None
        if len(states) != hosts.count():
            self._replay.load_streams(states, first=hosts.index() * self._replay.streams)
            return
        own = states[hosts.index()]
        self._replay.load_state(own)
        index = _starting_with(_INDEX, own['arrays'])
        if index:
            batch = _starting_with(_BATCH, own['arrays'])
            self._drawn = (
                {name: np.array(array) for name, array in batch.items()},
                SampleIndex(**{name: np.array(array) for name, array in index.items()}),
            )


def _prefix(index: int, count: int) -> str:
    """What the names of a host's arrays begin with."""
    return f'{index}/' if count > 1 else ''


def _starting_with(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): array for name, array in found.items()}
