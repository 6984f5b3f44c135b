"""How many updates are due."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from dreamerv3_jax.errors import UserError


class TrainRatio:
    """Says how many updates are due so that every agent step is replayed `ratio` times on average.

    Example:
      >>> train_ratio = TrainRatio(32, batch_steps=1024)
      >>> [train_ratio.due(agent_steps) for agent_steps in (500, 516, 532, 564, 660)]
      [1, 0, 1, 1, 3]
    """

    def __init__(self, ratio: float, batch_steps: int) -> None:
        """Sets the rate; `batch_steps` is the number of trained steps of an update, B * T.

        Raises:
          UserError: the ratio is negative or not a number.
        """
        if not (math.isfinite(ratio) and ratio >= 0):
            raise UserError(f'--config.replay.train_ratio must be a number from 0 up, not {ratio}.')
        # Fractions of the decimal digits that the user typed: nothing is ever rounded.
        self._rate = Fraction(str(ratio)) / batch_steps
        self._credit = Fraction(0)  # of updates
        self._last: int | None = None

    def due(self, agent_steps: int) -> int:
        """Returns the number of updates due now: 1 at the first call, where the count starts."""
        if self._last is None:
            self._credit = Fraction(1 if self._rate else 0)
        else:
            self._credit += (agent_steps - self._last) * self._rate
        self._last = int(agent_steps)
        updates = max(math.floor(self._credit), 0)
        self._credit -= updates
        return updates

    def give_back(self, updates: int) -> None:
        """Takes back updates that were due but not done; they are due at the next call."""
        self._credit += updates

    def state(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return {'last': self._last, 'credit': str(self._credit)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned; the ratio may have changed since."""
        self._last, self._credit = state['last'], Fraction(state['credit'])
