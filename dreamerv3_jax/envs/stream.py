"""One environment, seen as a stream of records."""

import contextlib
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from dreamerv3_jax.spaces import ActionAdapter, ArraySpec, BadRecord, ObservationAdapter, is_finite

_USUAL_FRAME_RATE = 30.0  # of environments that do not say
_NUMBERS = (bool, int, float, np.bool_, np.number)


class Records(NamedTuple):
    """One received observation of each of N streams, with what came along with it."""

    observation: dict[str, np.ndarray]  # [N, ...] by name, as the specs say
    reward: np.ndarray  # [N] float32; consequence of the action before; 0 where is_first
    is_first: np.ndarray  # [N] bool; the observation comes from a reset
    is_last: np.ndarray  # [N] bool; the episode ends here, for whatever reason
    is_terminal: np.ndarray  # [N] bool; the episode ends because there is no future


class FinalRecords(NamedTuple):
    """Terminal observations that come on the same tick as, and before, a reset observation."""

    streams: np.ndarray  # [M] int64, indices of the streams that ended
    records: Records  # M of them, all is_last


class Ending(NamedTuple):
    """What a stream reports besides its record when an episode ended."""

    logs: dict[str, float]  # numbers that the environment wants logged
    final: tuple[dict[str, np.ndarray], float, bool] | None  # observation, reward, is_terminal


def empty_records(specs: dict[str, ArraySpec], count: int) -> Records:
    """Returns uninitialised records of `count` streams."""
    return Records(
        {name: np.empty((count, *spec.shape), spec.dtype) for name, spec in specs.items()},
        np.empty(count, np.float32),
        np.empty(count, bool),
        np.empty(count, bool),
        np.empty(count, bool),
    )


def empty_actions(specs: dict[str, ArraySpec], count: int) -> dict[str, np.ndarray]:
    """Returns uninitialised actions for `count` streams."""
    return {name: np.empty((count, *spec.shape), spec.dtype) for name, spec in specs.items()}


def write_record(
    records: Records,
    row: int,
    observation: dict[str, np.ndarray],
    reward: float = 0.0,
    *,
    first: bool = False,
    last: bool = False,
    terminal: bool = False,
) -> None:
    """Fills one row of `records`."""
    for name, value in observation.items():
        records.observation[name][row] = value
    records.reward[row] = reward
    records.is_first[row] = first
    records.is_last[row] = last
    records.is_terminal[row] = terminal


class Stream:
    """An environment with its conversions and its automatic resets.

    With autoreset 'next_step', the step after the end of an episode ignores the action and returns
    the reset observation. With 'same_step', the step that ends an episode returns the reset
    observation, and the terminal one in its `Ending`.
    """

    def __init__(
        self, env: gymnasium.Env, *, image_size: tuple[int, int] | None, autoreset: str, seed: int
    ) -> None:
        self._env = env
        self._observations = ObservationAdapter(env.observation_space, image_size)
        self._actions = ActionAdapter(env.action_space)
        self._same_step = autoreset == 'same_step'
        self._seed: int | None = seed
        self._ended = False
        self.observation_specs = self._observations.specs
        self.action_specs = self._actions.specs
        self.messages = self._observations.messages + self._actions.messages
        self.frame_rate = frame_rate(env.metadata)

    def reset(self, records: Records, row: int) -> None:
        """Starts an episode and writes its first record into row `row`.

        Raises:
          BadRecord: the observation is no part of a world.
          Exception: whatever the environment raises.
        """
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None  # later episodes continue the environment's own random numbers
        self._ended = False
        flat = self._observations.convert(observation)
        write_record(records, row, flat, first=True)

    def step(self, actions: dict[str, np.ndarray], records: Records, row: int) -> Ending | None:
        """Takes the action in row `row` of `actions` and writes the record into that row.

        Returns:
          None, or on the step that ends an episode what is known only then.

        Raises:
          BadRecord: the observation or the reward is no part of a world.
          Exception: whatever the environment raises.
        """
        if self._ended:
            self.reset(records, row)
            return None
        action = self._actions.convert(actions, row)
        observation, reward, terminated, truncated, info = self._env.step(action)
        flat = self._observations.convert(observation)
        reward = one_number(reward)
        check_reward(reward)
        if not (terminated or truncated):
            write_record(records, row, flat, reward)
            return None
        logs = episode_logs(info)
        if self._same_step:
            # Or it would take the terminal record with it.
            with contextlib.suppress(Exception, SystemExit):
                self.reset(records, row)
                return Ending(logs, (flat, reward, bool(terminated)))
        self._ended = True  # the next step resets
        write_record(records, row, flat, reward, last=True, terminal=bool(terminated))
        return Ending(logs, None)

    def render(self) -> np.ndarray | None:
        """Returns the current picture, [H, W, 3] `uint8`, or None if the environment draws none."""
        if self._env.render_mode != 'rgb_array':
            return None
        drawn = self._env.render()
        return None if drawn is None else np.asarray(drawn)

    def close(self) -> None:
        """Releases the environment."""
        self._env.close()


def one_number(reward: Any) -> float:
    """Returns a reward as a number; many environments return an array of one.

    Raises:
      BadRecord: it is an array of several, or of none.
    """
    if np.size(reward) != 1:
        raise BadRecord(f'a reward of shape {np.shape(reward)}; return one number.')
    return float(np.asarray(reward).item())


def check_reward(reward: Any) -> None:
    """Refuses what would silently turn every parameter of the agent into NaN.

    Args:
      reward: one number, or an array of them.

    Raises:
      BadRecord: a number is not finite in float32.
    """
    if not is_finite(reward):
        raise BadRecord('a reward that is not finite; repair or clip it.')


class ActionRepeat(gymnasium.Wrapper):
    """Takes every action several times, up to the end of the episode, and sums the rewards."""

    def __init__(self, env: gymnasium.Env, repeat: int) -> None:
        super().__init__(env)
        self._repeat = repeat
        self.metadata = {**env.metadata, 'render_fps': frame_rate(env.metadata) / repeat}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Steps the environment `repeat` times or until the episode ends."""
        total = 0.0
        for _ in range(self._repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += one_number(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def frame_rate(metadata: dict[str, Any]) -> float:
    """Returns how many steps an environment takes in a second of its own time."""
    rate = metadata.get('render_fps')
    return float(rate) if rate else _USUAL_FRAME_RATE


def episode_logs(info: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers that an environment put under keys starting with 'log/', by the rest.

    'log/score' and 'log/length' keep their whole names, as the return and the length of episodes
    have these.
    """
    return {
        key if key in ('log/score', 'log/length') else key.removeprefix('log/'): float(value)
        for key, value in info.items()
        if isinstance(key, str) and key.startswith('log/') and isinstance(value, _NUMBERS)
    }
