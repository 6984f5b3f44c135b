"""ViZDoom: scenarios in the game Doom, seen through the player's eyes.

`vizdoom/<scenario>`, for example `vizdoom/basic` or `vizdoom/deadly_corridor`. Observes the picture
and, where the scenario tells any, variables such as health and ammunition. An action is one button
or none, or with `combine=True` any set of buttons. Buttons that take a number (in `deathmatch`, for
the mouse) are left out, for there are others to the same effect.

The game smooths the sway of the weapon from one drawn picture to the next, so that it looks a
little different where `env.repeat` draws other ones.
"""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import vizdoom

from dreamerv3_jax.errors import UserError, nearest
from dreamerv3_jax.images import resize

# For one player, with all that they need in the package.
SCENARIOS = (
    'basic',
    'deadly_corridor',
    'deathmatch',
    'defend_the_center',
    'defend_the_line',
    'health_gathering',
    'health_gathering_supreme',
    'my_way_home',
    'predict_position',
    'rocket_basic',
    'simpler_basic',
    'take_cover',
)
# The kernel ends the game with the thread that started it: it would wait for an action for good.
_TIE = 'import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])'


def make(
    name: str,
    *,
    repeat: int,
    image_size: int = 0,
    render_mode: str | None = None,
    combine: bool = False,
) -> gymnasium.Env:
    """Returns the environment of a scenario.

    Args:
      name: the scenario in snake_case.
      repeat: frames for which an action is held.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      combine: let several buttons be pressed at once.

    Raises:
      UserError: there is no such scenario.
    """
    if name not in SCENARIOS:
        raise UserError(f'There is no ViZDoom scenario {name!r}' + nearest(name, SCENARIOS))
    env = Doom(name, repeat=repeat, image_size=image_size or 64, combine=combine)
    env.render_mode = render_mode
    return env


class Doom(gymnasium.Env):
    """One scenario in a game of its own; the arguments are described in `make`."""

    metadata = {'render_modes': ['rgb_array']}

    def __init__(self, scenario: str, *, repeat: int, image_size: int, combine: bool) -> None:
        self._repeat = repeat
        self.metadata = {**self.metadata, 'render_fps': vizdoom.DEFAULT_TICRATE / repeat}
        self._image_size = image_size
        self._game = vizdoom.DoomGame()
        self._game.load_config(str(Path(vizdoom.scenarios_path) / f'{scenario}.cfg'))
        self._game.set_window_visible(False)
        self._game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self._game.set_screen_resolution(
            vizdoom.ScreenResolution.RES_160X120
            if image_size <= 120
            else vizdoom.ScreenResolution.RES_320X240
        )
        buttons = [
            button
            for button in self._game.get_available_buttons()
            if not vizdoom.is_delta_button(button)
        ]
        self._game.set_available_buttons(buttons)
        single = np.vstack([np.zeros(len(buttons)), np.eye(len(buttons))])  # first none
        self._presses = None if combine else single
        self.action_space = (
            gymnasium.spaces.MultiBinary(len(buttons))
            if combine
            else gymnasium.spaces.Discrete(len(single))
        )
        image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        parts: dict[str, gymnasium.Space] = {'image': image}
        self._variables = self._game.get_available_game_variables_size()
        if self._variables:
            shape = (self._variables,)
            parts['variables'] = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.observation_space = gymnasium.spaces.Dict(parts)
        self._folder: tempfile.TemporaryDirectory | None = None
        self._state: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        self._game.set_seed(int(self.np_random.integers(2**31 - 1)))
        if self._folder is None:
            self._start()
        else:
            self._game.new_episode()
        self._state = self._game.get_state()
        return self._observation(), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Holds the action for `repeat` frames or until the episode is over."""
        pressed = action if self._presses is None else self._presses[int(action)]
        reward = self._game.make_action([float(button) for button in pressed], self._repeat)
        over = self._game.is_episode_finished()
        truncated = over and self._game.is_episode_timeout_reached()
        if not over:  # the game shows nothing after the end: the last view stays
            self._state = self._game.get_state()
        return self._observation(), reward, over and not truncated, truncated, {}

    def render(self) -> np.ndarray:
        """Returns the picture in the size that the game draws."""
        return self._state.screen_buffer

    def close(self) -> None:
        """Ends the game and removes its files."""
        self._game.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        """Starts the game in a folder of its own, for it leaves files wherever it is started."""
        self._folder = tempfile.TemporaryDirectory(prefix='vizdoom-')
        start = Path(self._folder.name) / 'start'
        tied = [sys.executable, '-ISc', _TIE] if sys.platform == 'linux' else []
        command = shlex.join([*tied, vizdoom.exe_path])
        start.write_text(f'#!/bin/sh\ncd {shlex.quote(self._folder.name)} && exec {command} "$@"\n')
        start.chmod(0o700)
        self._game.set_vizdoom_path(str(start))
        self._game.init()

    def _observation(self) -> dict[str, np.ndarray]:
        image = resize(self._state.screen_buffer, self._image_size, self._image_size)
        observation = {'image': image}
        if self._variables:
            observation['variables'] = np.asarray(self._state.game_variables, np.float32)
        return observation
