"""The table of what `measure` found, and how two such results compare."""

import statistics
from collections.abc import Iterable
from typing import Any


def spread(values: Iterable[float], form: str) -> str:
    """The median, and in brackets the least and the greatest."""
    values = list(values)
    least, most = (format(value, form) for value in (min(values), max(values)))
    return f'{statistics.median(values):{form}} ({least} - {most})'


def table(results: dict[str, Any]) -> str:
    """Markdown of all results."""
    lines = [
        f'{results["measured"]}, Python {results["python"]}, jax {results["jax"]}: '
        f'`python -m experiments.benchmarks.measure --runs={results["runs"]}`.',
        '',
        '| what | median (least - greatest) | GFLOP | peak, GFLOP/s | share of peak | memory |',
        '|---|---|---|---|---|---|',
    ]
    for case, result in results['cases'].items():
        seconds, peaks = result['seconds'], result['machine gflops']
        milli = statistics.median(seconds) < 0.1
        time = spread([x * 1e3 for x in seconds] if milli else seconds, '.3g')
        cells = [case, f'{time} ms' if milli else time, '', spread(peaks, '.0f'), '', '']
        if 'gflop' in result:
            cells[2] = f'{result["gflop"]:.1f}'
            rates = [result['gflop'] / x for x in seconds]
            cells[4] = spread([a / b for a, b in zip(rates, peaks, strict=True)], '.0%')
        if 'steps' in result:
            cells[0] += f', {result["steps"] / statistics.median(seconds):.0f} steps/s'
            pairs = zip(seconds, result['update alone seconds'], strict=True)
            cells[0] += f', {spread([a / b for a, b in pairs], ".2f")} times its update alone'
        if 'peak gigabytes' in result:
            cells[5] = f'{result["peak gigabytes"]:.2f} GB'
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def work(result: dict[str, Any], yardstick: str) -> float:
    """What the machine could have done meanwhile: seconds times how fast it was, their median."""
    pairs = zip(result['seconds'], result[yardstick], strict=True)
    return statistics.median(seconds * fast for seconds, fast in pairs)


def compare(cases: dict[str, Any], baseline: dict[str, Any]) -> bool:
    """Prints ratios to the baseline, relative to the machine; returns whether none is too great.

    Where memory is measured, too, it is relative to what became slower, products or memory.
    """
    good = True
    for case, result in cases.items():
        before = baseline['cases'][case]
        ratio = min(
            work(result, name) / work(before, name) for name in result if name.startswith('machine')
        )
        limit = 1.15 if case.startswith(('update', 'loop')) else 1.5
        good &= ratio <= limit
        note = '  too slow' if ratio > limit else ''
        print(f'{ratio:6.2f} times the time of the baseline: {case}{note}', flush=True)
    return good
