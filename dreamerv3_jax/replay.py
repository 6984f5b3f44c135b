"""Replay memory: rings of steps, sampled as sequences, into which fresh latents are written back.

Host side, numpy only. Letters: B sequences, T trained steps, N streams, D deterministic units, S
stochastic groups. A *stream* is the endless row of records of one environment. A record's *absolute
position* is its number in its stream, from 0 and never reused: a position kept since long ago
either still names the same record or is known to be overwritten.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from dreamerv3_jax.errors import UserError
from dreamerv3_jax.free_space import available_disk, available_memory

Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]

LATENTS = ('deter', 'stoch')
CONTEXT = 1  # steps before the trained ones; their latent is the initial carry


class SampleIndex(NamedTuple):
    """Where the sequences of a batch came from."""

    stream: np.ndarray  # [B] int64
    first: np.ndarray  # [B] int64, absolute position of the context step


class Replay:
    """Rings of the most recent records of every stream, with the latents that the agent had there.

    Sequences have `CONTEXT + batch_length` steps. They are drawn uniformly over all start points in
    the memory, whatever their stream, and may span several episodes. With `online`, each newly
    completed sequence of a stream (they do not overlap) is returned once before uniform ones fill
    the batch, in the order of completion; those overwritten meanwhile are dropped.

    Example:
      >>> flag = ((), np.dtype(bool))
      >>> specs = {'is_first': flag, 'is_last': flag, 'deter': ((4,), np.dtype('float32')),
      ...          'stoch': ((2,), np.dtype('uint8'))}
      >>> replay = Replay(specs, capacity=100, streams=2, batch_size=3, batch_length=5, online=True,
      ...                 seed=0)
      >>> for _ in range(10):
      ...     replay.add({name: np.zeros((2, *shape)) > 0 for name, (shape, _) in specs.items()})
      >>> batch, index = replay.sample()
      >>> batch['is_last'].shape, batch['deter'].shape
      ((3, 6), (3, 4))
      >>> replay.update_latents(index, np.ones((3, 5, 4)), np.ones((3, 5, 2), int))
    """

    def __init__(
        self,
        specs: Specs,
        *,
        capacity: int,
        streams: int,
        batch_size: int,
        batch_length: int,
        online: bool,
        seed: int,
        directory: Path | None = None,
    ) -> None:
        """Allocates the rings; the system commits their pages only when records arrive.

        Args:
          specs: shape and dtype of each entry of a record, among them 'is_first', 'is_last' and the
            latents 'deter' [D] and 'stoch' [S] (class indices).
          capacity: number of records, shared equally among the streams.
          streams: number of streams [N].
          batch_size: sequences per batch [B].
          batch_length: trained steps per sequence [T].
          online: whether fresh sequences come first.
          seed: of the sampling.
          directory: keeps the records in memory-mapped files there instead of RAM; files of an
            earlier replay are overwritten.

        Raises:
          UserError: the capacity does not hold one sequence per stream and one batch.
          ValueError: the specs lack an entry.
        """
        missing = {*LATENTS, 'is_first', 'is_last'} - set(specs)
        if missing:
            raise ValueError(f'the specs lack {sorted(missing)}')
        self._batch_size = batch_size
        self._sequence = CONTEXT + batch_length
        self._least = batch_size * batch_length + CONTEXT
        self._length = capacity // streams
        needed = streams * max(self._sequence, -(-self._least // streams))
        if streams * self._length < needed:
            raise UserError(
                f'A replay of {capacity} steps is too small for {streams} environments and batches '
                f'of {batch_size} sequences of {batch_length} steps; set '
                f'--config.replay.capacity={needed} or more.'
            )
        self._specs = {
            name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in specs.items()
        }
        rows = streams * self._length
        # Stream s keeps position p in row s * length + p % length.
        self._data = {
            name: _allocate(name, (rows, *shape), dtype, directory)
            for name, (shape, dtype) in self._specs.items()
        }
        self._has_latent = np.zeros(rows, bool)
        self._count = np.zeros(streams, np.int64)  # [N] records ever added
        self._online = online
        self._queue: deque[tuple[int, int]] = deque()  # (stream, position of the context step)
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        """Returns the number of records held."""
        return int(np.minimum(self._count, self._length).sum())

    @property
    def streams(self) -> int:
        """N."""
        return len(self._count)

    @property
    def can_sample(self) -> bool:
        """Whether the memory holds the steps of one batch, and one whole sequence."""
        return len(self) >= self._least and bool(self._starts().any())

    def add(self, step: Mapping[str, np.ndarray], streams: np.ndarray | None = None) -> None:
        """Appends one record to each of the given streams.

        Args:
          step: entries [M, ...] named as in the specs. Both latents may be left out.
          streams: [M] different stream numbers; all streams in order when left out.

        Raises:
          ValueError: a name, shape or kind of number is not that of the specs.
        """
        streams = np.arange(len(self._count)) if streams is None else np.asarray(streams, np.int64)
        without = set(self._specs) - set(step)
        unknown = set(step) - set(self._specs)
        if unknown or without not in (set(), set(LATENTS)):
            raise ValueError(f'the step lacks {sorted(without)} or has unknown {sorted(unknown)}')
        if np.unique(streams).size != streams.size:
            raise ValueError(f'a stream takes one record at a time, not {streams.tolist()}')
        values = {name: self._checked(name, value, streams.shape) for name, value in step.items()}
        rows = self._rows(streams, self._count[streams])
        for name, value in values.items():
            self._data[name][rows] = value
        for name in without:
            self._data[name][rows] = 0
        self._has_latent[rows] = not without
        self._count[streams] += 1
        if self._online:
            for stream in streams[self._count[streams] % self._sequence == 0].tolist():
                self._queue.append((stream, int(self._count[stream]) - self._sequence))
            if len(self._queue) > 2 * len(self._has_latent) // self._sequence:
                self._queue = deque(entry for entry in self._queue if self._held(*entry))

    def sample(self) -> tuple[dict[str, np.ndarray], SampleIndex]:
        """Draws a batch.

        A step followed by an `is_first` within the sequence is returned with `is_last`: its episode
        was abandoned. Where the context step has no latent, it and the first trained step are
        returned with `is_first`, so that the recurrent state starts blank.

        Returns:
          Entries [B, CONTEXT + T, ...], but of the latents only those of the context step, 'deter'
          [B, D] and 'stoch' [B, S]; and the index that `update_latents` needs.

        Raises:
          RuntimeError: the memory does not hold one whole sequence.
        """
        index = self._draw()
        rows = self._rows(index.stream[:, None], index.first[:, None] + np.arange(self._sequence))
        batch = {
            name: ring.take(rows[:, 0] if name in LATENTS else rows, axis=0)
            for name, ring in self._data.items()
        }
        batch['is_last'][:, :-1] |= batch['is_first'][:, 1:]
        batch['is_first'][:, : CONTEXT + 1] |= ~self._has_latent[rows[:, :CONTEXT]]
        return batch, index

    def update_latents(self, index: SampleIndex, deter: np.ndarray, stoch: np.ndarray) -> None:
        """Writes the latents of the trained steps back to the very records they were computed for.

        Records that were overwritten since they were sampled are left alone. Where sequences of the
        batch overlap, the later one wins.

        Args:
          index: from `sample`.
          deter: [B, T, D].
          stoch: [B, T, S] class indices.

        Raises:
          ValueError: a shape or kind of number is wrong.
        """
        trained = np.arange(CONTEXT, self._sequence)
        stream, position = np.broadcast_arrays(
            index.stream[:, None], index.first[:, None] + trained
        )
        held = self._held(stream, position)  # [B, T]
        rows = self._rows(stream[held], position[held])
        for name, value in zip(LATENTS, (deter, stoch), strict=True):
            self._data[name][rows] = self._checked(name, value, held.shape)[held]
        self._has_latent[rows] = True

    def state(self) -> dict[str, Any]:
        """Returns all that `load_state` needs to continue bit for bit.

        Returns:
          'arrays': a flat dict of arrays; 'metadata': plain values that JSON can hold. The records
          are views of the live memory, trimmed to what is in use (a copy may not fit beside it):
          write them out before the next call of `add` or `update_latents`.
        """
        used = min(int(self._count.max()), self._length)
        arrays = {name: ring[:, :used] for name, ring in self._by_stream().items()}
        arrays['count'] = self._count.copy()
        metadata = {'rng': self._rng.bit_generator.state, 'queue': [list(x) for x in self._queue]}
        return {'arrays': arrays, 'metadata': self._layout() | metadata}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned.

        Raises:
          UserError: the state is that of a replay with another layout.
        """
        metadata = state['metadata']
        self._check_layout(metadata, self._layout())
        self.load_streams([state], first=0)
        self._queue = deque((stream, position) for stream, position in metadata['queue'])
        self._rng.bit_generator.state = metadata['rng']

    def load_streams(self, states: Sequence[Mapping[str, Any]], first: int) -> None:
        """Takes over streams of other replays, but not what they would have drawn next.

        Args:
          states: of these replays.
          first: number of this replay's first stream, counted over all of their streams.

        Raises:
          UserError: they have another layout.
        """
        own = {number: row for row, number in enumerate(range(first, first + len(self._count)))}
        numbers = itertools.count()
        layout = {name: value for name, value in self._layout().items() if name != 'streams'}
        for state in states:
            arrays, metadata = state['arrays'], state['metadata']
            self._check_layout(metadata, layout)
            rows = [own.get(next(numbers)) for _ in arrays['count']]
            for stream, row in enumerate(rows):
                if row is not None:
                    for name, ring in self._by_stream().items():
                        ring[row, : arrays[name].shape[1]] = arrays[name][stream]
                    self._count[row] = arrays['count'][stream]
            self._queue.extend(
                (rows[stream], position)
                for stream, position in metadata['queue']
                if rows[stream] is not None
            )

    def _check_layout(self, metadata: Mapping[str, Any], layout: Mapping[str, Any]) -> None:
        for name, value in layout.items():
            if metadata[name] != value:
                raise UserError(
                    f'The saved replay has {name} {metadata[name]}, but this run has {value}; '
                    'resume with the settings of the saved run or start in another --logdir.'
                )

    def _layout(self) -> dict[str, Any]:
        specs = sorted(self._specs.items())
        return {
            'streams': len(self._count),
            'steps per stream': self._length,
            'sequence length': self._sequence,
            'entries': {name: [*shape, str(dtype)] for name, (shape, dtype) in specs},
        }

    def _by_stream(self) -> dict[str, np.ndarray]:
        rings = {f'data/{name}': ring for name, ring in self._data.items()}
        rings['has_latent'] = self._has_latent
        shape = (len(self._count), self._length)
        return {name: ring.reshape(*shape, *ring.shape[1:]) for name, ring in rings.items()}

    def _rows(self, stream: np.ndarray, position: np.ndarray) -> np.ndarray:
        return stream * self._length + position % self._length

    def _held(self, stream: Any, position: Any) -> Any:
        count = self._count[stream]
        return (count - self._length <= position) & (position < count)

    def _starts(self) -> np.ndarray:
        """Returns how many start points each stream has, [N]."""
        return np.maximum(np.minimum(self._count, self._length) - self._sequence + 1, 0)

    def _draw(self) -> SampleIndex:
        starts = self._starts()
        ends = np.cumsum(starts)  # [N]: stream s owns the numbers from ends[s - 1] to ends[s] - 1
        if not ends[-1]:
            raise RuntimeError('the replay does not hold a whole sequence yet; see can_sample')
        fresh: list[tuple[int, int]] = []
        while self._queue and len(fresh) < self._batch_size:
            entry = self._queue.popleft()
            if self._held(*entry):
                fresh.append(entry)
        number = self._rng.integers(ends[-1], size=self._batch_size - len(fresh))
        stream = np.searchsorted(ends, number, side='right')
        oldest = np.maximum(self._count - self._length, 0)
        first = oldest[stream] + number - (ends - starts)[stream]
        online = np.array(fresh, np.int64).reshape(-1, 2)
        return SampleIndex(np.append(online[:, 0], stream), np.append(online[:, 1], first))

    def _checked(self, name: str, value: Any, leading: tuple[int, ...]) -> np.ndarray:
        value = np.asarray(value)
        shape, dtype = self._specs[name]
        if value.shape != (*leading, *shape):
            raise ValueError(f'{name} has shape {value.shape}, not {(*leading, *shape)}')
        if value.dtype.kind == 'f' and dtype.kind != 'f':
            raise ValueError(f'{name} is {value.dtype}, not {dtype}')
        return value


def bytes_per_step(specs: Specs) -> int:
    """Returns the size of one record."""
    return 1 + sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs.values())


def check_memory(
    specs: Specs,
    capacity: int,
    directory: Path | None = None,
    share: float = 1.0,
    *,
    resumed: bool = False,
) -> None:
    """Refuses a replay that would outgrow the machine, which shows only hours into a run.

    Args:
      specs: as for `Replay`.
      capacity: number of records, of all hosts.
      directory: where the files of all hosts will be; `None` for RAM.
      share: of the records, that are on this machine.
      resumed: whether it was accepted before, and cannot get smaller.

    Raises:
      UserError: with what helps.
    """
    step = share * bytes_per_step(specs)
    free = available_memory() if directory is None else available_disk(directory)
    if free is None or step * capacity <= (free if resumed else 0.8 * free):
        return
    fitting = int(0.8 * free / step)  # the rest is for everything else
    fitting -= fitting % 10 ** max(len(str(fitting)) - 2, 0)
    less = f', of which it may take 80%; set --config.replay.capacity={fitting}'
    place, more = ('disk', '') if directory else ('memory', ', or set --config.replay.on_disk=True')
    here = ' on this machine' if share < 1 else ''
    raise UserError(
        f'A replay of {capacity:,} steps takes {step * capacity / 1e9:,.1f} GB of {place}{here}, '
        f'and {free / 1e9:,.1f} GB are free{"; make room for it" if resumed else less}{more}.'
    )


def _allocate(
    name: str, shape: tuple[int, ...], dtype: np.dtype, directory: Path | None
) -> np.ndarray:
    if directory is None:
        return np.zeros(shape, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f'{quote(name, safe="")}.ring'
    ring = np.memmap(path, dtype, 'w+', shape=shape)
    # A hole in the file would be filled when it is first written to, which on a disk that is full
    # by then ends the process.
    if hasattr(os, 'posix_fallocate'):
        try:
            with path.open('r+b') as file:
                os.posix_fallocate(file.fileno(), 0, ring.nbytes)
        except OSError as error:
            raise UserError(
                f'The replay takes {ring.nbytes:,} bytes in {path}: {error.strerror}; set a '
                'smaller --config.replay.capacity.'
            ) from error
    return np.asarray(ring)
