"""What hosts that train together tell each other after every step."""

from typing import NamedTuple

import numpy as np

from dreamerv3_jax import hosts


class Told(NamedTuple):
    """What one host tells, or what holds for all of them; whole numbers."""

    steps: int = 0  # that the environments are about to make
    ready: int = 0  # the replay holds a batch
    episodes: int = 0  # that ended
    restarts: int = 0  # of environments
    signal: int = 0  # that was received; 0 for none
    failed: int = 0  # it cannot go on
    log: int = 0  # it is time to, by the clock of the first host, and so is
    save: int = 0  # this


def agree(own: Told) -> Told:
    """Tells the other hosts, and returns what holds for all of them."""
    told = hosts.gather_numbers(np.array(own, np.int32))  # [hosts, len(Told)]
    total, least, most, first = (
        Told(*numbers.tolist()) for numbers in (told.sum(0), told.min(0), told.max(0), told[0])
    )
    return total._replace(
        ready=least.ready, signal=most.signal, failed=most.failed, log=first.log, save=first.save
    )
