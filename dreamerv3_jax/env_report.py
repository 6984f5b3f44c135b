"""What `dreamerv3-jax envs` tells: the suites, and what one environment is like."""

import itertools
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_collections
import numpy as np

from dreamerv3_jax import envs, video_file
from dreamerv3_jax.envs.registry import SUITES
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.spaces import ArraySpec

MEASURED_SECONDS = 2.0
FILM_SECONDS = 10.0  # of the environment's own time
MOST_PICTURES = 300


def suites() -> list[str]:
    """Returns a line per suite: its title, an example, and how to install it if it is missing."""
    rows = {
        f'{prefix}/{suite.examples[0]}': suite
        for prefix, suite in sorted(SUITES.items(), key=lambda item: item[1].title.lower())
    }
    title_width = max(len(suite.title) for suite in rows.values())
    width = max(map(len, rows))
    return [
        f'{suite.title:{title_width}}  {example:{width}}  '
        + ('installed' if suite.installed else f'not installed: {suite.install}')
        for example, suite in rows.items()
    ]


def report(
    config: ml_collections.ConfigDict,
    preset: str,
    video: Path | None,
    show: Callable[[str], None],
) -> None:
    """Looks at one environment under a random policy.

    Args:
      config: all settings, of which `env` counts.
      preset: where they come from, '' for none.
      video: a file for the video; None for one named after the environment, which may be missing.
      show: called with each line, as soon as it is known.

    Raises:
      UserError: the environment cannot be made, it fails, or `video` cannot be written.
    """
    with envs.make(config.env, config.seed, restart=False) as env:
        source = f', as with --config={preset}' if preset else ''
        show(f'{"environment":12} {config.env.id}, repeat {config.env.repeat}{source}')
        for name, specs in (('observation', env.observation_specs), ('action', env.action_specs)):
            text = ', '.join(f'{part}: {spec}' for part, spec in specs.items())
            show(f'{name:12} {text}')
        for message in env.messages:
            show(message)
        count = f'{env.num_envs} environment' + ('s' if env.num_envs > 1 else '')
        rate = f'{_steps_per_second(env):,.0f} steps per second'
        show(f'{"speed":12} {rate} ({count}, resets included)')
    path = video or Path(re.sub(r'[^\w.-]+', '_', config.env.id) + '.mp4')
    try:
        _record(config, path)
    except UserError as error:
        if video:
            raise
        show(f'{"no video":12} {error}')
    else:
        show(f'{"video":12} {path}')


def _steps_per_second(env: envs.VectorEnvironment) -> float:
    actions = _random_actions(env)
    env.reset()
    env.step(next(actions))  # the first one may compile
    steps, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < MEASURED_SECONDS:
        env.step(next(actions))
        steps, elapsed = steps + env.num_envs, time.perf_counter() - start
    return steps / elapsed


def _record(config: ml_collections.ConfigDict, path: Path) -> None:
    with (
        video_file.Film(path) as film,
        envs.make(config.env, config.seed, render=True, restart=False) as env,
    ):
        film.frame_rate = env.frame_rate
        actions, records = _random_actions(env), env.reset()
        for _ in range(min(MOST_PICTURES, int(FILM_SECONDS * env.frame_rate) + 1)):
            film.add(video_file.picture(env, records))
            records, _ = env.step(next(actions))


def _random_actions(env: envs.VectorEnvironment) -> itertools.cycle:
    """Returns actions without end; they are drawn beforehand, as that takes time too."""
    rng = np.random.default_rng(0)
    return itertools.cycle([_random(env.action_specs, env.num_envs, rng) for _ in range(1000)])


def _random(
    specs: Mapping[str, ArraySpec], count: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draws `count` actions uniformly."""
    actions = {}
    for name, spec in specs.items():
        shape = (count, *spec.shape)
        if spec.kind == 'discrete':
            actions[name] = rng.integers(spec.classes, size=shape, dtype=np.int32)
        else:
            actions[name] = rng.uniform(-1, 1, shape).astype(np.float32)
    return actions
