"""Checkpoints: what comes back, and what is done about incomplete and damaged ones."""

import contextlib
import errno
import gc
import os
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamerv3_jax import checkpoint, durable, sharding
from dreamerv3_jax.checkpoint import Checkpointer, NotSaved, Saved, abstract_state, latest_step
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.normalization import init_return_percentiles
from dreamerv3_jax.train_state import TrainState


def make_state(value, width=8):
    return TrainState(
        params={'a': {'kernel': jnp.full((4, width), value, jnp.float32)}, 'b': jnp.ones(3)},
        slow_critic={'kernel': jnp.full((2, 2), -value, jnp.float32)},
        optimizer=(jnp.int32(value), {'moment': jnp.arange(width) + value}),
        percentiles=init_return_percentiles(),
        updates=jnp.int32(value),
        seed=jnp.uint32(7),
    )


def make_saved(value):
    arrays = {
        'data/observation/image': np.full((2, 5, 3), value, np.uint8),
        'data/a b%/c.d': np.array([[np.nan, value]]),
        'has_latent': np.array([True, False]),
    }
    replay = {'arrays': arrays, 'metadata': {'queue': [[0, value]], 'rng': {'state': 2**100}}}
    return Saved(make_state(value), replay, {'ticks': value, 'ratio': {'credit': '1/3'}})


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp('written') / 'checkpoints'
    write(folder, 10, 20)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A folder with the checkpoints 10 and 20, of which 20 is to be damaged."""
    return shutil.copytree(written, tmp_path / 'checkpoints')


def write(folder, *steps):
    checkpointer = Checkpointer(folder)
    for step in steps:
        checkpointer.save(step, make_saved(step))
    checkpointer.close()


def read(folder):
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.restore(abstract_state(make_state(0)))
    finally:
        checkpointer.close()


def read_state(folder, state=None):
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.restore_state(abstract_state(state or make_state(0)))
    finally:
        checkpointer.close()


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).dtype == np.asarray(other).dtype


def test_a_replay_is_neither_copied_nor_read_at_once(tmp_path):
    ring = np.arange(4_000_000, dtype=np.float64).reshape(2, -1)  # 32 MB
    view = ring[:, : ring.shape[1] // 2]
    replay = {'arrays': {'data': view}, 'metadata': {}}
    checkpointer = Checkpointer(tmp_path / 'checkpoints')
    tracemalloc.start()
    try:
        checkpointer.save(1, Saved(make_state(1), replay, {}))
        saved = checkpointer.restore(abstract_state(make_state(0)))
        assert tracemalloc.get_traced_memory()[1] < view.nbytes // 2 + 2_000_000
    finally:
        tracemalloc.stop()
        checkpointer.close()
    assert isinstance(saved.replay['arrays']['data'], np.memmap)
    np.testing.assert_array_equal(saved.replay['arrays']['data'], view)


def test_everything_comes_back(folder):
    saved, expected = read(folder), make_saved(20)
    assert_equal(saved.state, expected.state)
    assert_equal(saved.replay['arrays'], expected.replay['arrays'])
    assert saved.replay['metadata'] == expected.replay['metadata']
    assert saved.counters == expected.counters
    assert_equal(read_state(folder), expected.state)


def test_without_replay(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_saved(1)._replace(replay=None))
    empty = {'arrays': {'data/x': np.zeros((2, 0, 3))}, 'metadata': {}}  # before the first step
    checkpointer.save(2, make_saved(2)._replace(replay=empty))
    checkpointer.close()
    saved = read(tmp_path)
    assert saved.replay is None and saved.counters == make_saved(2).counters
    shutil.rmtree(tmp_path / '2')
    assert read(tmp_path).replay is None


def test_the_newest_are_kept(folder):
    write(folder, 20, 30, 40)  # 20 is there already
    assert sorted(path.name for path in folder.iterdir()) == ['30', '40']
    assert latest_step(folder) == 40


def test_one_that_cannot_be_removed_keeps_no_other_from_being_written(folder, tmp_path):
    (folder / '10').rename(tmp_path / 'kept')  # on another disk, say
    (folder / '10').symlink_to(tmp_path / 'kept')
    write(folder, 30, 40)
    assert sorted(path.name for path in folder.iterdir()) == ['10', '30', '40']
    assert (tmp_path / 'kept' / 'checksums.json').exists()
    assert read(folder).counters['ticks'] == 40


def test_no_checkpoint(tmp_path):
    assert latest_step(tmp_path / 'missing') is None
    assert not (tmp_path / 'missing').exists()
    with pytest.raises(UserError, match='holds no checkpoint that can be read'):
        read(tmp_path)


def test_incomplete_checkpoints_are_ignored(folder):
    """A process killed while it writes leaves a folder with another name."""
    shutil.copytree(folder / '20', folder / '30.orbax-checkpoint-tmp')
    (folder / 'notes').mkdir()
    assert latest_step(folder) == 20
    assert read(folder).counters['ticks'] == 20
    write(folder, 30)
    assert sorted(path.name for path in folder.iterdir()) == ['20', '30', 'notes']
    assert read(folder).counters['ticks'] == 30


@pytest.mark.parametrize('part', ['counters', 'replay', 'state'])
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of orbax's threads
def test_a_damaged_checkpoint_is_passed_over(part, folder, caplog, capfd):
    truncate(folder / '20' / part)
    saved = read(folder)
    gc.collect()
    assert_equal(saved.state, make_state(10))
    assert saved.counters['ticks'] == 10
    assert_equal(saved.replay['arrays'], make_saved(10).replay['arrays'])
    records = [record for record in caplog.records if record.name == checkpoint.__name__]
    assert len(records) == 1
    assert f'The checkpoint {folder / "20"} is damaged' in records[0].getMessage()
    assert 'absl' not in capfd.readouterr().err
    # The run goes on from 10 and may save before it comes to 20 again.
    assert (folder / 'damaged-20').is_dir() and latest_step(folder) == 10
    write(folder, 15, 20)
    assert read(folder).counters['ticks'] == 20


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_damaged_twice_at_the_same_step(folder):
    for _ in range(2):
        truncate(folder / '20' / 'counters')
        assert read(folder).counters['ticks'] == 10
        write(folder, 20)
    assert read(folder).counters['ticks'] == 20
    gc.collect()


@pytest.mark.parametrize(
    'error', [MemoryError(), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no memory')]
)
def test_too_little_memory_is_no_damage(error, folder, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, 'restore', fail)
    with pytest.raises(type(error)):
        read(folder)
    assert latest_step(folder) == 20


def test_a_checkpoint_without_checksums_is_taken_only_in_need(folder, caplog):
    """As a process leaves it that is killed just before it writes them."""
    for step in ('20', '10'):
        (folder / step / 'checksums.json').unlink()
        assert read(folder).counters['ticks'] == 10
    passed_over, unchecked = (record.getMessage() for record in caplog.records)
    assert passed_over == f'The checkpoint {folder}/20 has no checksums.json and was passed over.'
    assert unchecked == f'The checkpoint {folder}/10 has no checksums.json and was taken unchecked.'


@pytest.mark.parametrize('part', ['state', 'replay'])
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of orbax's threads
def test_an_unchecked_checkpoint_that_is_damaged_is_no_traceback(part, folder, caplog):
    for step in ('10', '20'):
        (folder / step / 'checksums.json').unlink()
    if part == 'state':
        (folder / '20' / 'state' / 'array_metadatas' / 'process_0').write_text('1')
    else:
        (folder / '20' / 'replay' / 'has_latent.npy').unlink()
    assert read(folder).counters['ticks'] == 10
    assert 'is damaged and was passed over' in caplog.records[0].getMessage()


@pytest.mark.parametrize('before', [0, 1])  # before all read it, or while they do
def test_what_another_host_cannot_read_is_passed_over(before, folder, caplog, monkeypatch):
    problems = ['', '', '', '']
    problems[before] = 'Input/output error'
    monkeypatch.setattr(checkpoint.hosts, 'gather', lambda own: [own, problems.pop(0)])
    assert read(folder).counters['ticks'] == 10 and not problems
    assert 'passed over: Input/output error' in caplog.records[0].getMessage()


def test_a_host_that_cannot_open_a_file_says_so(folder, monkeypatch):
    assert checkpoint._unreadable(folder / '20') == ''
    monkeypatch.setattr(checkpoint.hosts, 'count', lambda: 2)
    monkeypatch.setattr(checkpoint.hosts, 'first', lambda function: function())
    assert checkpoint._unreadable(folder / '20') == ''
    monkeypatch.setattr(checkpoint.hosts, 'first', lambda function: [*function(), 'state/more'])
    assert 'No such file' in checkpoint._unreadable(folder / '20')


@pytest.mark.parametrize(('then', 'now'), [('replay/', 'rerlay/'), ('[', ''), ('1', '2')])
def test_checksums_that_are_damaged_are_named(then, now, folder, caplog):
    path = folder / '20' / 'checksums.json'
    path.write_text(path.read_text().replace(then, now, 1))
    assert read(folder).counters['ticks'] == 10
    (record,) = caplog.records
    assert 'passed over: checksums.json is not as it was written' in record.getMessage()


def test_a_checkpoint_is_on_the_disk_before_its_checksums(folder, monkeypatch):
    """Else a loss of power leaves one that is named and checked, but empty."""
    synced, sync = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(os.readlink(f'/proc/self/fd/{descriptor}')))
        sync(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    write(folder, 30)
    *before, draft, last = synced
    assert draft == folder / '30' / 'checksums.json.draft' and last == folder / '30'
    assert {*before, folder / '30' / 'checksums.json'} >= {folder, *(folder / '30').rglob('*')}


def test_one_whose_checksums_do_not_fit_is_removed(folder, monkeypatch):
    """Two of them would otherwise push the last whole one out of the way."""

    def write(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer = Checkpointer(folder)
    with monkeypatch.context() as patch:
        patch.setattr(durable, 'write', write)
        for step in (30, 40):
            with pytest.raises(NotSaved, match=f'{folder}/{step}: No space left on device'):
                checkpointer.save(step, make_saved(step))
    assert sorted(path.name for path in folder.iterdir()) == ['10', '20']
    checkpointer.save(50, make_saved(50))
    checkpointer.close()
    assert sorted(path.name for path in folder.iterdir()) == ['20', '50']


def test_one_in_which_another_host_is_lost_is_kept(tmp_path, monkeypatch, caplog):
    """It may be the only one; it is whole, as the hosts had all written their parts."""
    folder = tmp_path / 'checkpoints'

    def lose(folder):
        raise ValueError('Gloo all-reduce failed: Connection closed by peer')

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, '_write_checksums', lose)
        patch.setattr(jax.distributed, 'is_initialized', lambda: True)
        with pytest.raises(ValueError, match='Gloo'):
            write(folder, 10)
    assert_equal(read(folder), make_saved(10))
    assert 'was taken unchecked' in caplog.text


def test_a_step_before_the_newest_is_refused(folder):
    with pytest.raises(UserError, match='there is a later one already'):
        write(folder, 15)


def test_reading_alone_renames_nothing(folder, caplog):
    truncate(folder / '20' / 'counters')
    assert_equal(read_state(folder), make_state(10))
    assert len(caplog.records) == 1
    assert latest_step(folder) == 20


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_nothing_but_damaged_checkpoints(folder):
    for step in ('10', '20'):
        truncate(folder / step / 'counters')
    with pytest.raises(UserError) as error:
        read(folder)
    assert 'holds no checkpoint that can be read' in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ['10', '20']
    gc.collect()


def truncate(folder):
    """Cuts all files in a folder to half their length, as a full disk or a broken copy does."""
    for path in folder.rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_no_room(folder, capfd):
    checkpointer = Checkpointer(folder)
    shutil.rmtree(folder)
    folder.write_text('')  # where the folder was
    with pytest.raises(UserError, match=f'Cannot write the checkpoint {folder}/30: '):
        checkpointer.save(30, make_saved(30))
    checkpointer.close()
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('pages_left', [0, 25, 40, 60, 80])
def test_room_for_some_of_it(pages_left, small_disk, capfd):
    """As a replay is much larger than all else, a disk is rarely full to the last byte."""
    saved = make_saved(10)
    saved.replay['arrays']['data/large'] = np.zeros((1000, 1000), np.uint8)  # 245 pages
    checkpointer = Checkpointer(small_disk.folder / 'checkpoints')
    checkpointer.save(10, saved)
    small_disk.fill(pages_left)
    with pytest.raises(NotSaved, match='No space left on device'):
        checkpointer.save(20, saved)
    small_disk.empty()
    checkpointer.save(30, saved)
    checkpointer.close()
    restored = read(small_disk.folder / 'checkpoints').replay['arrays']['data/large']
    np.testing.assert_array_equal(restored, saved.replay['arrays']['data/large'])
    assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('order', ['C', 'F'])
def test_arrays_are_written_as_numpy_writes_them(order, tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5, order=order)
    for part in (
        array,
        array[:, :3],
        array[:, ::-2],
        array[0, 0, 0, ...],
        array[:0],
        np.asfortranarray(array),
    ):
        checkpoint._write_array(tmp_path / 'a.npy', part)
        found = np.load(tmp_path / 'a.npy')
        np.testing.assert_array_equal(found, part)
        assert found.dtype == part.dtype and found.shape == part.shape


@pytest.mark.medium
def test_any_room_that_is_too_little(small_disk, capfd):
    """Threads of orbax and tensorstore fail at any moment, and have to be quiet about it."""
    checkpointer = Checkpointer(small_disk.folder / 'checkpoints')
    pages = 0
    while latest_step(small_disk.folder / 'checkpoints') is None:
        small_disk.fill(pages)
        with contextlib.suppress(NotSaved):
            checkpointer.save(10, make_saved(10))
        small_disk.empty()
        pages += 2
    checkpointer.close()
    gc.collect()
    assert 10 < pages < 50
    assert capfd.readouterr().err == ''
    assert_equal(read(small_disk.folder / 'checkpoints').state, make_state(10))


def test_another_agent(folder, caplog):
    with pytest.raises(UserError) as error:
        read_state(folder, make_state(0, width=9))
    assert str(error.value).endswith(
        'is of another agent: optimizer/1/moment is int32[8] there and int32[9] here.'
    )
    other = make_state(0)
    other.params['c'] = jnp.ones(1)
    with pytest.raises(UserError, match=r'params/c is absent there and float32\[1\] here'):
        read_state(folder, other)
    assert not caplog.records


def test_other_devices(folder):
    """A state saved on one device is read onto four."""
    state = make_state(0)
    mesh = sharding.make_mesh(1, 4)
    everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    checkpointer = Checkpointer(folder)
    found = checkpointer.restore_state(sharding.abstract(state, everywhere))
    checkpointer.close()
    assert_equal(found, make_state(20))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found)} == {4}
