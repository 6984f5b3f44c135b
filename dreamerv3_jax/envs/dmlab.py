"""DeepMind Lab: the 30 first-person levels of DMLab-30.

`dmlab/<level>`, for example `dmlab/rooms_watermaze`. Observes the 'image' and the level's
'instruction' as numbers (see `envs/text.py`; the published code leaves it out where the name of a
level does not begin with `language`), and acts with 15 combinations of looking, moving and
firing (Hessel et al., 2018). Two levels have a version for training and one for testing on other
objects, such as `dmlab/rooms_exploit_deferred_effects_train`.

Most levels last for a fixed time, and an episode that uses it up is cut; one that ends earlier
is terminated. DeepMind Lab gives no observation after the end, so that the last one comes twice.

The package must be built by the user, and only its documented interface is used here.
"""

import os
from typing import Any

import deepmind_lab
import gymnasium
import numpy as np

from dreamerv3_jax.envs import text
from dreamerv3_jax.errors import UserError, nearest

LEVELS = (
    'explore_goal_locations_large',
    'explore_goal_locations_small',
    'explore_object_locations_large',
    'explore_object_locations_small',
    'explore_object_rewards_few',
    'explore_object_rewards_many',
    'explore_obstructed_goals_large',
    'explore_obstructed_goals_small',
    'language_answer_quantitative_question',
    'language_execute_random_task',
    'language_select_described_object',
    'language_select_located_object',
    'lasertag_one_opponent_large',
    'lasertag_one_opponent_small',
    'lasertag_three_opponents_large',
    'lasertag_three_opponents_small',
    'natlab_fixed_large_map',
    'natlab_varying_map_randomized',
    'natlab_varying_map_regrowth',
    'psychlab_arbitrary_visuomotor_mapping',
    'psychlab_continuous_recognition',
    'psychlab_sequential_comparison',
    'psychlab_visual_search',
    'rooms_collect_good_objects_train',
    'rooms_exploit_deferred_effects_train',
    'rooms_keys_doors_puzzle',
    'rooms_select_nonmatching_object',
    'rooms_watermaze',
    'skymaze_irreversible_path_hard',
    'skymaze_irreversible_path_varied',
)
TEST_LEVELS = ('rooms_collect_good_objects_test', 'rooms_exploit_deferred_effects_test')
_TEST_SEED = str(0x600D5EED)  # other layouts than in training, as published agents are tested on

# What an action sets; all else is 0. Looking is in pixels of a mouse per frame.
_RIGHT, _DOWN = 'LOOK_LEFT_RIGHT_PIXELS_PER_FRAME', 'LOOK_DOWN_UP_PIXELS_PER_FRAME'
_STRAFE, _MOVE, _FIRE = 'STRAFE_LEFT_RIGHT', 'MOVE_BACK_FORWARD', 'FIRE'
ACTIONS = (
    {_MOVE: 1},
    {_MOVE: -1},
    {_STRAFE: -1},
    {_STRAFE: 1},
    {_RIGHT: -10},
    {_RIGHT: 10},
    {_RIGHT: -60},
    {_RIGHT: 60},
    {_DOWN: 10},
    {_DOWN: -10},
    {_RIGHT: -10, _MOVE: 1},
    {_RIGHT: 10, _MOVE: 1},
    {_RIGHT: -60, _MOVE: 1},
    {_RIGHT: 60, _MOVE: 1},
    {_FIRE: 1},
)
FRAMES_PER_SECOND = 60
_IMAGE, _INSTRUCTION, _REMAINING = 'RGB_INTERLEAVED', 'INSTR', 'FRAMES_REMAINING_AT_60'


def make(
    name: str,
    *,
    repeat: int,
    image_size: int = 0,
    render_mode: str | None = None,
    renderer: str = 'software',
    dataset: str = '',
) -> gymnasium.Env:
    """Returns the environment of a level.

    Args:
      name: the level, without the folder.
      repeat: frames for which an action is held.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      renderer: 'software' or 'hardware'.
      dataset: folder of the pictures that two of the psychlab levels show.

    Raises:
      UserError: there is no such level.
    """
    levels = LEVELS + TEST_LEVELS
    if name not in levels:
        raise UserError(f'There is no level {name!r} in DMLab-30' + nearest(name, levels))
    config = {'width': str(image_size or 64), 'height': str(image_size or 64)}
    if dataset:
        config['datasetPath'] = os.path.expanduser(dataset)
    if name in TEST_LEVELS:  # which else refuse to be played
        config |= {'allowHoldOutLevels': 'true', 'mixerSeed': _TEST_SEED}
    lab = deepmind_lab.Lab(
        f'contributed/dmlab30/{name}', [_IMAGE, _INSTRUCTION, _REMAINING], config, renderer
    )
    env = Level(lab, repeat=repeat, image_size=image_size or 64)
    env.render_mode = render_mode
    return env


class Level(gymnasium.Env):
    """A level behind gymnasium's interface."""

    metadata = {'render_modes': ['rgb_array']}

    def __init__(self, lab: Any, *, repeat: int, image_size: int) -> None:
        self._lab = lab
        self._repeat = repeat
        self.metadata = {**self.metadata, 'render_fps': FRAMES_PER_SECOND / repeat}
        names = [spec['name'] for spec in lab.action_spec()]
        self._actions = [
            np.array([action.get(name, 0) for name in names], np.intc) for action in ACTIONS
        ]
        self._observation: dict[str, np.ndarray] = {}
        self._remaining = 0.0  # frames until the time is up
        shape = (image_size, image_size, 3)
        self.observation_space = gymnasium.spaces.Dict(
            {'image': gymnasium.spaces.Box(0, 255, shape, np.uint8), 'instruction': text.space()}
        )
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode, with a random seed of its own."""
        super().reset(seed=seed)
        self._lab.reset(seed=int(self.np_random.integers(2**31)))
        self._observe()
        return self._observation, {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Holds the action for `repeat` frames or until the episode ends."""
        reward = self._lab.step(self._actions[action], num_steps=self._repeat)
        if self._lab.is_running():
            self._observe()
            return self._observation, float(reward), False, False, {}
        # Lab's clock can be a frame off.
        timeout = self._remaining <= self._repeat + 1
        return self._observation, float(reward), not timeout, timeout, {}

    def render(self) -> np.ndarray:
        """Returns the picture that is observed; Lab draws no other."""
        return self._observation['image']

    def close(self) -> None:
        """Ends the game."""
        self._lab.close()

    def _observe(self) -> None:
        found = self._lab.observations()
        self._remaining = float(found[_REMAINING][0])
        self._observation = {
            'image': found[_IMAGE],
            'instruction': text.embed(found[_INSTRUCTION]),
        }
