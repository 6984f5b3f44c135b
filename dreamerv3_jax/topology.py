"""Devices that need not be here: how they are named, and their published figures."""

import math
import re
from typing import NamedTuple

from dreamerv3_jax.errors import UserError, nearest


class Chip(NamedTuple):
    """Published figures of one device, per second where they are rates."""

    memory: float  # bytes
    flops: float  # bfloat16 products
    bandwidth: float  # bytes of its memory
    links: float  # bytes sent to other chips of the slice, half of the bidirectional figure


# Each from its page "TPU v5e" etc. in Google Cloud's documentation, read on 2026-11-27.
CHIPS = {
    'v5e': Chip(16 * 2**30, 197e12, 819e9, 200e9),
    'v5p': Chip(95 * 2**30, 459e12, 2765e9, 600e9),
    'v6e': Chip(32 * 2**30, 918e12, 1638e9, 400e9),
}
EXAMPLES = 'v5e:4x8, v5p:2x2x1, v6e:16x16 or cpu:8'
_MOST_CPU_DEVICES = 1024


class Topology(NamedTuple):
    """What `--topology` names."""

    kind: str  # cpu, or a key of CHIPS
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f'{self.kind}:{"x".join(map(str, self.shape))}'

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)


def parse(text: str) -> Topology:
    """Reads a topology such as `v5e:4x8`.

    Raises:
      UserError: it is none.
    """
    kind, _, rest = text.partition(':')
    kinds = [*CHIPS, 'cpu']
    if kind not in kinds:
        raise UserError(f'There are no figures for devices of kind {kind!r}{nearest(kind, kinds)}')
    axes = {'cpu': 1, 'v5p': 3}.get(kind, 2)
    example = next(name for name in re.split(', | or ', EXAMPLES) if name.startswith(kind))
    if not re.fullmatch(r'[1-9]\d{0,3}' + r'x[1-9]\d{0,3}' * (axes - 1), rest):
        raise UserError(f'A topology of {kind} is written as in --topology={example}, not {text}.')
    result = Topology(kind, tuple(map(int, rest.split('x'))))
    if kind == 'cpu' and result.size > _MOST_CPU_DEVICES:
        raise UserError(f'--topology=cpu:N takes up to {_MOST_CPU_DEVICES} devices, not {rest}.')
    return result
