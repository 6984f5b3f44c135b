"""Learning curves of runs: keeps the part of their metrics that a curve needs, and draws it.

python -m experiments.curves keep RUN_FOLDER experiments/learning/NAME.jsonl [--cores=2]
python -m experiments.curves plot OUT.png 'TITLE' NAME.jsonl ... [--published=TASK] [--target=475]

`keep` leaves out of the time what a run was stopped for before it went on.

`--published` lays the curve over the scores in experiments/learning/published.json: median, least
and greatest of 5 seeds of the published runs for two DMC proprio tasks, one run of the published
code on a CPU with 2 cores for CartPole-v1 (size1m, train ratio 256, 42 minutes).
`--x=updates` draws over updates instead of environment frames, for runs of unequal train ratios.
"""

import argparse
import json
import os
import pathlib
import time

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np

from dreamerv3_jax.configs import base
from experiments.machine import processor

KEPT = ('step', 'time', 'episode/score', 'episode/length', 'count/updates', 'count/episodes')
PAUSE = 300.0  # seconds between two lines that are more than a slow update: the run had stopped
LEARNING = pathlib.Path(__file__).parent / 'learning'


def keep(run: pathlib.Path, output: pathlib.Path, cores: int) -> None:
    # A header line about the run, then the metrics of every line that has a score.
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    times = np.array([row['time'] for row in rows])
    passed = np.diff(times, prepend=times[0])
    seconds = np.cumsum(np.where(passed > PAUSE, 0.0, passed)).round(1).tolist()
    config = json.loads((run / 'config.json').read_text())
    header = {
        'date': time.strftime('%Y-%m-%d', time.gmtime(times[-1])),
        'machine': f'{processor()}, {cores} core{"s" * (cores > 1)}',
        'environment': config['env']['id'],
        'action_repeat': config['env']['repeat'],
        'size': base.size_of(config['agent']),
        'seed': config['seed'],
        'train_ratio': config['replay']['train_ratio'],
    }
    with output.open('w') as file:
        file.write(json.dumps(header) + '\n')
        for row, second in zip(rows, seconds, strict=True):
            if row.get('episode/score') is not None:
                kept = {name: row[name] for name in KEPT if name in row}
                file.write(json.dumps(kept | {'seconds': second}) + '\n')


def load(path: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and columns of a kept curve."""
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ('step', 'count/updates', 'seconds', 'episode/score')
    return header, {name: np.array([row[name] for row in rows], float) for name in names}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each point."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(0, np.arange(1, len(values) + 1) - window)
    last = np.arange(1, len(values) + 1)
    return (sums[last] - sums[first]) / (last - first)


def plot(
    output: pathlib.Path,
    title: str,
    curves: list[pathlib.Path],
    published: str,
    target: float | None,
    x: str,
) -> None:
    """Draws scores over environment frames or updates, with the minutes that each run took."""
    column, axis_label = {
        'frames': ('step', 'environment frames'),
        'updates': ('count/updates', 'updates'),
    }[x]
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout='constrained')
    for path in curves:
        header, columns = load(path)
        label = f'seed {header["seed"]} ({columns["seconds"][-1] / 60:.0f} min)'
        where, scores = columns[column], columns['episode/score']
        window = min(8, 1 + len(scores) // 8)
        (line,) = axes.plot(where, smooth(scores, window), label=label, lw=1.8)
        axes.plot(where, scores, color=line.get_color(), alpha=0.2, lw=0.8)
    if published:
        task = json.loads((LEARNING / 'published.json').read_text())[published]
        if x == 'updates' and any(x not in row for row in task.values()):
            raise SystemExit(f'The updates of {published} were not published; leave --x out.')
        where = np.array([row[x] if x in row else int(frame) for frame, row in task.items()])
        shown = where <= axes.get_xlim()[1] * 1.25
        median, least, most = (
            np.array([row[name] for row in task.values()])[shown]
            for name in ('median', 'min', 'max')
        )
        axes.plot(where[shown], median, 'k--', label='published')
        axes.fill_between(where[shown], least, most, color='k', alpha=0.1)
    if target is not None:
        axes.axhline(target, color='0.6', lw=0.8, ls=':')
    axes.set(title=title, xlabel=axis_label, ylabel='return of training episodes')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize='small')
    figure.savefig(output, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    keeping = commands.add_parser('keep')
    keeping.add_argument('run', type=pathlib.Path)
    keeping.add_argument('output', type=pathlib.Path)
    keeping.add_argument('--cores', type=int, default=os.cpu_count())
    plotting = commands.add_parser('plot')
    plotting.add_argument('output', type=pathlib.Path)
    plotting.add_argument('title')
    plotting.add_argument('curves', type=pathlib.Path, nargs='+')
    plotting.add_argument('--published', default='')
    plotting.add_argument('--target', type=float)
    plotting.add_argument('--x', choices=('frames', 'updates'), default='frames')
    options = vars(parser.parse_args())
    {'keep': keep, 'plot': plot}[options.pop('command')](**options)


if __name__ == '__main__':
    main()
