"""Tests of the replay memory: hand-worked cases, storage, state and mistakes."""

import json

import numpy as np
import pytest

from dreamerv3_jax.errors import UserError
from dreamerv3_jax.replay import Replay, SampleIndex, bytes_per_step

FLAG = ((), np.dtype(bool))
SPECS = {
    'image': ((2, 2, 1), np.dtype(np.uint8)),
    'action/move': ((2,), np.dtype(np.float32)),
    'number': ((), np.dtype(np.int64)),  # the record's stream and position: see `number`
    'is_first': FLAG,
    'is_last': FLAG,
    'deter': ((3,), np.dtype(np.float32)),
    'stoch': ((2,), np.dtype(np.uint8)),
}


def make(capacity=20, streams=2, batch_size=2, batch_length=3, online=False, seed=0, **kwargs):
    return Replay(
        SPECS,
        capacity=capacity,
        streams=streams,
        batch_size=batch_size,
        batch_length=batch_length,
        online=online,
        seed=seed,
        **kwargs,
    )


def number(stream, position):
    """The identity of a record, from which its other entries follow."""
    return 1000 * stream + position


def record(stream, position, first=False, last=False, latents=True):
    identity = number(stream, position)
    values = {
        'image': np.full((2, 2, 1), identity % 251, np.uint8),
        'action/move': np.array([identity, -identity], np.float32),
        'number': np.int64(identity),
        'is_first': np.bool_(first),
        'is_last': np.bool_(last),
    }
    if latents:
        values['deter'] = np.full(3, -identity - 1, np.float32)
        values['stoch'] = np.full(2, identity % 7, np.uint8)
    return values


def batched(records):
    return {name: np.stack([entry[name] for entry in records]) for name in records[0]}


def fill(replay, stream, steps, start=0, **kwargs):
    for position in range(start, start + steps):
        replay.add(batched([record(stream, position, **kwargs)]), np.array([stream]))


def stored(replay, name, stream, position):
    ring = replay.state()['arrays'][f'data/{name}'][stream]
    return ring[position % len(ring)]


def round_trip(state, path):
    """What a checkpoint does: arrays without pickling, metadata as JSON."""
    np.savez(path, **{name.replace('/', '|'): array for name, array in state['arrays'].items()})
    with np.load(path, allow_pickle=False) as file:
        arrays = {name.replace('|', '/'): file[name] for name in file.files}
    return {'arrays': arrays, 'metadata': json.loads(json.dumps(state['metadata']))}


def assert_batches_equal(left, right):
    (batch, index), (other, other_index) = left, right
    np.testing.assert_equal(index, other_index)
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])
        assert batch[name].dtype == other[name].dtype


def draw(replay, times):
    return [replay.sample() for _ in range(times)]


# Hand-worked cases.


def test_one_sequence_exactly():
    replay = make(capacity=4, streams=1, batch_size=1)
    fill(replay, 0, 3)
    assert not replay.can_sample and len(replay) == 3
    with pytest.raises(RuntimeError, match='whole sequence'):
        replay.sample()
    fill(replay, 0, 1, start=3)
    assert replay.can_sample and len(replay) == 4
    batch, index = replay.sample()
    assert index.stream.tolist() == [0] and index.first.tolist() == [0]
    assert batch['number'].tolist() == [[0, 1, 2, 3]]
    assert batch['image'].shape == (1, 4, 2, 2, 1) and batch['image'].dtype == np.uint8
    assert batch['action/move'][0].tolist() == [[0, 0], [1, -1], [2, -2], [3, -3]]
    # The latents are those of the context step, number 0.
    assert batch['deter'].tolist() == [[-1, -1, -1]] and batch['deter'].dtype == np.float32
    assert batch['stoch'].tolist() == [[0, 0]] and batch['stoch'].dtype == np.uint8


def test_wrap_around_drops_the_oldest_only():
    replay = make(capacity=5, streams=1, batch_size=1)
    fill(replay, 0, 8)  # holds 3 4 5 6 7
    assert len(replay) == 5
    seen = {tuple(replay.sample()[0]['number'][0].tolist()) for _ in range(50)}
    assert seen == {(3, 4, 5, 6), (4, 5, 6, 7)}


def test_latents_are_written_to_the_trained_steps_only():
    replay = make(capacity=5, streams=1, batch_size=1)
    fill(replay, 0, 7)  # holds 2 3 4 5 6, of which 5 and 6 wrapped around
    index = SampleIndex(np.array([0]), np.array([3]))
    deter = np.array([[[40.0] * 3, [50.0] * 3, [60.0] * 3]])
    stoch = np.array([[[4, 4], [5, 5], [6, 6]]])
    replay.update_latents(index, deter, stoch)
    values = [float(stored(replay, 'deter', 0, position)[0]) for position in (2, 3, 4, 5, 6)]
    assert values == [-3, -4, 40, 50, 60]
    values = [int(stored(replay, 'stoch', 0, position)[0]) for position in (2, 3, 4, 5, 6)]
    assert values == [2, 3, 4, 5, 6]


def test_latents_of_overwritten_steps_are_dropped():
    replay = make(capacity=5, streams=1, batch_size=1)
    fill(replay, 0, 5)
    index = SampleIndex(np.array([0]), np.array([0]))
    fill(replay, 0, 3, start=5)  # holds 3 4 5 6 7: of the trained 1 2 3 only 3 is left
    replay.update_latents(index, np.full((1, 3, 3), 99.0), np.full((1, 3, 2), 99))
    values = [float(stored(replay, 'deter', 0, position)[0]) for position in (3, 4, 5, 6, 7)]
    assert values == [99, -5, -6, -7, -8]


def test_latents_of_steps_that_do_not_exist_are_dropped():
    replay = make(capacity=5, streams=1, batch_size=1)
    fill(replay, 0, 7)  # holds 2 3 4 5 6; 7 and 8 would take the places of 2 and 3
    index = SampleIndex(np.array([0]), np.array([5]))  # from before an older state was restored
    replay.update_latents(index, np.full((1, 3, 3), 99.0), np.full((1, 3, 2), 99))
    values = [float(stored(replay, 'deter', 0, position)[0]) for position in (2, 3, 4, 5, 6)]
    assert values == [-3, -4, -5, -6, 99]


def test_latents_come_back_as_context():
    replay = make(capacity=5, streams=1, batch_size=1)
    fill(replay, 0, 4, latents=False)
    batch, index = replay.sample()
    assert batch['deter'].tolist() == [[0, 0, 0]]
    replay.update_latents(index, np.arange(9.0).reshape(1, 3, 3), np.full((1, 3, 2), 5))
    fill(replay, 0, 2, start=4, latents=False)
    for _ in range(20):
        batch, index = replay.sample()
        assert index.first[0] in (1, 2)
        # Step 1 was the first trained one, step 2 the second.
        row = int(index.first[0]) - 1
        assert batch['deter'][0].tolist() == [3 * row, 3 * row + 1, 3 * row + 2]
        assert batch['stoch'].tolist() == [[5, 5]]


def test_is_first_only_where_no_latent_is_stored():
    replay = make(capacity=5, streams=1, batch_size=1)
    fill(replay, 0, 4, latents=False)
    batch, index = replay.sample()
    assert batch['is_first'].tolist() == [[True, True, False, False]]
    assert not batch['is_last'].any()  # nothing was abandoned
    replay.update_latents(index, np.zeros((1, 3, 3)), np.zeros((1, 3, 2), int))
    fill(replay, 0, 1, start=4, latents=False)
    seen = {int(index.first[0]): batch['is_first'].tolist() for batch, index in draw(replay, 20)}
    assert seen == {0: [[True, True, False, False]], 1: [[False] * 4]}
    # A record without latents takes the place of one that had them.
    fill(replay, 0, 2, start=5, latents=False)
    fill(replay, 0, 4, start=7, latents=False)
    for batch, _ in draw(replay, 20):
        assert batch['is_first'].tolist() == [[True, True, False, False]]
        assert not batch['deter'].any()


def test_abandoned_episodes_end():
    replay = make(capacity=4, streams=1, batch_size=1)
    for position, (first, last) in enumerate([(1, 0), (0, 0), (1, 0), (0, 1)]):
        fill(replay, 0, 1, start=position, first=bool(first), last=bool(last))
    batch, _ = replay.sample()
    assert batch['is_first'].tolist() == [[True, False, True, False]]
    assert batch['is_last'].tolist() == [[False, True, False, True]]
    assert not stored(replay, 'is_last', 0, 1)  # the memory itself is not touched


def test_streams_of_different_lengths():
    replay = make(capacity=30, streams=3, batch_size=1)
    fill(replay, 1, 5)
    fill(replay, 2, 3)  # too short for a sequence of four
    assert replay.can_sample
    seen = {(int(i.stream[0]), int(i.first[0])) for _, i in draw(replay, 60)}
    assert seen == {(1, 0), (1, 1)}
    fill(replay, 2, 1, start=3)
    fill(replay, 0, 6)
    seen = {(int(i.stream[0]), int(i.first[0])) for _, i in draw(replay, 200)}
    assert seen == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)}


def test_can_sample_waits_for_a_whole_batch():
    replay = make(capacity=100, streams=2, batch_size=4, batch_length=3)  # 4 * 3 + 1
    fill(replay, 0, 6)
    fill(replay, 1, 6)
    assert not replay.can_sample
    fill(replay, 0, 1, start=6)
    assert replay.can_sample


def test_online_queue_once_in_order_then_uniform():
    replay = make(capacity=100, batch_size=2, online=True)
    fill(replay, 0, 4)
    fill(replay, 1, 9)
    fill(replay, 0, 4, start=4)
    fresh = [(0, 0), (1, 0), (1, 4), (0, 4)]
    drawn = [(int(s), int(p)) for _, i in draw(replay, 2) for s, p in zip(*i, strict=True)]
    assert drawn == fresh
    # Record 8 of stream 1 waits for 9, 10 and 11; until then all is uniform.
    starts = {(int(s), int(p)) for _, i in draw(replay, 100) for s, p in zip(*i, strict=True)}
    assert starts == {(0, p) for p in range(5)} | {(1, p) for p in range(6)}
    fill(replay, 1, 3, start=9)
    _, index = replay.sample()
    assert (int(index.stream[0]), int(index.first[0])) == (1, 8)


def test_online_queue_drops_overwritten_sequences_and_stays_short():
    replay = make(capacity=20, streams=2, batch_size=1, online=True)  # ten steps per stream
    fill(replay, 0, 4)
    fill(replay, 1, 1203)  # holds 1193 ... 1202; complete and whole: 1196 ... 1199
    assert len(replay._queue) <= 10
    drawn = [(int(i.stream[0]), int(i.first[0])) for _, i in draw(replay, 2)]
    assert drawn == [(0, 0), (1, 1196)]
    assert not replay._queue


def test_without_online_queue_nothing_is_queued():
    replay = make()
    fill(replay, 0, 8)
    assert not replay._queue


# State, storage and mistakes.


def test_restored_replay_continues_bit_for_bit(tmp_path):
    replay = make(online=True)
    for stream, steps in ((0, 17), (1, 9)):
        fill(replay, stream, steps)
    _, index = replay.sample()
    replay.update_latents(index, np.full((2, 3, 3), 7.0), np.full((2, 3, 2), 7))
    fill(replay, 1, 3, start=9)  # the queue is not empty
    other = make(online=True, seed=5)
    other.load_state(round_trip(replay.state(), tmp_path / 'state.npz'))
    for position in range(12, 18):
        assert_batches_equal(replay.sample(), other.sample())
        for one in (replay, other):
            fill(one, 1, 1, start=position)


def test_state_holds_what_is_in_use_only():
    replay = make(capacity=200, streams=2)
    assert replay.state()['arrays']['data/image'].shape == (2, 0, 2, 2, 1)
    fill(replay, 0, 5)
    fill(replay, 1, 7)
    arrays = replay.state()['arrays']
    assert arrays['data/image'].shape == (2, 7, 2, 2, 1)
    assert np.shares_memory(arrays['data/image'], replay._data['image'])
    fill(replay, 1, 200, start=7)
    assert arrays['count'].tolist() == [5, 7]
    assert replay.state()['arrays']['data/image'].shape == (2, 100, 2, 2, 1)


def test_empty_replay_is_restored(tmp_path):
    replay = make()
    replay.load_state(round_trip(make(seed=3).state(), tmp_path / 'state.npz'))
    assert len(replay) == 0 and not replay.can_sample


@pytest.mark.parametrize(
    ('settings_', 'named'),
    [
        ({'streams': 1}, 'streams'),
        ({'capacity': 40}, 'steps per stream'),
        ({'batch_length': 2}, 'sequence length'),
    ],
)
def test_state_of_another_layout_is_refused(settings_, named):
    with pytest.raises(UserError, match=named):
        make().load_state(make(**settings_).state())


def test_files_hold_the_same_as_memory(tmp_path):
    in_memory = make(online=True)
    on_disk = make(online=True, directory=tmp_path / 'replay')
    for replay in (in_memory, on_disk):
        fill(replay, 0, 17)
        fill(replay, 1, 9)
    for position in range(9, 15):
        left, right = in_memory.sample(), on_disk.sample()
        assert_batches_equal(left, right)
        for replay, (_, index) in ((in_memory, left), (on_disk, right)):
            replay.update_latents(index, np.full((2, 3, 3), position), np.ones((2, 3, 2), int))
            fill(replay, 1, 1, start=position)
    files = {file.name: file.stat().st_size for file in (tmp_path / 'replay').iterdir()}
    assert files.keys() == {f'{name}.ring' for name in SPECS} - {'action/move.ring'} | {
        'action%2Fmove.ring'
    }
    assert files['image.ring'] == 20 * 4  # 20 images of four bytes
    assert sum(files.values()) == 20 * (bytes_per_step(SPECS) - 1)
    # A new replay there starts empty.
    again = make(directory=tmp_path / 'replay')
    assert len(again) == 0
    again.load_state(on_disk.state())


def test_seed_decides_the_samples():
    first, same, other = (make(capacity=200, batch_size=16, seed=seed) for seed in (1, 1, 2))
    for replay in (first, same, other):
        fill(replay, 0, 100)
    batch = first.sample()
    assert_batches_equal(batch, same.sample())
    assert batch[1].first.tolist() != other.sample()[1].first.tolist()


def test_too_small_capacity_is_refused_with_one_that_works():
    # Three streams of at least four steps; batches need 2 * 3 + 1 steps.
    with pytest.raises(UserError, match='--config.replay.capacity=12 '):
        make(capacity=11, streams=3)
    make(capacity=12, streams=3)
    # Batches need 4 * 3 + 1 steps, of which three streams hold equal shares.
    with pytest.raises(UserError, match='--config.replay.capacity=15 '):
        make(capacity=14, streams=3, batch_size=4)
    # One stream: 5 * 3 + 1 steps, or it would never be full enough to train.
    with pytest.raises(UserError, match='--config.replay.capacity=16 '):
        make(capacity=15, streams=1, batch_size=5)
    replay = make(capacity=16, streams=1, batch_size=5)
    fill(replay, 0, 16)
    assert replay.can_sample


def test_wrong_records_are_refused():
    replay = make()
    entry = batched([record(0, 0), record(1, 0)])
    replay.add(entry)
    with pytest.raises(ValueError, match="lacks .'image'"):
        replay.add({name: value for name, value in entry.items() if name != 'image'})
    with pytest.raises(ValueError, match="lacks .'stoch'"):
        replay.add({name: value for name, value in entry.items() if name != 'stoch'})
    with pytest.raises(ValueError, match="unknown .'rewad'"):
        replay.add({**entry, 'rewad': np.zeros(2)})
    with pytest.raises(ValueError, match='image has shape'):
        replay.add({**entry, 'image': entry['image'][:1]})
    with pytest.raises(ValueError, match='image is float32'):
        replay.add({**entry, 'image': entry['image'].astype(np.float32)})
    with pytest.raises(ValueError, match='one record at a time'):
        replay.add(entry, np.array([1, 1]))
    with pytest.raises(ValueError, match='shape'):
        replay.add(entry, np.array([1]))
    assert len(replay) == 2  # nothing was half added
    fill(replay, 0, 5, start=1)
    _, index = replay.sample()
    with pytest.raises(ValueError, match='deter has shape'):
        replay.update_latents(index, np.zeros((2, 4, 3)), np.zeros((2, 4, 2), int))
    with pytest.raises(ValueError, match='stoch has shape'):
        replay.update_latents(index, np.zeros((2, 3, 3)), np.zeros((2, 3, 2, 4), int))
    with pytest.raises(ValueError, match='deter'):
        Replay(
            {'is_first': FLAG},
            capacity=9,
            streams=1,
            batch_size=1,
            batch_length=1,
            online=True,
            seed=0,
        )
