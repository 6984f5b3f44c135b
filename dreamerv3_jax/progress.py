"""How a run gets on: the share of time per part of the loop, and a line on the terminal."""

import contextlib
import math
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TextIO

RATE_WINDOW = 30.0  # seconds over which the progress line averages its rates
RECENT_EPISODES = 20  # over which the progress line averages the score
SEPARATOR = '  '
DROPPED_FIRST = ('shares', 'episodes', 'updates', 'rate', 'score', 'left', 'steps')
LEAST_BAR, MOST_BAR = 8, 40  # characters
DURATIONS = (('d', 86400, 'h', 3600), ('h', 3600, 'm', 60), ('m', 60, 's', 1))
UNITS = ((1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


class Timer:
    """Measures which share of the wall time each part of the loop takes.

    Example:
      >>> timer = Timer()
      >>> with timer.section('env'):
      ...     pass
      >>> list(timer.shares())
      ['env']
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts measuring; `clock` returns seconds."""
        self._clock = clock
        self._totals: dict[str, float] = {}
        self._nested = 0.0  # seconds of the sections inside the current one
        self._start = clock()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Counts the time in this context for `name`, less that of sections nested in it."""
        start, outer = self._clock(), self._nested
        self._nested = 0.0
        try:
            yield
        finally:
            elapsed = self._clock() - start
            self._totals[name] = self._totals.get(name, 0.0) + elapsed - self._nested
            self._nested = outer + elapsed

    def shares(self) -> dict[str, float]:
        """Returns each section's share of the wall time since the start or `restart`, in [0, 1]."""
        wall = max(self._clock() - self._start, 1e-9)
        return {name: total / wall for name, total in self._totals.items()}

    def restart(self) -> None:
        """Forgets all times; the sections keep their order."""
        self._totals = dict.fromkeys(self._totals, 0.0)
        self._start = self._clock()


class Status(NamedTuple):
    """What the progress line shows."""

    steps: int
    total: int
    episodes: int
    score: float | None  # mean of the recent episodes
    frames_per_second: float
    updates_per_second: float
    shares: Mapping[str, float]  # of the wall time, by section
    seconds_left: float | None


class ProgressLine:
    """Shows how a run gets on: one line that redraws on a terminal, now and then a line elsewhere.

    Example:
      >>> progress = ProgressLine(1_000_000)
      >>> progress.add_episode(12.0)
      >>> progress.update(16, 0, {})  # doctest: +ELLIPSIS
        0%     16/1.00M      1 ep  score  12.00 ...
    """

    def __init__(
        self,
        total: int,
        *,
        stream: TextIO | None = None,
        interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        """Prepares; nothing is written yet.

        Args:
          total: frames at the end of the run.
          stream: standard output by default.
          interval: seconds between lines where the stream is not a terminal.
          clock: time in seconds.
          quiet: messages only.
        """
        self._quiet = quiet
        self._total = total
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
        self._unicode = _can_encode(self._stream)
        self._color = self._terminal and not os.environ.get('NO_COLOR')
        self._interval = 0.2 if self._terminal else interval
        self._clock = clock
        self._drawn: float | None = None  # when
        self._line = ''  # what is on the terminal's last line
        self._latest: tuple[int, int, Mapping[str, float]] | None = None
        self._points: deque[tuple[float, int, int]] = deque()  # time, steps, updates
        self.episodes = 0  # finished so far
        self._scores: deque[float] = deque(maxlen=RECENT_EPISODES)

    def add_episode(self, score: float) -> None:
        """Counts a finished episode."""
        self.episodes += 1
        self._scores.append(score)

    def update(self, steps: int, updates: int, shares: Mapping[str, float]) -> None:
        """Takes note of where the run is, and draws if it is time to.

        Args:
          steps: frames of all environments, so far.
          updates: so far.
          shares: from `Timer.shares`.
        """
        if self._quiet:
            return
        self._latest = (steps, updates, shares)
        if self._drawn is None or self._clock() - self._drawn >= self._interval:
            self._draw()

    def message(self, text: str) -> None:
        """Prints a line above the progress line."""
        erase = '\r\x1b[K' if self._line else ''
        self._write(f'{erase}{text}\n{self._line}')

    def close(self) -> None:
        """Draws the last state and ends the line."""
        if self._latest is not None:
            self._draw()
        if self._line:
            self._write('\n')
            self._line = ''
        self._latest = None

    def _write(self, text: str) -> None:
        # A run goes on where nobody reads any more, or where the disk of a log is full.
        with contextlib.suppress(OSError):
            try:
                self._stream.write(text)
            except UnicodeError:  # of an environment, say, in a terminal of another language
                coding = self._stream.encoding
                self._stream.write(text.encode(coding, 'backslashreplace').decode(coding))
            self._stream.flush()

    def _draw(self) -> None:
        self._drawn = self._clock()
        status = self._status()
        if not self._terminal:
            self._write(format_plain(status) + '\n')
        else:
            width = shutil.get_terminal_size().columns - 1  # a full last column would wrap
            line = format_bar_line(status, width, unicode=self._unicode)
            self._line = paint(line) if self._color else line
            self._write(f'\r{self._line}\x1b[K')

    def _status(self) -> Status:
        assert self._latest is not None and self._drawn is not None
        steps, updates, shares = self._latest
        points = self._points
        points.append((self._drawn, steps, updates))
        # Steps before the first update are much faster than those to come.
        while len(points) > 2 and (
            self._drawn - points[1][0] >= RATE_WINDOW or updates > points[0][2] == 0
        ):
            points.popleft()
        then, steps_then, updates_then = points[0]
        elapsed = max(self._drawn - then, 1e-9)
        rate = (steps - steps_then) / elapsed
        left = max(self._total - steps, 0)
        return Status(
            steps=steps,
            total=self._total,
            episodes=self.episodes,
            score=sum(self._scores) / len(self._scores) if self._scores else None,
            frames_per_second=rate,
            updates_per_second=(updates - updates_then) / elapsed,
            shares=shares,
            seconds_left=left / max(rate, 1e-9) if rate and updates_then or not left else None,
        )


def format_count(number: float) -> str:
    """Returns a number from 0 up in at most five characters: 7, 0.25, 999, 1.23k, 12.3k, 1.00M."""
    # A unit begins where the one below would round to four digits: 999,600 is 1.00M, not 1000k.
    size, suffix = next((unit for unit in UNITS if number >= unit[0] * 0.9995), (1.0, ''))
    scaled = number / size
    if not suffix and number == int(number):
        return str(int(number))
    return f'{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}'


def format_score(score: float | None) -> str:
    """Returns a score with about four digits; - where there is none."""
    if score is None:
        return '-'
    if not math.isfinite(score):
        return str(score)
    if abs(score) >= 1e4:
        return ('-' if score < 0 else '') + format_count(abs(score))
    return f'{score:.{4 - len(str(int(abs(score))))}f}'


def format_duration(seconds: float | None) -> str:
    """Returns a time in its two largest units, such as 45s, 3m 05s, 1h 02m or 2d 03h."""
    if seconds is None:
        return '-'
    seconds = round(seconds)
    for unit, size, lesser, part in DURATIONS:
        if seconds >= size:
            return f'{seconds // size}{unit} {seconds % size // part:02d}{lesser}'
    return f'{seconds}s'


def format_bar(fraction: float, width: int, *, unicode: bool) -> str:
    """Returns a bar of exactly `width` characters, half of one being the least step in Unicode."""
    fraction = min(max(fraction, 0.0), 1.0)
    if not unicode:
        done = int(fraction * width)
        return '#' * done + '-' * (width - done)
    full, half = divmod(int(fraction * width * 2), 2)
    return '━' * full + '╸' * half + '─' * (width - full - half)


def format_plain(status: Status) -> str:
    """Returns the status as one line without a bar."""
    return SEPARATOR.join([_percent(status), *_segments(status).values()]).rstrip()


def format_bar_line(status: Status, width: int, *, unicode: bool) -> str:
    """Returns the status with a bar in at most `width` characters.

    The bar takes what room is left; where there is too little, the least important parts go.
    """
    segments = _segments(status)
    percent = _percent(status)
    for name in ('', *DROPPED_FIRST):
        segments.pop(name, None)
        text = ''.join(SEPARATOR + text for text in segments.values()).rstrip()
        room = width - len(percent) - len(' ') - len(text)
        if room >= LEAST_BAR:
            break
    if room < 1:
        return percent[: max(width, 0)]
    return f'{percent} {format_bar(_fraction(status), min(room, MOST_BAR), unicode=unicode)}{text}'


def paint(line: str) -> str:
    """Colours the Unicode bar for a terminal."""
    return re.sub('─+', '\x1b[2m\\g<0>\x1b[0m', re.sub('[━╸]+', '\x1b[36m\\g<0>\x1b[0m', line))


def _segments(status: Status) -> dict[str, str]:
    segments = {
        'steps': f'{format_count(status.steps):>5}/{format_count(status.total)}',
        'episodes': f'{format_count(status.episodes):>5} ep',
        'score': f'score {format_score(status.score):>6}',
        'rate': f'{format_count(status.frames_per_second):>5} frames/s',
        'updates': f'{format_count(status.updates_per_second):>5} upd/s',
        'left': f'{format_duration(status.seconds_left)} left'.ljust(len('59m 59s left')),
        'shares': ' '.join(f'{name} {share:>3.0%}' for name, share in status.shares.items()),
    }
    return {name: text for name, text in segments.items() if text}


def _fraction(status: Status) -> float:
    return status.steps / status.total if status.total > 0 else 1.0


def _percent(status: Status) -> str:
    # Rounded down: 100% means that the run is over.
    part = 100 * status.steps // status.total if status.total > 0 else 100
    return f'{min(part, 100):>3}%'


def _can_encode(stream: TextIO) -> bool:
    try:
        '━╸─'.encode(getattr(stream, 'encoding', None) or 'ascii')
    except (LookupError, UnicodeEncodeError):
        return False
    return True
