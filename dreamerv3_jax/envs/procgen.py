"""ProcGen: sixteen games whose levels are generated.

`procgen/<game>`, for example `procgen/coinrun`. The games are those of EnvPool, which needs the
Qt 5 libraries of the system for them. By default the levels are unlimited and of the hard
distribution. The time limit of a game truncates.
"""

from collections.abc import Sequence

from gymnasium.vector import VectorEnv

from dreamerv3_jax.envs import envpool as pools
from dreamerv3_jax.errors import UserError, nearest

GAMES = (
    'bigfish',
    'bossfight',
    'caveflyer',
    'chaser',
    'climber',
    'coinrun',
    'dodgeball',
    'fruitbot',
    'heist',
    'jumper',
    'leaper',
    'maze',
    'miner',
    'ninja',
    'plunder',
    'starpilot',
)
_DISTRIBUTIONS = ('easy', 'hard', 'extreme', 'memory', 'exploration')


def make_vector(
    name: str,
    *,
    seeds: Sequence[int],
    render_mode: str | None = None,
    distribution: str = 'hard',
    num_levels: int = 0,
    start_level: int = 0,
) -> VectorEnv:
    """Returns environments that step together.

    Args:
      name: the game.
      seeds: one per environment; they choose the levels.
      render_mode: None or 'rgb_array'.
      distribution: difficulty of the levels, 'easy', 'hard' or what else the game has.
      num_levels: how many levels there are; 0 for no limit.
      start_level: the first of them.

    Raises:
      UserError: there is no such game or distribution, or a library is missing.
    """
    if name not in GAMES:
        raise UserError(f'There is no ProcGen game {name!r}' + nearest(name, GAMES))
    ids = {kind: f'{name.capitalize()}{kind.capitalize()}-v0' for kind in _DISTRIBUTIONS}
    known = pools.envpool.list_all_envs()
    offered = [kind for kind in _DISTRIBUTIONS if ids[kind] in known]
    if distribution not in offered:
        raise UserError(
            f'procgen/{name} has the distributions {", ".join(offered)}, not {distribution!r}.'
        )
    return pools.make_vector(
        ids[distribution],
        seeds=seeds,
        repeat=1,
        render_mode=render_mode,
        num_levels=num_levels,
        start_level=start_level,
        channel_first=False,
    )
