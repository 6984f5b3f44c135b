"""Batches drawn ahead, and replays whose streams other hosts take over."""

import json

import numpy as np
import pytest
import test_replay

from dreamerv3_jax import hosts
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.feed import Feed


class Devices:
    """Stands for the agent: keeps what was sent."""

    def __init__(self):
        self.sent = []

    def send(self, batch):
        self.sent.append(batch)
        return batch


@pytest.fixture(autouse=True)
def plain_batches(monkeypatch):
    monkeypatch.setattr('dreamerv3_jax.feed.to_batch', dict)


def as_host(monkeypatch, index, count, metadata=()):
    """This is one of several hosts, the metadata of whose replays are given."""
    monkeypatch.setattr(hosts, 'index', lambda: index)
    monkeypatch.setattr(hosts, 'count', lambda: count)
    monkeypatch.setattr(hosts, 'gather', lambda own: list(metadata) or [own])


def filled(streams, length=12, first=0, **options):
    """A replay of streams with these numbers on, each longer than the one before."""
    replay = test_replay.make(streams=streams, capacity=streams * length, **options)
    for stream in range(streams):
        for position in range(8 + first + stream):
            record = test_replay.record(first + stream, position)
            replay.add(test_replay.batched([record]), np.array([stream]))
    return replay


def contents(replay):
    """What each stream holds, by its positions."""
    state = replay.state()
    return [
        {
            position: int(test_replay.stored(replay, 'number', stream, position))
            for position in range(max(0, count - state['metadata']['steps per stream']), count)
        }
        for stream, count in enumerate(state['arrays']['count'].tolist())
    ]


def test_batches_come_in_the_order_in_which_they_were_drawn():
    replay, other, devices = filled(2), filled(2), Devices()
    feed = Feed(replay, devices)
    for _ in range(3):
        feed.prepare()
        feed.prepare()  # is prepared already
        assert len(devices.sent) == 1
        batch, index = feed.take()
        test_replay.assert_batches_equal((batch, index), other.sample())
        assert devices.sent.pop() is batch


def test_what_was_drawn_is_restored(tmp_path):
    feed = Feed(filled(2, online=True), Devices())
    feed.prepare()
    state = test_replay.round_trip(feed.state(), tmp_path / 'state.npz')
    other = Feed(filled(2, online=True, seed=5), Devices())
    other.load_state(state)
    for _ in range(4):
        feed.prepare()
        other.prepare()
        test_replay.assert_batches_equal(feed.take(), other.take())
    other.load_state(test_replay.round_trip(feed.state(), tmp_path / 'state.npz'))
    assert other._drawn is None


def test_the_replay_of_a_run_of_an_older_version_is_restored():
    """It had no feed: what was saved is the state of the replay."""
    feed, replay = Feed(filled(2, seed=5), Devices()), filled(2)
    feed.load_state(replay.state())
    for _ in range(2):
        test_replay.assert_batches_equal(feed.take(), replay.sample())


@pytest.mark.parametrize(('before', 'after'), [(2, 1), (1, 2), (2, 4), (4, 2), (1, 4)])
def test_other_hosts_take_over_all_streams(before, after, monkeypatch):
    own = [filled(4 // before, first=host * 4 // before, online=True) for host in range(before)]
    metadata = [json.loads(json.dumps(replay.state()['metadata'])) for replay in own]
    saved = {'arrays': {}, 'metadata': None}
    for host, replay in enumerate(own):
        as_host(monkeypatch, host, before, metadata)
        feed = Feed(replay, Devices())
        feed.prepare()
        state = feed.state()
        saved['arrays'] |= state['arrays']
        saved['metadata'] = state['metadata']
    expected = sum(map(contents, own), [])
    queued = sorted(
        (host * 4 // before + stream, position)
        for host, part in enumerate(metadata)
        for stream, position in part['queue']
    )
    found, found_queue = [], []
    for host in range(after):
        as_host(monkeypatch, host, after)
        replay = test_replay.make(streams=4 // after, capacity=12 * 4 // after, online=True)
        feed = Feed(replay, Devices())
        feed.load_state(saved)
        found += contents(replay)
        found_queue += [(host * 4 // after + stream, x) for stream, x in replay._queue]
        batch, index = feed.take()
        streams = host * 4 // after + index.stream[:, None]
        positions = index.first[:, None] + np.arange(4)
        np.testing.assert_array_equal(batch['number'], test_replay.number(streams, positions))
    assert found == expected and sorted(found_queue) == queued and queued


def test_streams_of_another_length_are_refused():
    state = filled(2, length=12).state()
    with pytest.raises(UserError, match='steps per stream 12, but this run has 16'):
        test_replay.make(streams=1, capacity=16).load_streams([state], first=0)
