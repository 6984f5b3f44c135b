"""Several environments stepped together."""

import abc
import contextlib
import dataclasses
import traceback
from collections.abc import Sequence
from typing import Any, Self

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from dreamerv3_jax.envs.registry import Settings, make_env, readable_errors
from dreamerv3_jax.envs.stream import (
    Ending,
    FinalRecords,
    Records,
    Stream,
    empty_actions,
    empty_records,
    write_record,
)
from dreamerv3_jax.errors import Failure, UserError, one_line
from dreamerv3_jax.metrics import Means
from dreamerv3_jax.spaces import ArraySpec, BadRecord

ENOUGH_STEPS = 1000  # without a failure, after which the next one is the first in a row


class VectorEnvironment(abc.ABC):
    """N environments that step in lockstep and reset themselves.

    Attributes:
      num_envs: N.
      observation_specs: the arrays of an observation by name, sorted.
      action_specs: the arrays of an action by name, sorted.
      messages: what the user should know, one sentence each; more come while it runs, and who has
        shown them takes them away.
      frame_rate: steps in a second of the environment's own time.
      logs: means, over the episodes that ended, of the numbers in their last `info` under keys
        that start with 'log/'; who takes them forgets them here.
    """

    num_envs: int
    observation_specs: dict[str, ArraySpec]
    action_specs: dict[str, ArraySpec]
    messages: list[str]
    frame_rate: float

    def __init__(self, env_id: str) -> None:
        self._id = env_id
        self._chosen: dict[str, np.ndarray] = {}  # actions of the step that was set out on
        self.logs = Means()
        self._restarts = 0

    def reset(self) -> Records:
        """Starts a new episode in every stream; all records are `is_first`.

        Raises:
          UserError: an environment failed time after time, or failed and cannot be built again.
        """
        return self._reset()

    def start(self, actions: dict[str, np.ndarray]) -> None:
        """Sets out to advance every stream by one record, see `finish`.

        Environments in processes of their own do so from now on, others when they are waited for.

        Args:
          actions: arrays [N, ...] as the action specs say, continuous ones in [-1, 1]. The rows of
            streams that are about to be reset are ignored.
        """
        self._chosen = actions

    def finish(self) -> tuple[Records, FinalRecords | None]:
        """Waits for what `start` set out on.

        Returns:
          The records, and under autoreset 'same_step' the terminal records of the streams that
          ended on this tick, which come before the normal ones. Where an environment failed and was
          built again, the record is the first of an episode, though the one before was no last.

        Raises:
          UserError: an environment failed time after time, or failed and cannot be built again.
        """
        return self._step(self._chosen)

    def step(self, actions: dict[str, np.ndarray]) -> tuple[Records, FinalRecords | None]:
        """Does both, `start` and `finish`."""
        self.start(actions)
        return self.finish()

    def pop_restarts(self) -> int:
        """Returns and forgets how many environments failed and were built again."""
        restarts, self._restarts = self._restarts, 0
        return restarts

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

    def _gather(self, endings: Sequence[Ending | None]) -> FinalRecords | None:
        """Collects the reports of the streams that ended."""
        for ending in endings:
            if ending is not None:
                self.logs.add(ending.logs)
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


class Restartable(VectorEnvironment):
    """Environments of which each is built again when it fails, while the others go on.

    The episode that was under way is cut: a record follows that is the first of the next one.
    """

    def __init__(self, settings: Settings) -> None:
        """Prepares; nothing is built."""
        super().__init__(settings.id)
        self.num_envs = len(settings.seeds)
        self._settings = settings
        self._records: Records  # written by the environments, read here
        self._actions: dict[str, np.ndarray]  # the other way round
        self._lives = np.ones(self.num_envs, np.int64)
        self._failures = np.zeros(self.num_envs, np.int64)  # in a row
        self._survived = np.zeros(self.num_envs, np.int64)  # steps since the last failure

    @abc.abstractmethod
    def _send(self, command: str, rows: Sequence[int]) -> None:
        """Tells environments to 'reset' or 'step'."""

    @abc.abstractmethod
    def _receive(self, rows: Sequence[int]) -> dict[int, Any]:
        """Returns what each of them says then: an `Ending`, nothing, or a `UserError`."""

    def _run(self, command: str, rows: Sequence[int]) -> dict[int, Any]:
        self._send(command, rows)
        return self._receive(rows)

    @abc.abstractmethod
    def _rebuild(self, row: int, settings: Settings) -> None:
        """Builds an environment again.

        Raises:
          Exception: that failed.
        """

    def _reset(self) -> Records:
        self._send('reset', range(self.num_envs))
        return self._advance()[0]

    def start(self, actions: dict[str, np.ndarray]) -> None:
        """Hands out the actions, see `VectorEnvironment.start`."""
        for name, values in self._actions.items():
            values[:] = actions[name]
        self._send('step', range(self.num_envs))

    def _step(self, actions: dict[str, np.ndarray]) -> tuple[Records, FinalRecords | None]:
        return self._advance()

    def _advance(self) -> tuple[Records, FinalRecords | None]:
        answers = self._receive(range(self.num_envs))
        self._survived += 1
        endings: list[Ending | None] = []
        for row, answer in answers.items():
            if isinstance(answer, UserError):
                self._replace(row, answer)
                answer = None  # its episode has no end
            endings.append(answer)
        observation, *flags = self._records
        copied = {name: values.copy() for name, values in observation.items()}
        return Records(copied, *(flag.copy() for flag in flags)), self._gather(endings)

    def _replace(self, row: int, error: UserError) -> None:
        """Builds an environment that failed again, and starts an episode in it."""
        answer: Any = error
        while isinstance(answer, UserError):
            self._count_failure(row, answer)
            try:
                self._rebuild(row, self._reseeded(row))
                answer = self._run('reset', [row])[row]
            except KeyboardInterrupt:
                raise
            except BaseException as again:  # as in `InProcess._receive`
                answer = failure(self._id, row, again)

    def _count_failure(self, row: int, error: UserError) -> None:
        if self._survived[row] > ENOUGH_STEPS:
            self._failures[row] = 0
        if self._failures[row] == self._settings.restarts:
            self.close()
            if not self._failures[row]:
                raise error
            times = f'It was started again {self._failures[row]} times before.'
            raise Failure(f'{str(error).rstrip(".")}. {times}') from error
        self._failures[row] += 1
        self._survived[row] = 0
        self._lives[row] += 1
        self._restarts += 1
        self.messages.append(f'{str(error).rstrip(".")}. It is started again.')

    def _reseeded(self, row: int) -> Settings:
        """Another seed for another life: the same episode would fail once more."""
        seeds = list(self._settings.seeds)
        sequence = np.random.SeedSequence([seeds[row], int(self._lives[row])])
        seeds[row] = int(sequence.generate_state(1)[0] >> 1)
        return dataclasses.replace(self._settings, seeds=tuple(seeds))


class InProcess(Restartable):
    """Environments stepped one after the other in this process: best for fast ones."""

    def __init__(self, settings: Settings, first: Stream | None = None) -> None:
        """Builds the environments, except `first` if it is given."""
        super().__init__(settings)
        self._command = ''
        self._streams = [first] if first else []
        try:
            while len(self._streams) < self.num_envs:
                self._streams.append(open_stream(settings, len(self._streams)))
        except UserError:
            self.close()
            raise
        self.observation_specs = self._streams[0].observation_specs
        self.action_specs = self._streams[0].action_specs
        self.messages = self._streams[0].messages
        self.frame_rate = self._streams[0].frame_rate
        if not all(self._fits(stream) for stream in self._streams):
            self.close()
            raise different_spaces(settings.id)
        self._records = empty_records(self.observation_specs, self.num_envs)
        self._actions = empty_actions(self.action_specs, self.num_envs)

    def _fits(self, stream: Stream) -> bool:
        own = self.observation_specs, self.action_specs
        return (stream.observation_specs, stream.action_specs) == own

    def _send(self, command: str, rows: Sequence[int]) -> None:
        self._command = command

    def _receive(self, rows: Sequence[int]) -> dict[int, Any]:
        answers: dict[int, Ending | UserError | None] = {}
        for row in rows:
            try:
                answers[row] = None
                if self._command == 'reset':
                    self._streams[row].reset(self._records, row)
                else:
                    answers[row] = self._streams[row].step(self._actions, self._records, row)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # some call exit(), and those in Rust panic
                answers[row] = problem = failure(self._id, row, error)
                problem.__cause__ = error
        return answers

    def _rebuild(self, row: int, settings: Settings) -> None:
        close_quietly(self._streams[row])
        stream = open_stream(settings, row)
        if not self._fits(stream):
            raise different_spaces(settings.id)
        self._streams[row] = stream

    def render(self) -> np.ndarray | None:
        """Returns a picture of the first environment, or None if it has none."""
        try:
            return self._streams[0].render()
        except Exception as error:
            raise failure(self._id, 0, error) from error

    def close(self) -> None:
        """Releases all environments."""
        for stream in self._streams:
            close_quietly(stream)
        self._streams = []


def open_stream(settings: Settings, index: int) -> Stream:
    """Builds the environment of stream `index`.

    Raises:
      UserError: it cannot be built, or its spaces are not supported.
    """
    side, env = settings.image_size, make_env(settings)
    try:
        with readable_errors(settings.id):
            return Stream(
                env,
                image_size=(side, side) if side else None,
                autoreset=settings.autoreset,
                seed=settings.seeds[index],
            )
    except UserError:
        close_quietly(env)
        raise


def different_spaces(env_id: str) -> UserError:
    """Returns the error for environments that cannot share arrays."""
    return UserError(
        f'{env_id} makes environments with different spaces; all must observe and act alike.'
    )


def failure(env_id: str, index: int | None, error: BaseException) -> UserError:
    """Returns one readable sentence about an exception in an environment, or in all of them."""
    if isinstance(error, UserError):
        return error
    which = env_id if index is None else f'Environment {index} of {env_id}'
    if isinstance(error, BadRecord):
        return Failure(f'{which} returned {error}')
    frames = traceback.extract_tb(error.__traceback__)
    place = f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''
    text = one_line(error)
    return Failure(f'{which} failed: {type(error).__name__}: {text}{place}.')


def close_quietly(env: Stream | gymnasium.Env | VectorEnv) -> None:
    """Closes an environment, which a broken one need not be able to."""
    with contextlib.suppress(Exception, SystemExit):
        env.close()
