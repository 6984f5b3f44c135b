"""Typed, immutable settings of the agent.

`ml_collections.ConfigDict`s stay at the edge, in presets and on the command line. Inside the
library the agent's settings are an `AgentConfig`: frozen, hashable and complete. It has no
defaults; the published values live in `configs/base.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from dreamerv3_jax.errors import UserError, nearest

_POSITIVE = (
    'learning_rate', 'gradient_clip', 'gradient_clip_floor', 'min_std', 'return_limit',
    'rms_epsilon',
)  # fmt: skip
_LEAST_POSITIVE = 1e-37  # less is 0 in float32
_SHARES = ('unimix', 'return_lambda', 'slow_critic_rate', 'return_rate')
_DECAYS = ('momentum', 'rms_decay')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Every number that the agent's computation depends on (letters of `types` in brackets)."""

    # Widths: the only fields that differ between sizes.
    deter: int  # deterministic units of the recurrent state [D]
    hidden: int  # units of the RSSM's hidden layers [U]
    classes: int  # classes of each stochastic group [C]
    depth: int  # channels of the convolutions, times 2, 3, 4, 4
    units: int  # units of the hidden layers of encoder, decoder and heads
    # Shape of the networks, the same for all sizes.
    stoch: int  # stochastic groups [S]
    blocks: int  # blocks of the block-diagonal recurrence [G]
    bins: int  # bins of the two-hot heads [K]
    encoder_layers: int
    decoder_layers: int
    prior_layers: int
    posterior_layers: int
    reward_layers: int
    continue_layers: int
    actor_layers: int
    critic_layers: int
    unimix: float  # share of the uniform distribution mixed into every categorical
    min_std: float  # bounds of the continuous actor's standard deviation
    max_std: float
    actor_output_scale: float  # factor on the initial weights of the actor's output layer
    # World-model loss.
    free_nats: float  # KL below which dynamics and representation losses are constant
    reconstruction_scale: float
    reward_scale: float
    continue_scale: float
    dynamics_scale: float
    representation_scale: float
    # Actor and critic.
    imagination_length: int  # steps imagined from every replayed state [H]
    discount_horizon: float  # discount = 1 - 1 / discount_horizon
    return_lambda: float
    entropy_scale: float
    actor_scale: float
    critic_scale: float
    replay_critic_scale: float
    slow_critic_scale: float  # weight of the regression towards the slow critic
    slow_critic_rate: float  # of its moving average, every update
    return_low_percentile: float
    return_high_percentile: float
    return_rate: float  # of the moving average of the return percentiles
    return_limit: float  # returns are never scaled up: the least scale
    # Optimiser.
    learning_rate: float
    warmup_updates: int
    gradient_clip: float  # of each tensor's gradient norm, relative to the tensor's norm
    gradient_clip_floor: float  # least tensor norm in that ratio
    momentum: float
    rms_decay: float
    rms_epsilon: float
    # What is the same computation for more or less memory.
    remat: bool  # gradients compute the inside of each network again instead of keeping it
    compute_dtype: str  # 'auto' (see `on`), 'float32' or 'bfloat16'

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Builds the settings from a mapping (for example a `ConfigDict`) that names every field.

        Raises:
          UserError: a key is unknown or missing, or a value has the wrong type or range.
        """
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                where = nearest(name, fields, 'configs/base.py lists them all')
                raise UserError(f'The agent has no setting {name!r}{where}')
        missing = sorted(set(fields) - set(values))
        if missing:
            raise UserError(f'The agent settings lack {", ".join(missing)}; see configs/base.py.')
        return cls(**{name: _checked(name, values[name], kind) for name, kind in fields.items()})

    def __post_init__(self) -> None:
        """Refuses values with which nothing can be learned, and combinations without a network.

        Raises:
          UserError: with the setting to change.
        """
        self._check_numbers()
        layers = [field.name for field in dataclasses.fields(self) if field.name.endswith('layers')]
        widths = ('deter', 'hidden', 'classes', 'depth', 'units', 'stoch', 'blocks', 'bins')
        most = dict.fromkeys(layers, 100) | dict.fromkeys((*widths, 'imagination_length'), 100_000)
        for name, limit in most.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                bound = 'least 1' if value < 1 else f'most {limit}'
                raise UserError(f'agent.{name} must be at {bound}, not {value}.')
        if self.classes > 256:  # the replay keeps class indices in 8 bits
            raise UserError(f'agent.classes must be at most 256, not {self.classes}.')
        if self.min_std > self.max_std:
            raise UserError(
                f'agent.min_std ({self.min_std}) must not be above agent.max_std ({self.max_std}).'
            )
        if not 0 <= self.return_low_percentile < self.return_high_percentile <= 100:
            raise UserError(
                f'agent.return_low_percentile ({self.return_low_percentile}) must be below '
                f'agent.return_high_percentile ({self.return_high_percentile}), both in 0 to 100.'
            )
        if self.deter % self.blocks or (self.depth * 4) % self.blocks:
            raise UserError(
                f'agent.deter ({self.deter}) and four times agent.depth ({self.depth * 4}) must be '
                f'multiples of agent.blocks ({self.blocks}).'
            )
        if self.bins < 3 or self.bins % 2 == 0:
            raise UserError(f'agent.bins must be an odd number from 3 up, not {self.bins}.')
        if self.compute_dtype not in ('auto', 'float32', 'bfloat16'):
            raise UserError(
                "agent.compute_dtype is 'auto', 'float32' or 'bfloat16', "
                f'not {self.compute_dtype!r}.'
            )

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, str):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f'agent.{name} must be finite, not {value}.')
            if value < 0:
                raise UserError(f'agent.{name} must not be negative, not {value}.')
            if name in _POSITIVE and value < _LEAST_POSITIVE:
                raise UserError(f'agent.{name} must be positive in float32, not {value}.')
            if name in _SHARES and value > 1:
                raise UserError(f'agent.{name} must be between 0 and 1, not {value}.')
            if name in _DECAYS and (value >= 1 or np.float32(value) == 1):
                raise UserError(f'agent.{name} must be from 0 to below 1, not {value}.')
        if self.discount_horizon <= 1:
            raise UserError(f'agent.discount_horizon must be above 1, not {self.discount_horizon}.')

    def on(self, platform: str, capability: str = '') -> Self:
        """Returns the settings for devices such as 'cpu', with a precision in place of 'auto'.

        Args:
          platform: as JAX names it.
          capability: of a GPU, such as '7.5'; NVIDIA's below 8 compute bfloat16 as float32.
        """
        if self.compute_dtype != 'auto':
            return self
        major = capability.partition('.')[0]
        dtype = 'bfloat16'
        if platform == 'cpu' or (major.isdigit() and int(major) < 8):
            dtype = 'float32'
        return dataclasses.replace(self, compute_dtype=dtype)

    @property
    def discount(self) -> float:
        """Discount factor per step, `1 - 1 / discount_horizon`."""
        return 1.0 - 1.0 / self.discount_horizon


def _checked(name: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise UserError(f'agent.{name} takes {kind.__name__}, not {value!r}.')
    return value
