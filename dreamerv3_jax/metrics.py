"""Metrics of a run in files: JSON lines, and events for TensorBoard where it is installed."""

import contextlib
import errno
import io
import itertools
import json
import math
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TENSORBOARD_HINT = (
    'No TensorBoard logs: tensorboardX is missing; in the clone, pip install -e ".[tensorboard]".'
)


class Means:
    """Averages metrics by name.

    Example:
      >>> means = Means()
      >>> means.add({'loss': 1.0})
      >>> means.add({'loss': 3.0, 'entropy': 0.5})
      >>> means.take()
      {'loss': (4.0, 2), 'entropy': (0.5, 1)}
    """

    def __init__(self) -> None:
        """Starts with nothing."""
        self.messages: list[str] = []  # for the user; who has shown them takes them away
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Any], prefix: str = '') -> None:
        """Adds values, anything that `float` takes, to the means of `prefix + name`."""
        for name, value in metrics.items():
            name = prefix + name
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_episode(self, score: float, length: int) -> None:
        """Adds a finished episode to the means 'episode/score' and 'episode/length'."""
        self.add({'score': score, 'length': length}, prefix='episode/')

    def take(self) -> dict[str, tuple[float, int]]:
        """Returns and forgets the sum and the count of every metric, for `put` of another one."""
        taken = {name: (total, self._counts[name]) for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return taken

    def put(self, taken: Mapping[str, Sequence[Any]]) -> None:
        """Adds what `take` returned."""
        for name, (total, count) in taken.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + count


class MetricWriter(Means):
    """Averages metrics and writes the means to `metrics.jsonl` and to TensorBoard.

    Each line of the file is one flat JSON object with 'step', 'time' (seconds since the epoch) and
    the means, by name, of what was added since the line before. A mean that is not finite is
    written as `null` and left out of TensorBoard. On a full disk lines are left out as a whole.

    Example:
      >>> import tempfile
      >>> writer = MetricWriter(Path(tempfile.mkdtemp()), tensorboard=False)
      >>> writer.add({'loss': 1.0})
      >>> writer.add({'loss': 3.0, 'entropy': 0.5})
      >>> writer.write(step=100)
      {'loss': 2.0, 'entropy': 0.5}
      >>> writer.close()
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_step: int | None = None,
        anew: bool = False,
        tensorboard: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the files for appending.

        Args:
          directory: of the run; made where it is missing.
          resume_step: the step from which a run goes on; later lines of the file are dropped, as is
            a last line that was torn by a crash.
          anew: whether a run begins; a file that is there is kept under another name.
          tensorboard: whether to write TensorBoard events too, if possible.
          clock: time in seconds since the epoch.
        """
        super().__init__()
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / 'metrics.jsonl'
        if anew and path.exists() and path.stat().st_size:
            kept = next(
                other
                for number in itertools.count(1)
                if not (other := directory / f'metrics-before-{number}.jsonl').exists()
            )
            path.rename(kept)
            self.messages.append(
                f'{directory} held a run without a checkpoint, and this one begins anew; its '
                f'metrics are kept in {kept.name}.'
            )
        if path.exists():
            size, damaged = _usable_part(path, resume_step)
            os.truncate(path, size)
            if damaged:
                self.messages.append(f'{path} is damaged: {damaged} of its lines cannot be read.')
        self._file = path.open('ab', buffering=0)
        self._directory = directory
        self._full = False  # the last line did not fit on the disk
        self._events = self._open_events(directory, resume_step) if tensorboard else None

    def write(self, step: int) -> dict[str, float]:
        """Writes the means since the last call, if there are any, and returns them."""
        means = {name: total / count for name, (total, count) in self.take().items()}
        if not means:
            return means
        now = self._clock()
        error = _append(self._file, f'{format_record(step, now, means)}\n'.encode())
        if self._events is not None:
            error = _append(self._events, _framed(_event(now, step, means))) or error
        if error is not None and not self._full:
            self.messages.append(
                f'Cannot write to {self._directory} ({error.strerror}); training goes on, and '
                'metrics are left out until it is possible again.'
            )
        self._full = error is not None
        return means

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _open_events(self, directory: Path, resume_step: int | None) -> io.FileIO | None:
        """Opens a file of events for TensorBoard; those after the resumed step are hidden there."""
        try:
            from tensorboardX.proto import event_pb2
        except ImportError:
            self.messages.append(TENSORBOARD_HINT)
            return None
        now = self._clock()
        file = (directory / f'events.out.tfevents.{now:.0f}.{os.getpid()}').open('ab', buffering=0)
        start = [event_pb2.Event(wall_time=now, file_version='brain.Event:2')]
        if resume_step is not None:
            begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            start.append(event_pb2.Event(wall_time=now, step=resume_step + 1, session_log=begins))
        _append(file, b''.join(map(_framed, start)))
        return file


def _append(file: io.FileIO, data: bytes) -> OSError | None:
    """Appends all of it, or nothing and returns why."""
    size = -1
    try:
        size = file.seek(0, os.SEEK_END)
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # of a disk that fails, or nothing was begun
            file.truncate(size)
        return error
    return None


def _event(seconds: float, step: int, means: Mapping[str, float]) -> Any:
    """All means that are finite as one event for TensorBoard."""
    from tensorboardX.proto import event_pb2, summary_pb2

    values = [
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in means.items()
        if math.isfinite(value)
    ]
    return event_pb2.Event(wall_time=seconds, step=step, summary=summary_pb2.Summary(value=values))


def _framed(event: Any) -> bytes:
    """An event as bytes of the file: its length and itself, each with a checksum."""
    from tensorboardX.record_writer import masked_crc32c

    parts = []
    data = event.SerializeToString()
    for part in (struct.pack('<Q', len(data)), data):
        parts += [part, struct.pack('<I', masked_crc32c(part))]
    return b''.join(parts)


def format_record(step: int, seconds: float, values: Mapping[str, float]) -> str:
    """Returns one flat JSON object; numbers that are not finite become `null`."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({'step': step, 'time': round(seconds, 3), **finite}, allow_nan=False)


def _usable_part(path: Path, resume_step: int | None) -> tuple[int, int]:
    """Returns how far a run can go on with its file, and how many damaged lines that part holds.

    It ends with the last whole line that is not after the given step.
    """
    usable, usable_damaged, size, damaged = 0, 0, 0, 0
    with path.open('rb') as file:
        for line in file:
            if not line.endswith(b'\n'):
                break
            size += len(line)
            try:
                within = resume_step is None or json.loads(line)['step'] <= resume_step
            except (KeyError, TypeError, ValueError):
                damaged += 1
                continue
            if within:
                usable, usable_damaged = size, damaged
    return usable, usable_damaged
