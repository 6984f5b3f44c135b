"""Tests of the metrics files."""

import io
import json
import math
import struct
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dreamerv3_jax import metrics
from dreamerv3_jax.metrics import MetricWriter


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_writer(directory, **kwargs):
    return MetricWriter(directory, **{'tensorboard': False, 'clock': Clock(), **kwargs})


def read_lines(directory):
    return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def test_means_since_the_last_line(tmp_path):
    clock = Clock()
    writer = make_writer(tmp_path / 'run', clock=clock)
    assert writer.write(0) == {}  # nothing to say yet: no line
    writer.add({'loss': 1, 'entropy': np.float32(0.5)})
    writer.add({'loss': np.array(4.0)})
    writer.add({'env': 0.25}, prefix='time/')
    means = {'loss': 2.5, 'entropy': 0.5, 'time/env': 0.25}
    assert writer.write(10) == means
    # Readable while the run goes on.
    assert read_lines(tmp_path / 'run') == [{'step': 10, 'time': 100.0, **means}]
    clock.now = 101.23456
    writer.add({'loss': 7})
    assert writer.write(20) == {'loss': 7}
    assert writer.write(30) == {}
    writer.close()
    assert read_lines(tmp_path / 'run')[1:] == [{'step': 20, 'time': 101.235, 'loss': 7.0}]


def test_means_of_several_hosts_weigh_every_value_alike(tmp_path):
    writer, other = make_writer(tmp_path), metrics.Means()
    writer.add({'score': 1.0, 'own': 5.0})
    for score in (2.0, 6.0):
        other.add({'score': score, 'log': score})
    everywhere = json.loads(json.dumps([writer.take(), other.take()]))  # how they travel
    assert (writer.take(), other.take()) == ({}, {})
    for taken in everywhere:
        writer.put(taken)
    assert writer.write(1) == {'score': 3.0, 'own': 5.0, 'log': 4.0}
    writer.close()


def test_episode_means(tmp_path):
    writer = make_writer(tmp_path)
    writer.add_episode(score=3.0, length=10)
    writer.add_episode(score=-1.0, length=5)
    assert writer.write(15) == {'episode/score': 1.0, 'episode/length': 7.5}
    writer.close()


def test_values_that_are_not_finite_are_valid_json(tmp_path):
    writer = make_writer(tmp_path)
    writer.add({'nan': math.nan, 'inf': math.inf, 'low': -math.inf, 'fine': 1.0, 'mixed': 1.0})
    writer.add({'mixed': math.nan})
    writer.write(1)
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = (tmp_path / 'metrics.jsonl').read_text()
    values = json.loads(line, parse_constant=refuse)
    expected = {'nan': None, 'inf': None, 'low': None, 'fine': 1.0, 'mixed': None}
    assert values == {'step': 1, 'time': 100.0, **expected}


@hypothesis.given(st.dictionaries(st.text(), st.floats()), st.integers(0, 10**12))
def test_record_is_one_line_of_json(values, step):
    values = {f'x{name}': value for name, value in values.items()}
    line = metrics.format_record(step, 1.5, values)
    assert '\n' not in line
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    assert json.loads(line) == {'step': step, 'time': 1.5, **finite}


def write_lines(directory, steps, **kwargs):
    writer = make_writer(directory, **kwargs)
    for step in steps:
        writer.add({'loss': step})
        writer.write(step)
    writer.close()


def test_resuming_appends(tmp_path):
    write_lines(tmp_path, [1, 2])
    write_lines(tmp_path, [3])
    assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 3]


def test_torn_last_line_is_dropped(tmp_path):
    write_lines(tmp_path, [1, 2])
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 3, "lo')
    write_lines(tmp_path, [4])
    assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 4]


def test_a_damaged_line_is_told_and_costs_no_other(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    lines = ['{"step": 1}', '{"step" 2}', '{"step": 900}', '{"step": 3}', '{"step": 4}', '{"st']
    path.write_text('\n'.join(lines))
    writer = MetricWriter(tmp_path, resume_step=3, tensorboard=False)
    writer.close()
    assert path.read_text().splitlines() == lines[:4]
    assert writer.messages == [f'{path} is damaged: 1 of its lines cannot be read.']


def test_a_run_that_begins_anew_keeps_the_metrics_before(tmp_path):
    write_lines(tmp_path, [1, 2])
    write_lines(tmp_path, [1, 2, 3], resume_step=0, anew=True)
    writer = make_writer(tmp_path, resume_step=0, anew=True)
    writer.close()
    assert read_lines(tmp_path) == []
    kept = [tmp_path / f'metrics-before-{number}.jsonl' for number in (1, 2)]
    assert [len(path.read_text().splitlines()) for path in kept] == [2, 3]
    assert 'its metrics are kept in metrics-before-2.jsonl' in writer.messages[0]
    writer = make_writer(tmp_path, resume_step=0, anew=True)  # there is nothing to keep
    writer.close()
    assert writer.messages == []


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    write_lines(tmp_path, [10, 20, 30, 40])
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 5')
    write_lines(tmp_path, [21], resume_step=20)
    assert [line['step'] for line in read_lines(tmp_path)] == [10, 20, 21]


def read_events(folder):
    """All events of all files, by the checksums of TensorFlow's record format."""
    event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
    crc = pytest.importorskip('tensorboardX.record_writer').masked_crc32c
    events = []
    for path in sorted(folder.glob('events.out.tfevents.*')):
        content = io.BytesIO(path.read_bytes())
        while header := content.read(8):
            assert struct.unpack('<I', content.read(4)) == (crc(header),)
            data = content.read(*struct.unpack('<Q', header))
            assert struct.unpack('<I', content.read(4)) == (crc(data),)
            events.append(event_pb2.Event.FromString(data))
    return events


def test_tensorboard_is_written_where_it_is_installed(tmp_path):
    pytest.importorskip('tensorboardX')
    writer = make_writer(tmp_path, tensorboard=True)
    assert writer.messages == []
    writer.add({'loss': 2.5, 'bad': math.nan})
    writer.write(10)
    writer.close()
    first, second = read_events(tmp_path)
    assert first.file_version == 'brain.Event:2'
    assert [(value.tag, value.simple_value) for value in second.summary.value] == [('loss', 2.5)]
    assert second.step == 10


@pytest.mark.parametrize('tensorboard', [False, True])
def test_a_full_disk_costs_whole_lines_only(tensorboard, small_disk):
    if tensorboard:
        pytest.importorskip('tensorboardX')
    writer = make_writer(small_disk.folder, tensorboard=tensorboard)
    for step in range(1, 200):
        if step == 10:
            small_disk.fill()
        if step == 150:
            small_disk.empty()
        writer.add({'loss': step, 'a metric with a long name': 1 / 3})
        writer.write(step)
    writer.close()
    steps = [line['step'] for line in read_lines(small_disk.folder)]
    before = steps.index(150)
    assert steps == [*range(1, before + 1), *range(150, 200)]
    assert 10 <= before < 149  # the first lines fit into the last block
    if tensorboard:
        events = [event.step for event in read_events(small_disk.folder)]
        assert len(set(events)) > 60 and events == sorted(events)
    (message,) = writer.messages
    assert f'{small_disk.folder} (No space left on device); training goes on' in message


def test_tensorboard_hides_what_follows_the_resumed_step(tmp_path):
    pytest.importorskip('tensorboardX')
    make_writer(tmp_path, tensorboard=True, resume_step=20).close()
    _, event = read_events(tmp_path)
    # Events from the given step on are hidden; step 20 itself was reached before the checkpoint.
    assert event.step == 21 and event.session_log.status == event.session_log.START


def test_without_tensorboard_one_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboardX.proto', None)
    writer = make_writer(tmp_path, tensorboard=True)
    writer.add({'loss': 2.5})
    writer.write(10)
    writer.close()
    assert len(writer.messages) == 1 and '.[tensorboard]' in writer.messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']
