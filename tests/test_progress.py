"""Tests of the timer and the progress line."""

import io
import math
import re

import hypothesis
import hypothesis.strategies as st
import pytest

from dreamerv3_jax import progress
from dreamerv3_jax.progress import ProgressLine, Status, Timer

STATUS = Status(
    steps=421_337,
    total=1_000_000,
    episodes=1234,
    score=812.34,
    frames_per_second=1234.0,
    updates_per_second=38.12,
    shares={'env': 0.31, 'policy': 0.12, 'replay': 0.02, 'update': 0.5},
    seconds_left=3723.0,
)


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    encoding = 'utf-8'

    def isatty(self):
        return True


class AsciiTerminal(Terminal):
    encoding = 'ascii'


# Timer.


def test_shares_of_the_wall_time():
    clock = Clock()
    timer = Timer(clock)
    for _ in range(2):
        with timer.section('env'):
            clock.now += 1
        with timer.section('update'):
            clock.now += 3
        clock.now += 1
    assert timer.shares() == {'env': 0.2, 'update': 0.6}
    timer.restart()
    clock.now += 4
    with timer.section('update'):
        clock.now += 4
    assert timer.shares() == {'env': 0.0, 'update': 0.5}


def test_nested_sections_count_once():
    clock = Clock()
    timer = Timer(clock)
    with timer.section('update'):
        clock.now += 1
        for _ in range(2):
            with timer.section('replay'):
                clock.now += 1
                with timer.section('disk'):
                    clock.now += 2
        clock.now += 1
    with timer.section('env'):
        clock.now += 2
    assert timer.shares() == {'disk': 0.4, 'replay': 0.2, 'update': 0.2, 'env': 0.2}


def test_sections_end_with_an_exception():
    clock = Clock()
    timer = Timer(clock)
    with pytest.raises(KeyError):
        with timer.section('env'):
            clock.now += 1
            raise KeyError
    clock.now += 1
    assert timer.shares() == {'env': 0.5}


def test_shares_before_any_time_has_passed():
    assert Timer(Clock()).shares() == {}


# Formatting.


@pytest.mark.parametrize(
    ('number', 'text'),
    [
        (0, '0'),
        (0.04, '0.04'),
        (1.5, '1.50'),
        (12.34, '12.3'),
        (99.96, '100'),
        (999, '999'),
        (999.4, '999'),
        (999.6, '1.00k'),
        (1234, '1.23k'),
        (9996, '10.0k'),
        (99_960, '100k'),
        (123_456, '123k'),
        (999_499, '999k'),
        (999_501, '1.00M'),
        (5_000_000, '5.00M'),
        (1.6e9, '1.60G'),
    ],
)
def test_format_count(number, text):
    assert progress.format_count(number) == text


@hypothesis.given(st.floats(0, 9.99e11))
def test_counts_are_short_and_close(number):
    text = progress.format_count(number)
    assert len(text) <= 5
    units = {'k': 1e3, 'M': 1e6, 'G': 1e9}
    value = float(text.rstrip('kMG')) * units.get(text[-1], 1)
    assert value == pytest.approx(number, rel=0.006, abs=0.006)


@pytest.mark.parametrize(
    ('score', 'text'),
    [
        (None, '-'),
        (0.0, '0.000'),
        (-1.0, '-1.000'),
        (0.12345, '0.123'),
        (-21.0, '-21.00'),
        (812.34, '812.3'),
        (9999.4, '9999'),
        (12_345, '12.3k'),
        (-123_456, '-123k'),
        (math.nan, 'nan'),
        (-math.inf, '-inf'),
    ],
)
def test_format_score(score, text):
    assert progress.format_score(score) == text


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (None, '-'),
        (0, '0s'),
        (59.4, '59s'),
        (59.6, '1m 00s'),
        (185, '3m 05s'),
        (3599.6, '1h 00m'),
        (3723, '1h 02m'),
        (86_399.9, '1d 00h'),
        (200_000, '2d 07h'),
    ],
)
def test_format_duration(seconds, text):
    assert progress.format_duration(seconds) == text


def test_bar_by_hand():
    assert progress.format_bar(0.0, 4, unicode=True) == '────'
    assert progress.format_bar(0.125, 4, unicode=True) == '╸───'
    assert progress.format_bar(0.5, 4, unicode=True) == '━━──'
    assert progress.format_bar(0.99, 4, unicode=True) == '━━━╸'  # full only at the end
    assert progress.format_bar(1.0, 4, unicode=True) == '━━━━'
    assert progress.format_bar(0.5, 4, unicode=False) == '##--'
    assert progress.format_bar(0.99, 4, unicode=False) == '###-'


@hypothesis.given(st.floats(-1, 2), st.integers(0, 60), st.booleans())
def test_bar_has_its_width(fraction, width, unicode):
    assert len(progress.format_bar(fraction, width, unicode=unicode)) == width


def test_plain_line_by_hand():
    assert progress.format_plain(STATUS) == (
        ' 42%   421k/1.00M  1.23k ep  score  812.3  1.23k frames/s   38.1 upd/s'
        '  1h 02m left   env 31% policy 12% replay  2% update 50%'
    )
    start = Status(0, 1000, 0, None, 0.0, 0.0, {}, None)
    assert progress.format_plain(start) == (
        '  0%      0/1.00k      0 ep  score      -      0 frames/s      0 upd/s  - left'
    )


def test_columns_stay_where_they_are():
    later = Status(
        steps=987_654,
        total=1_000_000,
        episodes=7,
        score=-21.0,
        frames_per_second=9.5,
        updates_per_second=1234.5,
        shares={'env': 0.01, 'policy': 0.99, 'replay': 0.0, 'update': 0.0},
        seconds_left=5.0,
    )
    here, there = progress.format_plain(STATUS), progress.format_plain(later)
    for label in ('%', '/1.00M', ' ep', 'score', 'frames/s', 'upd/s', 'env', 'policy', 'update'):
        assert here.index(label) == there.index(label)


def test_bar_line_keeps_what_matters_most():
    def line(width):
        return progress.format_bar_line(STATUS, width, unicode=True)

    assert line(80) == (
        ' 42% ━━━━━━━━───────────   421k/1.00M  score  812.3  1.23k frames/s  1h 02m left'
    )
    assert line(40) == ' 42% ━━━╸─────   421k/1.00M  1h 02m left'
    assert line(12) == ' 42% ━━╸────'
    assert line(6) == ' 42% ─' and line(5) == ' 42%' and line(3) == ' 42'
    assert 'update 50%' in line(140) and 'update' not in line(120)
    assert line(1000).count('━') + line(1000).count('─') + 1 == 40


statuses = st.builds(
    Status,
    steps=st.integers(0, 10**9),
    total=st.integers(0, 10**9),
    episodes=st.integers(0, 10**7),
    score=st.none() | st.floats(),
    frames_per_second=st.floats(0, 1e6),
    updates_per_second=st.floats(0, 1e4),
    shares=st.dictionaries(st.sampled_from(['env', 'policy', 'update']), st.floats(0, 1)),
    seconds_left=st.none() | st.floats(0, 1e8),
)


@hypothesis.given(statuses, st.integers(0, 200), st.booleans())
def test_bar_line_fits_any_width(status, width, unicode):
    line = progress.format_bar_line(status, width, unicode=unicode)
    assert len(line) <= width
    assert '\n' not in line
    assert unicode or line.isascii()


def test_hundred_percent_only_at_the_end():
    assert progress.format_plain(STATUS._replace(steps=999_999)).startswith(' 99%')
    assert progress.format_plain(STATUS._replace(steps=1_000_000)).startswith('100%')
    assert progress.format_plain(STATUS._replace(steps=1_000_016)).startswith('100%')
    assert progress.format_plain(STATUS._replace(total=0)).startswith('100%')
    # As numbers of floating point these are 28.999... percent.
    assert progress.format_plain(STATUS._replace(steps=3_248, total=11_200)).startswith(' 29%')


def test_paint_adds_colours_only():
    line = progress.format_bar_line(STATUS, 80, unicode=True)
    painted = progress.paint(line)
    assert painted.count('\x1b[0m') == 2
    for code in ('\x1b[36m', '\x1b[2m', '\x1b[0m'):
        painted = painted.replace(code, '')
    assert painted == line


# Progress line.


@pytest.fixture
def terminal_environment(monkeypatch):
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '81')
    monkeypatch.setenv('NO_COLOR', '1')
    return monkeypatch


def test_plain_lines_at_intervals():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(1000, stream=stream, interval=30, clock=clock)
    progress.update(0, 0, {})  # at once, to show that there is life
    for _ in range(60):
        clock.now += 1
        progress.update(int(clock.now - 100) * 10, int(clock.now - 100), {'env': 0.5})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and '\x1b' not in stream.getvalue() and '\r' not in stream.getvalue()
    # At 600 of 1000 steps, ten steps and one update per second: 40 seconds to go.
    assert lines[2] == (
        ' 60%    600/1.00k      0 ep  score      -     10 frames/s      1 upd/s'
        '  40s left      env 50%'
    )
    progress.message('saved')
    assert stream.getvalue().splitlines()[3:] == ['saved']


def test_time_left_begins_with_the_updates():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(1000, stream=stream, interval=10, clock=clock)
    # 400 steps in the first 10 seconds, without updates; then 2 steps and 1 update per second.
    for steps, updates in ((0, 0), (400, 0), (410, 5), (430, 15), (450, 25)):
        progress.update(steps, updates, {})
        clock.now += 10
    lines = stream.getvalue().splitlines()
    assert [re.search(r'upd/s +(.+?) left', line)[1] for line in lines] == [
        *('-', '-', '-'),
        *('4m 45s', '4m 35s'),
    ]
    assert '  2 frames/s' in lines[-1]


def test_redraws_on_a_terminal(terminal_environment):
    stream, clock = Terminal(), Clock()
    progress = ProgressLine(1000, stream=stream, clock=clock)
    progress.update(0, 0, {})
    progress.update(1, 0, {})  # too soon to be drawn
    clock.now += 1
    progress.update(500, 2, {})
    progress.message('saved')
    progress.close()
    first, second, third = stream.getvalue().split('\r')[1:4]
    assert first.startswith('  0% ───') and first.endswith('left\x1b[K')
    assert second.startswith(' 50% ━━━') and '500 frames/s' in second
    assert len(second) <= 80 + len('\x1b[K')
    # The message replaces the line, which comes back under it.
    assert third == '\x1b[Ksaved\n' + second.removesuffix('\x1b[K')
    assert stream.getvalue().endswith('\n') and stream.getvalue().count('\n') == 2


def test_close_draws_the_end(terminal_environment):
    stream, clock = Terminal(), Clock()
    progress = ProgressLine(1000, stream=stream, clock=clock)
    progress.update(0, 0, {})
    clock.now += 0.1
    progress.update(1000, 2, {})
    progress.close()
    assert '100% ━━━' in stream.getvalue()
    written = stream.getvalue()
    progress.close()
    assert stream.getvalue() == written


def test_close_before_the_start_says_nothing():
    stream = io.StringIO()
    ProgressLine(1000, stream=stream).close()
    assert stream.getvalue() == ''


def test_terminals_with_less(terminal_environment):
    stream = AsciiTerminal()
    ProgressLine(1000, stream=stream).update(500, 0, {})
    assert stream.getvalue().isascii() and '##--' in stream.getvalue()
    stream = Terminal()
    terminal_environment.delenv('NO_COLOR')
    ProgressLine(1000, stream=stream).update(500, 0, {})
    assert '\x1b[36m━' in stream.getvalue()
    stream = Terminal()
    terminal_environment.setenv('TERM', 'dumb')
    ProgressLine(1000, stream=stream).update(500, 0, {})
    assert '\x1b' not in stream.getvalue() and stream.getvalue().endswith('\n')


def test_score_is_the_mean_of_recent_episodes():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(1000, stream=stream, clock=clock)
    for score in [1000.0] * 10 + [1.0] * 10 + [3.0] * 10:
        progress.add_episode(score)
    progress.update(10, 0, {})
    assert '30 ep  score  2.000 ' in stream.getvalue()


def test_rates_are_those_of_the_last_half_minute():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(10_000, stream=stream, interval=10, clock=clock)
    steps = 0
    for second in range(100):
        steps += 1 if second < 60 else 20  # the first minute goes into compiling
        clock.now += 1
        progress.update(steps, 0, {})
    assert '20 frames/s' in stream.getvalue().splitlines()[-1]


class Closed(io.StringIO):
    """What `tee` leaves when it has ended, or a log on a full disk."""

    def write(self, text):
        raise BrokenPipeError


def test_nobody_reads(terminal_environment):
    for stream in (Closed(), type('ClosedTerminal', (Closed, Terminal), {})()):
        progress = ProgressLine(1000, stream=stream)
        progress.update(0, 0, {})
        progress.message('saved')
        progress.close()


def test_what_cannot_be_encoded_is_written_otherwise(terminal_environment):
    stream = io.TextIOWrapper(io.BytesIO(), encoding='latin-1', errors='strict')
    ProgressLine(1000, stream=stream).message('caf\xe9 \u2713 \udc80')
    assert stream.buffer.getvalue().strip() == b'caf\xe9 \\u2713 \\udc80'
