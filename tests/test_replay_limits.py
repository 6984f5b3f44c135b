"""Tests of what bounds the replay: the memory of the machine and the train ratio."""

import json
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamerv3_jax import free_space
from dreamerv3_jax import replay as replay_module
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.replay import Replay, bytes_per_step, check_memory
from dreamerv3_jax.train_ratio import TrainRatio

SPECS = {
    'image': ((2, 2, 1), np.dtype(np.uint8)),
    'action/move': ((2,), np.dtype(np.float32)),
    'number': ((), np.dtype(np.int64)),
    'is_first': ((), np.dtype(bool)),
    'is_last': ((), np.dtype(bool)),
    'deter': ((3,), np.dtype(np.float32)),
    'stoch': ((2,), np.dtype(np.uint8)),
}


# Memory.


def test_room_on_disk_is_taken_at_once(small_disk):
    def make(capacity):
        sizes = dict(streams=2, batch_size=2, batch_length=3)
        options = dict(online=False, seed=0, directory=small_disk.folder)
        return Replay(SPECS, capacity=capacity, **sizes, **options)

    make(10_000)
    files = [path.stat() for path in small_disk.folder.glob('*.ring')]
    assert all(512 * file.st_blocks >= file.st_size > 0 for file in files)
    with pytest.raises(UserError, match='No space left on device; set a smaller --config.replay'):
        make(1_000_000)


def test_bytes_per_step():
    # image 4, action 2 * 4, number 8, flags 2, deter 3 * 4, stoch 2, and whether there are latents.
    assert bytes_per_step(SPECS) == 4 + 8 + 8 + 2 + 12 + 2 + 1


def test_check_memory_names_a_capacity_that_fits(monkeypatch):
    monkeypatch.setattr(replay_module, 'available_memory', lambda: 37 * 10_000)
    with pytest.raises(UserError, match='on_disk=True') as error:
        check_memory(SPECS, 8_001)
    fitting = re.search(r'--config\.replay\.capacity=(\d+)', str(error.value))
    assert fitting is not None and fitting[1] == '8000'  # 80%
    check_memory(SPECS, int(fitting[1]))


def test_a_replay_that_was_accepted_before_may_take_all(monkeypatch):
    monkeypatch.setattr(replay_module, 'available_memory', lambda: 37 * 10_000)
    check_memory(SPECS, 10_000, resumed=True)
    with pytest.raises(UserError, match='make room for it, or set --config.replay.on_disk=True'):
        check_memory(SPECS, 10_001, resumed=True)


def test_check_memory_of_several_machines_names_a_capacity_of_all(monkeypatch):
    monkeypatch.setattr(replay_module, 'available_memory', lambda: 37 * 10_000)
    check_memory(SPECS, 16_000, share=0.5)
    with pytest.raises(UserError, match='16,001 steps .* on this machine, .*=16000, or'):
        check_memory(SPECS, 16_001, share=0.5)


def test_check_memory_passes_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(replay_module, 'available_memory', lambda: None)
    check_memory(SPECS, 10**15)


def test_check_memory_of_this_machine(tmp_path):
    check_memory(SPECS, 1000)
    check_memory(SPECS, 1000, tmp_path / 'not' / 'yet' / 'there')
    with pytest.raises(UserError, match='on_disk'):
        check_memory(SPECS, 10**15)
    with pytest.raises(UserError, match='of disk') as error:
        check_memory(SPECS, 10**15, tmp_path / 'not' / 'yet' / 'there')
    assert 'on_disk' not in str(error.value)


def test_space_of_files_to_overwrite_counts_as_free(tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(free_space.shutil, 'disk_usage', lambda path: Usage)
    assert free_space.available_disk(tmp_path) == 1000
    (tmp_path / '0-of-2').mkdir()
    (tmp_path / '0-of-2' / 'image.ring').write_bytes(bytes(range(256)) * 256)
    (tmp_path / 'other').write_bytes(bytes(range(256)) * 256)
    assert 1000 + 65536 <= free_space.available_disk(tmp_path) < 1000 + 2 * 65536


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({'/proc/meminfo': 'MemTotal: 9 kB\nMemAvailable:    7 kB\n'}, 7 * 1024),
        (
            {
                '/proc/meminfo': 'MemAvailable: 7 kB\n',
                '/proc/self/cgroup': '0::/\n',
                '/sys/fs/cgroup/memory.max': '4096\n',
            },
            4096,
        ),
        (
            {
                '/proc/meminfo': 'MemAvailable: 7 kB\n',
                '/proc/self/cgroup': '0::/\n',
                '/sys/fs/cgroup/memory.max': 'max\n',
            },
            7 * 1024,
        ),
        (  # a job of SLURM; the limit is that of a group above
            {
                '/proc/meminfo': 'MemAvailable: 7 kB\n',
                '/proc/self/cgroup': '0::/slurm/job_7/task_0\n',
                '/sys/fs/cgroup/slurm/job_7/memory.max': '5000\n',
                '/sys/fs/cgroup/slurm/job_7/task_0/memory.max': 'max\n',
            },
            5000,
        ),
        (  # version 1
            {
                '/proc/meminfo': 'MemAvailable: 7 kB\n',
                '/proc/self/cgroup': '9:cpu,cpuacct:/a\n4:memory:/a:b\n0::/\n',
                '/sys/fs/cgroup/memory/a:b/memory.limit_in_bytes': '6000\n',
                '/sys/fs/cgroup/memory/memory.limit_in_bytes': f'{2**63 - 4096}\n',
            },
            6000,
        ),
        ({}, 3 * 50),
    ],
)
def test_available_memory(files, expected, monkeypatch):
    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    system = {'SC_PHYS_PAGES': 3, 'SC_PAGE_SIZE': 50}
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_text', read_text)
        patch.setattr(os, 'sysconf', system.__getitem__)
        available = free_space.available_memory()
    assert available == expected


# Train ratio.


def test_train_ratio_by_hand():
    # 32 replayed steps per agent step: an update of 1024 steps every 32 agent steps.
    train_ratio = TrainRatio(32, batch_steps=1024)
    assert [train_ratio.due(steps) for steps in (1000, 1031, 1032, 1032, 1200)] == [1, 0, 1, 0, 5]


@given(
    ratio=st.decimals(0, 2000, places=3).filter(bool),
    strides=st.lists(st.integers(0, 3000), max_size=50),
    batch_steps=st.integers(1, 2000),
    start=st.integers(0, 10**9),
)
def test_train_ratio_is_exact_however_it_is_asked(ratio, strides, batch_steps, start):
    train_ratio = TrainRatio(float(ratio), batch_steps)
    updates, steps = train_ratio.due(start), start
    for stride in strides:
        steps += stride
        updates += train_ratio.due(steps)
        restored = TrainRatio(float(ratio), batch_steps)
        restored.load_state(json.loads(json.dumps(train_ratio.state())))
        train_ratio = restored
    assert updates == 1 + (steps - start) * Fraction(ratio) // batch_steps


def test_train_ratio_means_the_decimal_number():
    # As a binary fraction 0.3 is a little less, and the third update would be a step late.
    train_ratio = TrainRatio(0.3, batch_steps=1)
    assert [train_ratio.due(0), train_ratio.due(10)] == [1, 3]


def test_train_ratio_does_not_drift():
    train_ratio = TrainRatio(0.1, batch_steps=1)
    assert sum(train_ratio.due(steps) for steps in range(100_001)) == 1 + 10_000


def test_train_ratio_may_change_on_resume():
    before = TrainRatio(1, batch_steps=10)
    assert [before.due(0), before.due(25)] == [1, 2]  # half an update is left over
    after = TrainRatio(2, batch_steps=10)
    after.load_state(before.state())
    assert [after.due(27), after.due(28), after.due(33)] == [0, 1, 1]


def test_train_ratio_of_nothing_and_of_nonsense():
    train_ratio = TrainRatio(0, batch_steps=10)
    assert [train_ratio.due(0), train_ratio.due(10**6)] == [0, 0]
    for ratio in (-1.0, float('nan'), float('inf')):
        with pytest.raises(UserError, match='train_ratio'):
            TrainRatio(ratio, batch_steps=10)
