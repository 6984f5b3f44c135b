"""Environments that come vectorised by their authors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from dreamerv3_jax.envs.registry import (
    Settings,
    make_vector,
    readable_errors,
    suite_of,
    takes_render_mode,
)
from dreamerv3_jax.envs.stream import (
    FinalRecords,
    Records,
    check_reward,
    episode_logs,
    frame_rate,
)
from dreamerv3_jax.envs.vector import VectorEnvironment, close_quietly, failure
from dreamerv3_jax.errors import Failure, UserError
from dreamerv3_jax.spaces import ActionAdapter, BadRecord, ObservationAdapter


class Native(VectorEnvironment):
    """The vectorisation of a suite, or an environment's own, gymnasium's `vector_entry_point`.

    When it resets is its own choice, which it declares in `metadata['autoreset_mode']`. Suites give
    every stream its seed; others seed all of them from one.
    """

    def __init__(self, settings: Settings) -> None:
        """Builds the vector environment.

        Raises:
          UserError: there is none, or it does not reset its streams.
        """
        super().__init__(settings.id)
        suite = suite_of(settings.id)
        of_suite = suite is not None and suite.vector
        if not of_suite and (suite or settings.repeat != 1):
            raise UserError(
                "env.vectorization='native' takes gymnasium ids and env.repeat=1 (frame skips go "
                "into env.kwargs); use 'sync' or 'async' otherwise."
            )
        self.num_envs = len(settings.seeds)
        self._env = make_vector(settings) if of_suite else _make_registered(settings)
        try:
            with readable_errors(settings.id):
                self._adapt(settings, of_suite)
        except UserError:
            self.close()
            raise

    def _adapt(self, settings: Settings, of_suite: bool) -> None:
        mode = self._env.metadata.get('autoreset_mode')
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise UserError(f"{settings.id} does not reset itself; use env.vectorization='async'.")
        self._same_step = mode == AutoresetMode.SAME_STEP
        side = settings.image_size
        size = (side, side) if side else None
        self._observations = ObservationAdapter(self._env.single_observation_space, size)
        self._actions = ActionAdapter(self._env.single_action_space)
        self._seed = None if of_suite else settings.seeds[0]  # of the next reset
        self._ended = np.zeros(self.num_envs, bool)
        self.observation_specs = self._observations.specs
        self.action_specs = self._actions.specs
        self.messages = self._observations.messages + self._actions.messages
        self.frame_rate = frame_rate(self._env.metadata)

    def _reset(self) -> Records:
        with self._readable_failures():
            observation, _ = self._env.reset(seed=self._seed)
        self._seed = None
        self._ended = np.zeros(self.num_envs, bool)
        return self._records(observation, first=np.ones(self.num_envs, bool))

    def _step(self, actions: dict[str, np.ndarray]) -> tuple[Records, FinalRecords | None]:
        with self._readable_failures():
            observation, reward, *flags, info = self._env.step(self._actions.convert(actions))
            reward = self._per_environment('rewards', reward, np.float32)
            terminated, truncated = (self._per_environment('flags', x, bool) for x in flags)
        ended = terminated | truncated
        if self._same_step:
            records = self._records(observation, np.where(ended, 0.0, reward), first=ended)
            return records, self._finals(info, reward, terminated, ended)
        first = self._ended  # the action of this tick was ignored, and so are the flags
        self._ended = ended & ~first
        reward = np.where(first, 0.0, reward)  # some repeat the last one there
        with self._readable_failures():
            for row in np.flatnonzero(self._ended).tolist():
                self.logs.add(episode_logs(_row_of_info(info, row)))
        return (
            self._records(
                observation, reward, first=first, last=self._ended, terminal=terminated & ~first
            ),
            None,
        )

    def _per_environment(self, what: str, values: Any, dtype: type) -> np.ndarray:
        values = np.asarray(values, dtype)
        if values.shape != (self.num_envs,):
            raise BadRecord(f'{what} of shape {values.shape}, not {(self.num_envs,)}.')
        return values

    def _finals(
        self, info: dict[str, Any], reward: np.ndarray, terminated: np.ndarray, ended: np.ndarray
    ) -> FinalRecords | None:
        streams = np.flatnonzero(ended)
        if not streams.size:
            return None
        with self._readable_failures():
            flat = [
                self._observations.convert(_row(info['final_obs'], index))
                for index in streams.tolist()
            ]
            check_reward(reward[streams])
            final = info.get('final_info')
            if isinstance(final, dict):  # of arrays, as gymnasium makes it
                for row in streams.tolist():
                    self.logs.add(episode_logs(_row_of_info(final, row)))
        observation = {name: np.stack([item[name] for item in flat]) for name in flat[0]}
        last = np.ones(len(streams), bool)
        records = Records(observation, reward[streams], ~last, last, terminated[streams])
        return FinalRecords(streams, records)

    def _records(
        self,
        observation: Any,
        reward: np.ndarray | None = None,
        *,
        first: np.ndarray,
        last: np.ndarray | None = None,
        terminal: np.ndarray | None = None,
    ) -> Records:
        none = np.zeros(self.num_envs, bool)
        if reward is None:
            reward = none.astype(np.float32)
        with self._readable_failures():
            flat = self._observations.convert(observation, (self.num_envs,))
            check_reward(reward)
        return Records(
            flat,
            reward.astype(np.float32),
            first,
            none if last is None else last,
            none.copy() if terminal is None else terminal,
        )

    def render(self) -> np.ndarray | None:
        """Returns a picture of the first environment, or None if it has none."""
        if self._env.render_mode != 'rgb_array':
            return None
        with self._readable_failures():
            frames = self._env.render()
        return None if frames is None else np.asarray(frames[0])

    @contextlib.contextmanager
    def _readable_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise Failure(str(failure(self._id, None, error))) from error

    def close(self) -> None:
        """Releases the environments."""
        close_quietly(self._env)


def _make_registered(settings: Settings) -> VectorEnv:
    kwargs = dict(settings.kwargs)
    with readable_errors(settings.id):
        if settings.render and takes_render_mode(settings.id):
            kwargs.setdefault('render_mode', 'rgb_array')
        return gymnasium.make_vec(
            settings.id,
            len(settings.seeds),
            vectorization_mode='vector_entry_point',
            **kwargs,
        )


def _row_of_info(info: dict[str, Any], row: int) -> dict[str, Any]:
    """Returns what one environment logs: gymnasium marks under '_<key>' which ones have the key.

    Raises:
      BadRecord: a log is not of each environment.
    """

    def own(key: str, values: Any) -> Any:
        try:
            return values[row]
        except (TypeError, LookupError) as error:
            raise BadRecord(f'a log {key!r} that is not of each environment.') from error

    return {
        key: own(key, values)
        for key, values in info.items()
        if isinstance(key, str)
        and key.startswith('log/')
        and (f'_{key}' not in info or info[f'_{key}'][row])
    }


def _row(batch: Any, index: int) -> Any:
    """Returns one environment's part of a batched observation, or of an array of observations."""
    if isinstance(batch, dict):
        return {key: _row(value, index) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_row(value, index) for value in batch)
    return batch[index]
