"""Environments in one process each, which exchange arrays through shared memory."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from dreamerv3_jax.envs.registry import Settings
from dreamerv3_jax.envs.stream import Ending, Records, Stream, empty_actions, empty_records
from dreamerv3_jax.envs.vector import Restartable, different_spaces, failure, open_stream
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.spaces import ArraySpec

_SHUTDOWN_SECONDS = 5.0

# Workers leave the accelerator, the other workers' cores and the trainer's kept programs alone.
_WORKER_VARIABLES = {
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'JAX_PLATFORMS': 'cpu',
    'MKL_NUM_THREADS': '1',
    'OMP_NUM_THREADS': '1',
    'OPENBLAS_NUM_THREADS': '1',
}


class _Description(NamedTuple):
    """What a worker tells about its environment once it is built."""

    observation_specs: dict[str, ArraySpec]
    action_specs: dict[str, ArraySpec]
    messages: list[str]
    frame_rate: float


class Processes(Restartable):
    """Environments that run at the same time: best for slow ones.

    Processes are spawned, because forking is not safe once JAX has started its threads.
    """

    def __init__(self, settings: Settings) -> None:
        """Starts the workers and waits until all environments are built."""
        super().__init__(settings)
        self._connections: list[Connection] = []
        self._workers: list[Any] = []
        for row in range(self.num_envs):
            connection, worker = _start(settings, row)
            self._connections.append(connection)
            self._workers.append(worker)
        rows = range(self.num_envs)
        descriptions: list[_Description] = self._all_well(self._receive(rows))
        self._specs = descriptions[0][:2]
        self.observation_specs, self.action_specs = self._specs
        self.messages, self.frame_rate = descriptions[0][2:]
        if any(other[:2] != self._specs for other in descriptions):
            self.close()
            raise different_spaces(settings.id)
        self._all_well(self._share())

    def _run(self, command: str, rows: Sequence[int]) -> dict[int, Ending | UserError | None]:
        for row in rows:
            with contextlib.suppress(OSError):  # a dead worker shows when its answer is read
                self._connections[row].send(command)
        return self._receive(rows)

    def _rebuild(self, row: int, settings: Settings) -> None:
        self._connections[row].close()
        _stop([self._workers[row]], patience=0.0)
        self._connections[row], self._workers[row] = _start(settings, row)
        answer = self._receive([row])[row]
        if isinstance(answer, UserError):
            raise answer
        if answer[:2] != self._specs:
            raise different_spaces(settings.id)
        before = _arrays(self._records, self._actions)
        self._share()  # other workers that have failed are replaced in their turn
        for old, new in zip(before, _arrays(self._records, self._actions), strict=True):
            new[:] = old

    def _share(self) -> dict[int, Any]:
        """Makes arrays that all workers see; returns their answers."""
        with _shared_file() as path:
            self._records, self._actions = _map_arrays(path, *self._specs, self.num_envs)
            return self._run(path, range(self.num_envs))

    def render(self) -> np.ndarray | None:
        """Returns a picture of the first environment, or None if it has none."""
        return self._all_well(self._run('render', [0]))[0]

    def close(self) -> None:
        """Ends all workers, by force if they do not react."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send('close')
        _stop(self._workers, patience=_SHUTDOWN_SECONDS)
        for connection in self._connections:
            connection.close()
        self._connections, self._workers = [], []

    def _all_well(self, answers: dict[int, Any]) -> list[Any]:
        """Returns the answers where none is an error."""
        for answer in answers.values():
            if isinstance(answer, UserError):
                self.close()
                raise answer
        return list(answers.values())

    def _receive(self, rows: Sequence[int]) -> dict[int, Any]:
        deadline = time.monotonic() + self._settings.timeout
        return {row: self._answer(row, deadline) for row in rows}

    def _answer(self, row: int, deadline: float) -> Any:
        worker, which = self._workers[row], f'Environment {row} of {self._id}'
        try:
            if self._connections[row].poll(max(0.0, deadline - time.monotonic())):
                return self._connections[row].recv()
        except (EOFError, OSError):
            worker.join(_SHUTDOWN_SECONDS)
            error = UserError(
                f'{which} died: its process ended with exit code {worker.exitcode}; '
                "try env.vectorization='sync' to see why."
            )
            if worker.exitcode == -signal.SIGTERM:  # somebody is ending the whole run
                self.close()
                raise error from None
            return error
        worker.kill()
        return UserError(
            f'{which} did not answer for {self._settings.timeout:g} seconds (env.timeout).'
        )


def _start(settings: Settings, row: int) -> tuple[Connection, Any]:
    """Starts a worker; its first answer describes the environment."""
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    with _worker_surroundings():
        worker = context.Process(
            target=_work, args=(theirs, settings, row), name=f'env-{row}', daemon=True
        )
        worker.start()
    theirs.close()
    return ours, worker


def _stop(workers: Sequence[Any], patience: float) -> None:
    """Waits for workers to end, and kills those that still run after some seconds."""
    deadline = time.monotonic() + patience
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()


def _work(connection: Connection, settings: Settings, index: int) -> None:
    """Runs one environment until told to close, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    stream: Stream | None = None
    try:
        stream = open_stream(settings, index)
        specs = stream.observation_specs, stream.action_specs
        connection.send(_Description(*specs, stream.messages, stream.frame_rate))
        records: Any = None
        actions: Any = None
        while (command := connection.recv()) != 'close':
            if command == 'step':
                connection.send(stream.step(actions, records, index))
            elif command == 'reset':
                stream.reset(records, index)
                connection.send(None)
            elif command == 'render':
                connection.send(stream.render())
            else:  # a file to share: the first command, and again when another worker is replaced
                records, actions = _map_arrays(command, *specs, len(settings.seeds))
                connection.send(None)
    except Exception as error:
        message = failure(settings.id, index, error)
        message.add_note(''.join(traceback.format_exception(error)))
        with contextlib.suppress(OSError):  # the parent may be gone
            connection.send(message)
    finally:
        if stream is not None:
            stream.close()


@contextlib.contextmanager
def _worker_surroundings() -> Iterator[None]:
    """Sets what spawned workers inherit.

    They need nothing of the user's main script: running it again in each of them would import JAX,
    or even start the training anew where the script has no `__name__` guard.
    """
    main, sys.modules['__main__'] = sys.modules['__main__'], types.ModuleType('__main__')
    before = {name: os.environ.get(name) for name in _WORKER_VARIABLES}
    os.environ.update(_WORKER_VARIABLES)
    try:
        yield
    finally:
        sys.modules['__main__'] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _shared_file() -> Iterator[str]:
    """Yields the path of an empty file; whoever mapped it keeps it when the name is gone."""
    memory = '/dev/shm'
    folder = memory if os.access(memory, os.W_OK) else None
    descriptor, path = tempfile.mkstemp(prefix='dreamerv3-', dir=folder)
    os.close(descriptor)
    try:
        yield path
    finally:
        os.unlink(path)


def _map_arrays(
    path: str,
    observation_specs: dict[str, ArraySpec],
    action_specs: dict[str, ArraySpec],
    count: int,
) -> tuple[Records, dict[str, np.ndarray]]:
    """Returns records and actions of `count` environments, as views of a shared file."""
    records = empty_records(observation_specs, count)
    actions = empty_actions(action_specs, count)
    arrays = _arrays(records, actions)
    starts = np.cumsum([0, *(-(-array.nbytes // 64) * 64 for array in arrays)])
    with open(path, 'r+b') as file:
        file.truncate(starts[-1])
    block = np.memmap(path, np.uint8, 'r+', shape=(starts[-1],)).view(np.ndarray)
    views = (
        block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    )
    return (
        Records(
            {name: next(views) for name in records.observation},
            *(next(views) for _ in records[1:]),
        ),
        {name: next(views) for name in actions},
    )


def _arrays(records: Records, actions: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [*records.observation.values(), *records[1:], *actions.values()]
