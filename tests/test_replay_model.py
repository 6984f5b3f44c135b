"""Tests of the replay memory against a naive model made of lists, and of its uniformity."""

import dataclasses
import itertools
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamerv3_jax.replay import Replay

SPECS = {
    'image': ((2, 2, 1), np.dtype(np.uint8)),
    'number': ((), np.dtype(np.int64)),
    'is_first': ((), np.dtype(bool)),
    'is_last': ((), np.dtype(bool)),
    'deter': ((3,), np.dtype(np.float32)),
    'stoch': ((2,), np.dtype(np.uint8)),
}
T = 3  # trained steps per sequence


def make(length, online, seed=0, batch_size=2):
    return Replay(
        SPECS,
        capacity=3 * length,
        streams=3,
        batch_size=batch_size,
        batch_length=T,
        online=online,
        seed=seed,
    )


def record(stream, position, first=False, last=False, latents=True):
    identity = 1000 * stream + position
    values = {
        'image': np.full((2, 2, 1), identity % 251, np.uint8),
        'number': np.int64(identity),
        'is_first': np.bool_(first),
        'is_last': np.bool_(last),
    }
    if latents:
        values['deter'] = np.full(3, -identity - 1, np.float32)
        values['stoch'] = np.full(2, identity % 7, np.uint8)
    return values


def add(replay, streams, records):
    step = {name: np.stack([entry[name] for entry in records]) for name in records[0]}
    replay.add(step, np.array(streams))


# A naive model.


@dataclasses.dataclass
class Model:
    """Every record of every stream, in lists, and the online queue."""

    streams: list[list[dict]]
    length: int
    sequence: int
    queue: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def add(self, stream, entry):
        self.streams[stream].append(entry)
        if len(self.streams[stream]) % self.sequence == 0:
            self.queue.append((stream, len(self.streams[stream]) - self.sequence))

    def oldest(self, stream):
        return max(len(self.streams[stream]) - self.length, 0)

    def starts(self):
        return [
            (stream, position)
            for stream, entries in enumerate(self.streams)
            for position in range(self.oldest(stream), len(entries) - self.sequence + 1)
        ]

    def take_online(self, most):
        taken = []
        while self.queue and len(taken) < most:
            stream, position = self.queue.pop(0)
            if position >= self.oldest(stream):
                taken.append((stream, position))
        return taken

    def check(self, replay):
        for stream, entries in enumerate(self.streams):
            for position in range(self.oldest(stream), len(entries)):
                for name in ('number', 'deter', 'stoch'):
                    expected = entries[position].get(name, 0)
                    assert np.all(stored(replay, name, stream, position) == expected), name

    def check_batch(self, batch, index, online):
        starts, drawn = self.starts(), list(zip(*(part.tolist() for part in index), strict=True))
        assert set(drawn) <= set(starts)
        if online:
            fresh = self.take_online(len(drawn))
            assert drawn[: len(fresh)] == fresh
        for row, (stream, first) in enumerate(drawn):
            entries = self.streams[stream][first : first + self.sequence]
            for name in ('image', 'action/move', 'number'):
                expected = np.stack([entry[name] for entry in entries])
                np.testing.assert_array_equal(batch[name][row], expected)
            firsts = [bool(entry['is_first']) for entry in entries]
            lasts = [bool(entry['is_last']) for entry in entries]
            lasts = [last or first for last, first in zip(lasts, [*firsts[1:], False], strict=True)]
            context = entries[0]
            if 'deter' not in context:
                firsts[0] = firsts[1] = True
            assert batch['is_first'][row].tolist() == firsts
            assert batch['is_last'][row].tolist() == lasts
            np.testing.assert_array_equal(batch['deter'][row], context.get('deter', np.zeros(3)))
            np.testing.assert_array_equal(batch['stoch'][row], context.get('stoch', np.zeros(2)))

    def update_latents(self, index, deter, stoch):
        for row, (stream, first) in enumerate(zip(*index, strict=True)):
            for step in range(self.sequence - 1):
                position = first + 1 + step
                if position >= self.oldest(stream):
                    self.streams[stream][position]['deter'] = deter[row, step]
                    self.streams[stream][position]['stoch'] = stoch[row, step]


ADD = st.tuples(
    st.just('add'),
    st.sets(st.integers(0, 2), min_size=1),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 2**10 - 1),
)
OPERATIONS = st.lists(st.one_of(ADD, ADD, st.sampled_from(['sample', 'write', 'restore'])))


@settings(max_examples=200, deadline=None)
@given(operations=OPERATIONS, length=st.integers(4, 11), online=st.booleans())
def test_agrees_with_the_naive_model(operations, length, online):
    replay = make(capacity=3 * length, streams=3, batch_size=2, online=online)
    model = Model([[], [], []], length, 4)
    fresh_value = itertools.count(1)
    pending = []
    for operation in [*operations, 'sample', 'write', 'write', 'write']:
        if isinstance(operation, tuple):
            _, streams, times, latents, flags = operation
            for _ in range(times):
                order = sorted(streams, reverse=bool(flags % 2))
                entries = []
                for stream in order:
                    flags = flags // 2 + (flags % 2) * 512
                    first, last = bool(flags % 8 == 1), bool(flags % 8 == 2)
                    position = len(model.streams[stream])
                    entries.append(record(stream, position, first, last, latents))
                replay.add(batched(entries), np.array(order))
                for stream, entry in zip(order, entries, strict=True):
                    model.add(stream, entry)
        elif operation == 'sample' and model.starts():
            batch, index = replay.sample()
            model.check_batch(batch, index, online)
            pending.append(index)
        elif operation == 'write' and pending:
            index = pending.pop(0)
            values = np.array([[next(fresh_value) for _ in range(3)] for _ in range(2)])
            deter = np.broadcast_to(values[..., None] + 0.5, (2, 3, 3)).astype(np.float32)
            stoch = np.broadcast_to(values[..., None] % 256, (2, 3, 2))
            replay.update_latents(index, deter, stoch)
            model.update_latents(index, deter, stoch)
        elif operation == 'restore':
            state = copied(replay.state())
            replay = make(capacity=3 * length, streams=3, batch_size=2, online=online, seed=1)
            replay.load_state(state)
        assert len(replay) == sum(min(len(entries), length) for entries in model.streams)
        assert replay.can_sample == (len(replay) >= 7 and bool(model.starts()))
    model.check(replay)


def test_start_points_are_uniform_across_uneven_streams():
    replay = make(capacity=60, streams=3, batch_size=8)
    fill(replay, 0, 30)  # wrapped around: 20 held, 17 starts
    fill(replay, 1, 9)  # 6 starts
    fill(replay, 2, 4)  # 1 start
    counts: dict[tuple[int, int], int] = {}
    for _, index in draw(replay, 3000):
        for start in zip(*(part.tolist() for part in index), strict=True):
            counts[start] = counts.get(start, 0) + 1
    starts = [(0, 10 + n) for n in range(17)] + [(1, n) for n in range(6)] + [(2, 0)]
    assert sorted(counts) == starts
    expected = 3000 * 8 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # the 0.1% quantile from above with 23 degrees of freedom


