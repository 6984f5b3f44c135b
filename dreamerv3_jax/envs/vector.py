"""Several environments stepped together."""

import abc
import traceback
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from dreamerv3_jax.envs.registry import Settings, make_env
from dreamerv3_jax.envs.stream import (
    Ending,
    FinalRecords,
    Records,
    Stream,
    empty_records,
    write_record,
)
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.spaces import ArraySpec


class VectorEnvironment(abc.ABC):
    """N environments that step in lockstep and reset themselves.

    Attributes:
      num_envs: N.
      observation_specs: the arrays of an observation by name, sorted.
      action_specs: the arrays of an action by name, sorted.
      messages: what the user should know about conversions, one sentence each.
      frame_rate: steps in a second of the environment's own time.
    """

    num_envs: int
    observation_specs: dict[str, ArraySpec]
    action_specs: dict[str, ArraySpec]
    messages: list[str]
    frame_rate: float

    def __init__(self, env_id: str) -> None:
        self._id = env_id
        self._logs: dict[str, list[float]] = {}

    def reset(self) -> Records:
        """Starts a new episode in every stream; all records are `is_first`.

        Raises:
          UserError: an environment failed.
        """
        return self._checked(self._reset())

    def step(self, actions: dict[str, np.ndarray]) -> tuple[Records, FinalRecords | None]:
        """Advances every stream by one record.

        Args:
          actions: arrays [N, ...] as the action specs say, continuous ones in [-1, 1]. The rows of
            streams that are about to be reset are ignored.

        Returns:
          The records, and under autoreset 'same_step' the terminal records of the streams that
          ended on this tick, which come before the normal ones.

        Raises:
          UserError: an environment failed.
        """
        records, finals = self._step(actions)
        if finals is not None:
            self._checked(finals.records)
        return self._checked(records), finals

    def pop_logs(self) -> dict[str, float]:
        """Returns and forgets the means, over the episodes that ended, of what environments log.

        These are the numbers in the last `info` of an episode under keys that start with 'log/'.
        """
        logs, self._logs = self._logs, {}
        return {name: float(np.mean(values)) for name, values in sorted(logs.items())}

    @abc.abstractmethod
    def render(self) -> np.ndarray | None:
        """Returns a picture of the first environment, [H, W, 3] `uint8`, or None if it has none."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases all environments; may be called again."""

    @abc.abstractmethod
    def _reset(self) -> Records: ...

    @abc.abstractmethod
    def _step(self, actions: dict[str, np.ndarray]) -> tuple[Records, FinalRecords | None]: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, records: Records) -> Records:
        """Refuses what would silently turn every parameter of the agent into NaN."""
        arrays = {f'observation {name!r}': value for name, value in records.observation.items()}
        arrays['reward'] = records.reward
        for name, values in arrays.items():
            if values.dtype == np.float32 and not np.isfinite(values).all():
                raise UserError(
                    f'{self._id} returned a {name} that is not finite; repair or clip it.'
                )
        return records

    def _gather(self, endings: Sequence[Ending | None]) -> FinalRecords | None:
        """Collects the reports of the streams that ended."""
        for ending in endings:
            if ending is not None:
                self._add_logs(ending.logs)
        finals = [
            (stream, *ending.final)
            for stream, ending in enumerate(endings)
            if ending is not None and ending.final is not None
        ]
        if not finals:
            return None
        records = empty_records(self.observation_specs, len(finals))
        for row, (_, observation, reward, terminal) in enumerate(finals):
            write_record(records, row, observation, reward, last=True, terminal=terminal)
        return FinalRecords(np.array([final[0] for final in finals]), records)

    def _add_logs(self, logs: Mapping[str, float]) -> None:
        for name, value in logs.items():
            self._logs.setdefault(name, []).append(value)


class InProcess(VectorEnvironment):
    """Environments stepped one after the other in this process: best for fast ones."""

    def __init__(self, settings: Settings, first: Stream | None = None) -> None:
        """Builds the environments, except `first` if it is given."""
        super().__init__(settings.id)
        self.num_envs = len(settings.seeds)
        self._streams = [first] if first else []
        while len(self._streams) < self.num_envs:
            self._streams.append(open_stream(settings, len(self._streams)))
        self.observation_specs = self._streams[0].observation_specs
        self.action_specs = self._streams[0].action_specs
        self.messages = self._streams[0].messages
        self.frame_rate = self._streams[0].frame_rate
        specs = [(stream.observation_specs, stream.action_specs) for stream in self._streams]
        if any(other != specs[0] for other in specs):
            self.close()
            raise different_spaces(settings.id)

    def _reset(self) -> Records:
        records = empty_records(self.observation_specs, self.num_envs)
        for row, stream in enumerate(self._streams):
            try:
                stream.reset(records, row)
            except Exception as error:
                raise failure(self._id, row, error) from error
        return records

    def _step(self, actions: dict[str, np.ndarray]) -> tuple[Records, FinalRecords | None]:
        records = empty_records(self.observation_specs, self.num_envs)
        endings: list[Ending | None] = []
        for row, stream in enumerate(self._streams):
            try:
                endings.append(stream.step(actions, records, row))
            except Exception as error:
                raise failure(self._id, row, error) from error
        return records, self._gather(endings)

    def render(self) -> np.ndarray | None:
        """Returns a picture of the first environment, or None if it has none."""
        try:
            return self._streams[0].render()
        except Exception as error:
            raise failure(self._id, 0, error) from error

    def close(self) -> None:
        """Releases all environments."""
        for stream in self._streams:
            stream.close()
        self._streams = []


def open_stream(settings: Settings, index: int) -> Stream:
    """Builds the environment of stream `index`.

    Raises:
      UserError: it cannot be built, or its spaces are not supported.
    """
    side = settings.image_size
    return Stream(
        make_env(settings),
        image_size=(side, side) if side else None,
        autoreset=settings.autoreset,
        seed=settings.seeds[index],
    )


def different_spaces(env_id: str) -> UserError:
    """Returns the error for environments that cannot share arrays."""
    return UserError(
        f'{env_id} makes environments with different spaces; all must observe and act alike.'
    )


def failure(env_id: str, index: int | None, error: Exception) -> UserError:
    """Returns one readable sentence about an exception in an environment, or in all of them."""
    if isinstance(error, UserError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    place = f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''
    text = ' '.join(str(error).split())
    which = env_id if index is None else f'Environment {index} of {env_id}'
    return UserError(f'{which} failed: {type(error).__name__}: {text}{place}')
