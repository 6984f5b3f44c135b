"""Atari games, played by the usual protocol.

`atari/<game>`, for example `atari/pong` or `atari/montezuma_revenge`. The defaults are those of the
200-million-frame benchmark: sticky actions and all 18 buttons (Machado et al., 2018), up to 30
no-ops at the start, the pixel-wise maximum of the last two frames against flicker, no information
about lives, and episodes cut (not terminated) after 108,000 frames. The 100k benchmark has
`sticky=False`, `full_actions=False` and `gray=False`. Scores are reported with `env.repeat=4`.

The vector environment in C++ of ale-py cannot follow this protocol: it shrinks pictures by another
filter than the published code (`images.resize` has that one), and where a game ends within a repeat
it shows older frames than the last two. It is there as `ale_py:ALE/Pong-v5` with
`env.vectorization=native`, and clips rewards unless `env.kwargs.reward_clipping=false`.
"""

from pathlib import Path
from typing import Any, cast

import ale_py
import gymnasium
import numpy as np
from ale_py import roms

from dreamerv3_jax.errors import UserError, nearest
from dreamerv3_jax.images import resize

MAX_FRAMES = 108_000  # half an hour at 60 Hz
STICKINESS = 0.25
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue


def make(
    name: str,
    *,
    repeat: int,
    image_size: int = 0,
    render_mode: str | None = None,
    sticky: bool | float = True,
    full_actions: bool = True,
    noops: int = 30,
    gray: bool = True,
) -> gymnasium.Env:
    """Returns the environment of a game.

    Args:
      name: the game in snake_case.
      repeat: frames for which an action is held.
      image_size: side of the square image; 0 for 96 in gray and 64 in colour.
      render_mode: None or 'rgb_array'.
      sticky: probability, at every frame, that the emulator holds the action of the frame before;
        True for 0.25, False for 0.
      full_actions: all 18 combinations of stick and button, or only those that the game uses.
      noops: most frames without action at the start of an episode.
      gray: one channel or three.

    Raises:
      UserError: there is no such game.
    """
    games = {game.replace('_', ''): game for game in roms.get_all_rom_ids()}
    game = games.get(name.replace('_', ''))
    if game is None:
        raise UserError(
            f'There is no Atari game {name!r}'
            + nearest(name, games.values(), 'names are in snake_case')
        )
    env = Atari(
        game,
        repeat=repeat,
        image_size=image_size or (96 if gray else 64),
        sticky=STICKINESS if sticky is True else float(sticky),
        full_actions=full_actions,
        noops=noops,
        gray=gray,
    )
    env.render_mode = render_mode
    return env


class Atari(gymnasium.Env):
    """One game on the Arcade Learning Environment; the arguments are described in `make`."""

    metadata = {'render_modes': ['rgb_array']}

    def __init__(
        self,
        game: str,
        *,
        repeat: int,
        image_size: int,
        sticky: float,
        full_actions: bool,
        noops: int,
        gray: bool,
    ) -> None:
        self._rom = cast(Path, roms.get_rom_path(game))
        self._repeat = repeat
        self.metadata = {**self.metadata, 'render_fps': 60 / repeat}
        self._image_size = image_size
        self._noops = noops
        self._gray = gray
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat('repeat_action_probability', sticky)
        self._ale.setInt('max_num_frames_per_episode', MAX_FRAMES)
        self._ale.loadROM(self._rom)
        self._actions = (
            self._ale.getLegalActionSet() if full_actions else self._ale.getMinimalActionSet()
        )
        self._screens: list[np.ndarray] = []  # the last one or two, for the maximum
        self.action_space = gymnasium.spaces.Discrete(len(self._actions))
        self.observation_space = gymnasium.spaces.Box(
            0, 255, (image_size, image_size, 1 if gray else 3), np.uint8
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts the game, after a random number of frames without action."""
        super().reset(seed=seed)
        if seed is not None:
            self._ale.setInt('random_seed', int(self.np_random.integers(2**31 - 1)))
            self._ale.loadROM(self._rom)  # takes up the seed
        self._ale.reset_game()
        for _ in range(self.np_random.integers(self._noops + 1)):
            self._ale.act(ale_py.Action.NOOP)
            if self._ale.game_over():
                self._ale.reset_game()
        # Nothing of the episode before, nor black, may shine through the first maximum.
        self._screens = [self._ale.getScreenRGB()]
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Holds the action for `repeat` frames or until the game is over."""
        reward = 0.0
        if self._repeat > 1:
            self._screens = []  # the two frames to pool are consecutive
        for frame in range(self._repeat):
            reward += self._ale.act(self._actions[action])
            over = self._ale.game_over()
            if over or frame >= self._repeat - 2:
                self._screens = [*self._screens[-1:], self._ale.getScreenRGB()]
            if over:
                break
        terminated = self._ale.game_over(with_truncation=False)
        return self._observation(), reward, terminated, over and not terminated, {}

    def render(self) -> np.ndarray:
        """Returns the full-sized screen in colour."""
        return self._ale.getScreenRGB()

    def _observation(self) -> np.ndarray:
        screen = np.maximum(self._screens[0], self._screens[-1])
        if self._gray:  # after the maximum, which is of each colour
            screen = (screen * _LUMINANCE).sum(-1, keepdims=True)
        return resize(screen, self._image_size, self._image_size)
