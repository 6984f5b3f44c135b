"""The replay memory against a naive model made of lists, and the uniformity of its samples."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import stateful

from dreamerv3_jax.replay import Replay

SPECS = {
    'image': ((2, 2, 1), np.dtype(np.uint8)),
    'is_first': ((), np.dtype(bool)),
    'is_last': ((), np.dtype(bool)),
    'deter': ((3,), np.dtype(np.float32)),
    'stoch': ((2,), np.dtype(np.uint8)),
}
STREAMS = 3
TRAINED = 3  # steps of a sequence after the context step
SEQUENCE = 1 + TRAINED
BATCH = 2


def make(length, online, *, batch_size=BATCH, seed=0):
    return Replay(
        SPECS,
        capacity=STREAMS * length,
        streams=STREAMS,
        batch_size=batch_size,
        batch_length=TRAINED,
        online=online,
        seed=seed,
    )


def record(value, *, first=False, last=False, latents=True):
    """A record whose every number tells it from the others (up to overflow)."""
    entries = {
        'image': np.full((2, 2, 1), value % 256, np.uint8),
        'is_first': np.bool_(first),
        'is_last': np.bool_(last),
    }
    if latents:
        entries['deter'] = np.full(3, value, np.float32)
        entries['stoch'] = np.full(2, value % 256, np.uint8)
    return entries


def stack(records):
    return {name: np.stack([entry[name] for entry in records]) for name in records[0]}


class ReplayMachine(stateful.RuleBasedStateMachine):
    """Does the same to the replay and to plain lists of all the records there ever were."""

    @stateful.initialize(length=st.integers(SEQUENCE, 11), online=st.booleans())
    def start(self, length, online):
        self.length, self.online = length, online
        self.replay = make(length, online)
        self.streams = [[] for _ in range(STREAMS)]
        self.queue = []  # (stream, position) of the sequences that wait for their first use
        self.pending = []  # indices of batches whose latents are not yet written back
        self.value = 0

    @stateful.rule(
        streams=st.lists(st.sampled_from(range(STREAMS)), min_size=1, unique=True),
        flags=st.lists(st.sampled_from(['', '', '', 'first', 'last']), min_size=1, max_size=6),
        latents=st.booleans(),
    )
    def add(self, streams, flags, latents):
        for flag in flags:
            records = [self.next_record(flag, latents) for _ in streams]
            self.replay.add(stack(records), np.array(streams))
            for stream, entries in zip(streams, records, strict=True):
                self.streams[stream].append(entries)
                if self.online and len(self.streams[stream]) % SEQUENCE == 0:
                    self.queue.append((stream, len(self.streams[stream]) - SEQUENCE))

    def next_record(self, flag, latents):
        self.value += 1
        return record(self.value, first=flag == 'first', last=flag == 'last', latents=latents)

    @stateful.precondition(lambda self: self.starts())
    @stateful.rule()
    def sample(self):
        batch, index = self.replay.sample()
        drawn = list(zip(index.stream.tolist(), index.first.tolist(), strict=True))
        fresh = [entry for entry in self.queue if self.held(*entry)][:BATCH]
        self.queue = [entry for entry in self.queue if self.held(*entry)][BATCH:]
        assert drawn[: len(fresh)] == fresh
        assert set(drawn) <= self.starts()
        for row, (stream, first) in enumerate(drawn):
            self.check_sequence(
                {name: value[row] for name, value in batch.items()},
                self.streams[stream][first : first + SEQUENCE],
            )
        self.pending.append(index)

    @stateful.precondition(lambda self: self.pending)
    @stateful.rule()
    def write_back_the_oldest(self):
        index = self.pending.pop(0)
        records = [[self.next_record('', True) for _ in range(TRAINED)] for _ in range(BATCH)]
        values = {
            name: np.stack([stack(row)[name] for row in records]) for name in ('deter', 'stoch')
        }
        self.replay.update_latents(index, **values)
        for row, stream, first in zip(records, *index, strict=True):
            for position, entries in enumerate(row, start=first + 1):
                self.streams[stream][position]['deter'] = entries['deter']
                self.streams[stream][position]['stoch'] = entries['stoch']

    @stateful.rule()
    def restore(self):
        state = self.replay.state()
        arrays = {name: array.copy() for name, array in state['arrays'].items()}
        metadata = json.loads(json.dumps(state['metadata']))
        self.replay = make(self.length, self.online, seed=1)
        self.replay.load_state({'arrays': arrays, 'metadata': metadata})

    @stateful.invariant()
    def holds_the_newest_records_and_their_latents(self):
        held = sum(min(len(entries), self.length) for entries in self.streams)
        assert len(self.replay) == held
        assert self.replay.can_sample == (held > BATCH * TRAINED and bool(self.starts()))
        arrays = self.replay.state()['arrays']
        for stream, records in enumerate(self.streams):
            for position in range(self.oldest(stream), len(records)):
                for name, (shape, _) in SPECS.items():
                    ring = arrays[f'data/{name}'][stream]
                    expected = records[position].get(name, np.zeros(shape))
                    assert np.array_equal(ring[position % len(ring)], expected), name

    def check_sequence(self, sequence, records):
        assert sequence['image'].tolist() == [entries['image'].tolist() for entries in records]
        firsts = [bool(entries['is_first']) for entries in records]
        lasts = [bool(entries['is_last']) for entries in records]
        for step in range(TRAINED):
            lasts[step] = lasts[step] or firsts[step + 1]
        if 'deter' not in records[0]:
            firsts[0] = firsts[1] = True
        assert sequence['is_first'].tolist() == firsts
        assert sequence['is_last'].tolist() == lasts
        assert np.array_equal(sequence['deter'], records[0].get('deter', np.zeros(3)))
        assert np.array_equal(sequence['stoch'], records[0].get('stoch', np.zeros(2)))

    def oldest(self, stream):
        return max(len(self.streams[stream]) - self.length, 0)

    def held(self, stream, position):
        return position >= self.oldest(stream)

    def starts(self):
        return {
            (stream, position)
            for stream, records in enumerate(self.streams)
            for position in range(self.oldest(stream), len(records) - SEQUENCE + 1)
        }


TestAgainstLists = pytest.mark.medium(ReplayMachine.TestCase)
TestAgainstLists.settings = hypothesis.settings(
    max_examples=100, stateful_step_count=40, deadline=None
)


def test_start_points_are_uniform_across_uneven_streams():
    replay = make(20, online=False, batch_size=8)
    # Stream 0 wrapped around: 20 held, 17 start points; stream 1 has 6, stream 2 has 1.
    for stream, steps in ((0, 30), (1, 9), (2, 4)):
        for position in range(steps):
            replay.add(stack([record(position)]), np.array([stream]))
    counts = {}
    for _ in range(3000):
        for start in zip(*replay.sample()[1], strict=True):
            counts[start] = counts.get(start, 0) + 1
    starts = [(0, 10 + n) for n in range(17)] + [(1, n) for n in range(6)] + [(2, 0)]
    assert sorted(counts) == starts
    expected = 3000 * 8 / len(starts)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # exceeded by chance once in 1000 seeds: 23 degrees of freedom
