"""Craftax: Crafter and a larger game with floors, written in JAX.

`craftax/classic` is Crafter's game, `craftax/full` the larger one. Observes numbers that describe
what is in view, or with `pixels=True` a picture. At the end of an episode the log gets under
'achievement_<name>' whether each achievement was unlocked, and under 'achievements' how many were.

All environments are stepped by one compiled function, on the CPU and in this process. Compilation
takes up to a minute. At its first use of pictures the package draws its textures, which takes
minutes, and keeps them in its own folder.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from craftax.craftax_env import make_craftax_env_from_params
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dreamerv3_jax.errors import UserError
from dreamerv3_jax.images import resize

_NEVER = 2**31 - 1


def make_vector(
    name: str,
    *,
    seeds: Sequence[int],
    image_size: int = 0,
    render_mode: str | None = None,
    pixels: bool = False,
    length: int = 0,
) -> VectorEnv:
    """Returns environments that step together.

    Args:
      name: 'classic' or 'full'.
      seeds: one per environment.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      pixels: observe a picture instead of numbers.
      length: steps after which an episode is cut; 0 for the game's own 10,000 or 100,000.

    Raises:
      UserError: the name is another one.
    """
    if name not in ('classic', 'full'):
        raise UserError(f'Craftax comes as craftax/classic and craftax/full, not {name!r}.')
    return Craftax(
        classic=name == 'classic',
        seeds=seeds,
        image_size=(image_size or 64) if pixels else 0,
        length=length,
        render_mode=render_mode,
    )


class Craftax(VectorEnv):
    """Worlds that step together; `image_size` 0 observes numbers."""

    metadata = {
        'render_modes': ['rgb_array'],
        'render_fps': 10,
        'autoreset_mode': AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        *,
        classic: bool,
        seeds: Sequence[int],
        image_size: int,
        length: int,
        render_mode: str | None,
    ) -> None:
        self.num_envs = len(seeds)
        self.render_mode = render_mode
        self._image_size = image_size
        with _on_cpu():
            env = make_craftax_env_from_params(classic, not image_size, auto_reset=False)
            params = env.default_params
            if length:
                params = params.replace(max_timesteps=length)
            shape = env.observation_space(params).shape
            self._achievements = [name.lower() for name in _module(env).Achievement.__members__]
            self._draw = _picture(env) if render_mode else None
            self._step_all = jax.jit(functools.partial(_step, env, params))
            self._restart = jax.jit(functools.partial(_restart, env, params))
            keys = jax.vmap(jax.random.key)(np.array(seeds))
            blank = jax.eval_shape(env.reset_env, keys[0], params)[1]
            self._worlds = (
                keys,
                jax.tree.map(lambda x: jnp.zeros((self.num_envs, *x.shape), x.dtype), blank),
            )
        self._observation = np.empty((self.num_envs, *shape), np.float32)
        self._ended = np.zeros(self.num_envs, bool)
        space: gymnasium.spaces.Box[Any] = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        if image_size:
            space = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.single_observation_space = space
        self.single_action_space = gymnasium.spaces.Discrete(env.num_actions)
        self.observation_space = batch_space(space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Creates new worlds; the seeds were given when the environments were made."""
        self._create(range(self.num_envs))
        return self._observed(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes one step, or creates a new world where the episode ended on the step before."""
        over = np.flatnonzero(self._ended)
        with _on_cpu():
            self._worlds, *results = self._step_all(self._worlds, np.asarray(actions, np.int32))
        # Copies, for what JAX returns cannot be written to.
        self._observation, reward, terminated, truncated, unlocked = map(np.array, results)
        self._create(over.tolist())
        reward[over], terminated[over], truncated[over] = 0.0, False, False
        self._ended = terminated | truncated
        logs = {
            f'log/achievement_{name}': unlocked[:, index].astype(float)
            for index, name in enumerate(self._achievements)
        }
        logs['log/achievements'] = unlocked.sum(-1).astype(float)
        return self._observed(), reward, terminated, truncated, logs

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Returns a picture of the first world, larger than the one that is observed."""
        if self._draw is None:
            return None
        with _on_cpu():
            return (np.asarray(self._draw(self._worlds[1])),)

    def _create(self, rows: Sequence[int]) -> None:
        for row in rows:
            with _on_cpu():
                self._worlds, observation = self._restart(self._worlds, row)
            self._observation[row] = observation

    def _observed(self) -> np.ndarray:
        if not self._image_size:
            return self._observation
        pixels = np.rint(self._observation * 255).astype(np.uint8)
        return resize(pixels, self._image_size, self._image_size)


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    # The package reports on its textures, and broadcasts between ranks whatever the agent does.
    with (
        jax.default_device(jax.local_devices(backend='cpu')[0]),
        jax.numpy_rank_promotion('allow'),
        contextlib.redirect_stdout(sys.stderr),
    ):
        yield


def _step(env: Any, params: Any, worlds: Any, actions: jax.Array) -> tuple[Any, ...]:
    def step(key: Any, state: Any, action: Any) -> tuple[Any, ...]:
        key, used = jax.random.split(key)
        observation, new, reward, done, _ = env.step_env(used, state, action, params)
        # The package counts the time limit as an end of the world.
        dead = env.is_terminal(new, params.replace(max_timesteps=_NEVER))
        # The same types as before, or every function would be compiled twice.
        new = jax.tree.map(lambda old, x: jnp.asarray(x).astype(old.dtype), state, new)
        return (key, new), observation, reward, dead, done & ~dead, new.achievements

    keys, states = worlds
    return jax.vmap(step)(keys, states, actions)


def _restart(env: Any, params: Any, worlds: Any, row: jax.Array) -> tuple[Any, jax.Array]:
    key, used = jax.random.split(worlds[0][row])
    observation, state = env.reset_env(used, params)
    return jax.tree.map(lambda old, new: old.at[row].set(new), worlds, (key, state)), observation


def _module(env: Any) -> Any:
    """Returns the module of the game's constants."""
    name = type(env).__module__.split('.envs.')[0]
    return sys.modules[f'{name}.constants']


def _picture(env: Any) -> Any:
    """Returns the compiled function from worlds to a picture of the first one."""
    constants = _module(env)
    renderer = sys.modules[constants.__name__.replace('.constants', '.renderer')]
    draw = renderer.make_craftax_pixel_renderer(constants.BLOCK_PIXEL_SIZE_IMG)
    return jax.jit(
        lambda states: (
            jnp.rint(draw(jax.tree.map(lambda x: x[0], states))).clip(0, 255).astype(jnp.uint8)
        )
    )
