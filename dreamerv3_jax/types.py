"""Named tuples that cross files, and the letters used in shape comments.

Shape letters, the same in every file:
  B  sequences in a batch            T  trained steps of a sequence
  H  imagined steps                  N  any batch of states (B * T, or environments)
  D  deterministic units             S  stochastic groups
  C  classes of a group              K  bins of a two-hot head
  A  size of the flat action vector  U  hidden units of the RSSM
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Mapping[str, Any]
Metrics = dict[str, Array]


class Latent(NamedTuple):
    """State of the recurrent state-space model (RSSM)."""

    deter: Array  # [..., D] compute dtype
    stoch: Array  # [..., S, C] one-hot, compute dtype


class Batch(NamedTuple):
    """Replayed sequences: one context step followed by T trained steps.

    The reward at a step is the consequence of the action before it; the action at a step was chosen
    from that step's observation.
    """

    observation: dict[str, Array]  # [B, T + 1, ...]
    action: dict[str, Array]  # [B, T + 1, n] int32 (discrete) or float32 (continuous)
    reward: Array  # [B, T + 1] float32
    is_first: Array  # [B, T + 1] bool
    is_last: Array  # [B, T + 1] bool
    is_terminal: Array  # [B, T + 1] bool
    deter: Array  # [B, D] float32, stored latent of the context step
    stoch: Array  # [B, S] integer classes, stored latent of the context step


class StoredLatent(NamedTuple):
    """A latent as the replay keeps it: class indices take 1/(4 C) of the one-hot's memory."""

    deter: Array  # [..., D] float32
    stoch: Array  # [..., S] uint8


class PolicyState(NamedTuple):
    """What the acting agent remembers between two observations."""

    latent: Latent  # [N, ...]
    action: dict[str, Array]  # [N, n] the actions chosen last


class ReturnPercentiles(NamedTuple):
    """Moving averages of a low and a high percentile of the imagined returns."""

    low: Array  # [] float32
    high: Array  # [] float32
