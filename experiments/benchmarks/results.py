"""The table of what `measure` found, and how two such results compare."""

import statistics
from collections.abc import Iterable
from typing import Any

COLUMNS = (
    'what', 'median (least - greatest)', 'GFLOP', 'peak, GFLOP/s', 'share of peak', 'memory', 'aim'
)  # fmt: skip
# In seconds 0.30, 1.5 and 3.0 at a peak of 195 GFLOP/s, with the operations of this program.
AIMS = {
    'update size1m vectors': '50%, 1.0 GB',
    'update size1m images 64x64x3': '33%, 1.6 GB',
    'update size12m vectors': '75%',
    'policy size1m vectors 1': '0.7 ms',
    'policy size1m vectors 16': '1.5 ms',
    'loop size1m vectors': '1.05 times',
}


def spread(values: Iterable[float], form: str, unit: str = '') -> str:
    """The median, and in brackets the least and the greatest."""
    values = list(values)
    least, most = (format(value, form) for value in (min(values), max(values)))
    return f'{statistics.median(values):{form}}{unit} ({least} - {most})'


def table(results: dict[str, Any]) -> str:
    """Markdown of all results."""
    lines = [
        f'{results["measured"]}, Python {results["python"]}, jax {results["jax"]}: '
        f'`python -m experiments.benchmarks.measure --runs={results["runs"]}`.',
        '',
        f'| {" | ".join(COLUMNS)} |',
        '|---' * len(COLUMNS) + '|',
    ]
    for case, result in results['cases'].items():
        seconds, peaks = result['seconds'], result['machine gflops']
        unit, scale = ('ms', 1e3) if statistics.median(seconds) < 0.1 else ('s', 1.0)
        row = dict.fromkeys(COLUMNS, '') | {
            'what': case,
            'median (least - greatest)': spread((scale * x for x in seconds), '.3g', f' {unit}'),
            'peak, GFLOP/s': spread(peaks, '.0f'),
            'aim': AIMS.get(case.removesuffix(', later'), ''),
        }
        if 'gflop' in result:
            row['GFLOP'] = f'{result["gflop"]:.1f}'
            pairs = zip(seconds, peaks, strict=True)
            row['share of peak'] = spread((result['gflop'] / (a * b) for a, b in pairs), '.0%')
        if 'steps' in result:
            row['what'] += f', {result["steps"] / statistics.median(seconds):.0f} steps/s'
            pairs = zip(seconds, result['update alone seconds'], strict=True)
            row['what'] += f', {spread((a / b for a, b in pairs), ".2f")} times its update alone'
        if 'peak gigabytes' in result:
            row['memory'] = f'{result["peak gigabytes"]:.2f} GB'
        lines.append('| ' + ' | '.join(row.values()) + ' |')
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
