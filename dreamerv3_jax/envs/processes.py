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
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from dreamerv3_jax.envs.registry import Settings
from dreamerv3_jax.envs.stream import FinalRecords, Records, Stream, empty_records
from dreamerv3_jax.envs.vector import VectorEnvironment, different_spaces, failure, open_stream
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


class Processes(VectorEnvironment):
    """Environments that run at the same time: best for slow ones.

    Processes are spawned, because forking is not safe once JAX has started its threads.
    """

    def __init__(self, settings: Settings) -> None:
        """Starts the workers and waits until all environments are built."""
        super().__init__(settings.id)
        self.num_envs = len(settings.seeds)
        self._connections: list[Connection] = []
        self._workers: list[Any] = []
        context = multiprocessing.get_context('spawn')
        with _worker_surroundings():
            for index in range(self.num_envs):
                ours, theirs = context.Pipe()
                worker = context.Process(
                    target=_work, args=(theirs, settings, index), name=f'env-{index}', daemon=True
                )
                worker.start()
                theirs.close()
                self._connections.append(ours)
                self._workers.append(worker)
        descriptions: list[_Description] = self._receive()
        observation_specs, action_specs, self.messages, self.frame_rate = descriptions[0]
        self.observation_specs, self.action_specs = observation_specs, action_specs
        if any(other[:2] != descriptions[0][:2] for other in descriptions):
            self.close()
            raise different_spaces(settings.id)
        with _shared_file() as path:
            self._records, self._actions = _map_arrays(
                path, observation_specs, action_specs, self.num_envs
            )
            self._call(path)

    def _reset(self) -> Records:
        self._call('reset')
        return _copy(self._records)

    def _step(self, actions: dict[str, np.ndarray]) -> tuple[Records, FinalRecords | None]:
        for name, values in self._actions.items():
            values[:] = actions[name]
        endings = self._call('step')
        return _copy(self._records), self._gather(endings)

    def render(self) -> np.ndarray | None:
        """Returns a picture of the first environment, or None if it has none."""
        return self._call('render', slice(1))[0]

    def close(self) -> None:
        """Ends all workers, by force if they do not react."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send('close')
        deadline = time.monotonic() + _SHUTDOWN_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()
        for connection in self._connections:
            connection.close()
        self._connections, self._workers = [], []

    def _call(self, command: str, which: slice = slice(None)) -> list[Any]:
        """Gives a command to workers and returns their answers, in order."""
        for connection in self._connections[which]:
            with contextlib.suppress(OSError):  # a dead worker shows when its answer is read
                connection.send(command)
        return self._receive(which)

    def _receive(self, which: slice = slice(None)) -> list[Any]:
        answers = []
        for index, connection in enumerate(self._connections[which]):
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                self._workers[index].join(_SHUTDOWN_SECONDS)
                answer = UserError(
                    f'The process of environment {index} of {self._id} died with exit code '
                    f"{self._workers[index].exitcode}; try env.vectorization='sync' to see why."
                )
            if isinstance(answer, UserError):
                self.close()
                raise answer
            answers.append(answer)
        return answers


def _work(connection: Connection, settings: Settings, index: int) -> None:
    """Runs one environment until told to close, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    stream: Stream | None = None
    try:
        stream = open_stream(settings, index)
        specs = stream.observation_specs, stream.action_specs
        connection.send(_Description(*specs, stream.messages, stream.frame_rate))
        path = connection.recv()
        if path == 'close':
            return
        records, actions = _map_arrays(path, *specs, len(settings.seeds))
        connection.send(None)
        while (command := connection.recv()) != 'close':
            if command == 'step':
                connection.send(stream.step(actions, records, index))
            elif command == 'reset':
                stream.reset(records, index)
                connection.send(None)
            elif command == 'render':
                connection.send(stream.render())
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
    actions = {
        name: np.empty((count, *spec.shape), spec.dtype) for name, spec in action_specs.items()
    }
    arrays = [*records.observation.values(), *records[1:], *actions.values()]
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


def _copy(records: Records) -> Records:
    observation, *flags = records
    return Records(
        {name: values.copy() for name, values in observation.items()},
        *(values.copy() for values in flags),
    )
