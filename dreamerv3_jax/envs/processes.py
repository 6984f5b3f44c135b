"""Environments in one process each, which exchange arrays through shared memory."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Iterator, Sequence
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple

import numpy as np

from dreamerv3_jax.envs.registry import Settings
from dreamerv3_jax.envs.stream import Records, Stream, empty_actions, empty_records
from dreamerv3_jax.envs.vector import (
    Restartable,
    close_quietly,
    different_spaces,
    failure,
    open_stream,
)
from dreamerv3_jax.errors import Failure, UserError
from dreamerv3_jax.spaces import ArraySpec

_SHUTDOWN_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
MOST_PATIENCE = 1e6  # seconds, more than which the system does not wait

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
        """Starts the workers and waits until all environments are built.

        Raises:
          UserError: one cannot be built, or the system starts no more processes.
        """
        super().__init__(settings)
        if os.name == 'nt':  # where memory is shared in another way
            raise UserError(
                'Environments in processes of their own need Linux or macOS; set '
                '--config.env.vectorization=sync.'
            )
        self._connections: list[Connection] = []
        self._workers: list[Any] = []
        self._block: Any = None  # the file behind records and actions
        try:
            for row in range(self.num_envs):
                connection, worker = _start(settings, row)
                self._connections.append(connection)
                self._workers.append(worker)
        except OSError as error:
            self.close()
            raise UserError(
                f'Of {self.num_envs} processes of environments {row} could be started '
                f'({error.strerror}); lower env.num_envs, raise the limit (ulimit -n, ulimit -u), '
                "or take env.vectorization='sync'."
            ) from error
        rows = range(self.num_envs)
        descriptions: list[_Description] = self._all_well(self._receive(rows))
        self._specs = descriptions[0][:2]
        self.observation_specs, self.action_specs = self._specs
        self.messages, self.frame_rate = descriptions[0][2:]
        if any(other[:2] != self._specs for other in descriptions):
            self.close()
            raise different_spaces(settings.id)
        try:
            self._block = _shared_file(_bytes(*self._specs, self.num_envs))
        except UserError:
            self.close()
            raise
        self._records, self._actions = _map_arrays(self._block, *self._specs, self.num_envs)
        for row in rows:
            self._share(row)
        self._all_well(self._receive(rows))

    def _send(self, command: str, rows: Sequence[int]) -> None:
        for row in rows:
            with contextlib.suppress(OSError):  # a dead worker shows when its answer is read
                self._connections[row].send(command)

    def _rebuild(self, row: int, settings: Settings) -> None:
        self._connections[row].close()
        _stop([self._workers[row]])
        self._connections[row], self._workers[row] = _start(settings, row)
        (description,) = self._all_well(self._receive([row]), close=False)
        if description[:2] != self._specs:
            raise different_spaces(settings.id)
        self._share(row)
        self._all_well(self._receive([row]), close=False)

    def _share(self, row: int) -> None:
        """Hands the arrays to a worker."""
        connection = self._connections[row]
        with contextlib.suppress(OSError):  # a dead worker shows when its answer is read
            connection.send('share')
            reduction.send_handle(connection, self._block.fileno(), self._workers[row].pid)

    def render(self) -> np.ndarray | None:
        """Returns a picture of the first environment, or None if it has none."""
        return self._all_well(self._run('render', [0]))[0]

    def close(self) -> None:
        """Ends all workers, by force if they do not react."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send('close')
        _stop(self._workers)
        for connection in self._connections:
            connection.close()
        self._connections, self._workers = [], []
        if self._block is not None:
            self._block.close()

    def _all_well(self, answers: dict[int, Any], *, close: bool = True) -> list[Any]:
        """Returns the answers where none is an error."""
        for answer in answers.values():
            if isinstance(answer, UserError):
                if close:
                    self.close()
                raise answer
        return list(answers.values())

    def _receive(self, rows: Sequence[int]) -> dict[int, Any]:
        deadline = time.monotonic() + self._settings.timeout
        return {row: self._answer(row, deadline) for row in rows}

    def _answer(self, row: int, deadline: float) -> Any:
        worker, which = self._workers[row], f'Environment {row} of {self._id}'
        try:
            left = min(max(0.0, deadline - time.monotonic()), MOST_PATIENCE)
            if self._connections[row].poll(left):
                return self._connections[row].recv()
        except (EOFError, OSError):
            worker.join(_SHUTDOWN_SECONDS)
            if worker.exitcode == -signal.SIGTERM:
                time.sleep(0.5)  # perhaps all are told to end, and who trains is interrupted here
            return Failure(
                f'{which} died: its process ended with exit code {worker.exitcode}; '
                "try env.vectorization='sync' to see why."
            )
        worker.kill()
        return Failure(
            f'{which} did not answer for {self._settings.timeout:g} seconds (env.timeout).'
        )


def _start(settings: Settings, row: int) -> tuple[Connection, Any]:
    """Starts a worker; its first answer describes the environment."""
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    with _worker_surroundings():
        tied = threading.current_thread() is threading.main_thread()
        worker = context.Process(
            target=_work, args=(theirs, settings, row, tied), name=f'env-{row}', daemon=True
        )
        worker.start()
    theirs.close()
    return ours, worker


def _stop(workers: Sequence[Any]) -> None:
    """Waits for workers to end, and kills those that still run after some seconds."""
    deadline = time.monotonic() + _SHUTDOWN_SECONDS
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()


def _work(connection: Connection, settings: Settings, index: int, tied: bool) -> None:
    """Runs one environment until told to close, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    _mask_interrupts('SIG_UNBLOCK')
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if tied:
        _ask_for_the_end()
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
            elif command == 'share':
                with os.fdopen(reduction.recv_handle(connection), 'r+b') as file:
                    records, actions = _map_arrays(file, *specs, len(settings.seeds))
                connection.send(None)
    except Exception as error:
        message = failure(settings.id, index, error)
        message.add_note(''.join(traceback.format_exception(error)))
        with contextlib.suppress(OSError):  # the parent may be gone
            connection.send(message)
    finally:
        if stream is not None:
            close_quietly(stream)


def _end_with_parent() -> None:
    """Ends this process with its parent, even while its environment hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(_SHUTDOWN_SECONDS)  # in which it ends properly, unless it hangs
    os._exit(1)


def _ask_for_the_end() -> None:
    """Lets Linux end this process after its parent: while an environment hangs with the
    interpreter's lock, no thread of Python can.

    Linux waits for the end of the thread that started this process, so it has to be the main one.
    """
    if sys.platform == 'linux':
        library = ctypes.CDLL(None)
        # A handler gets the number of the signal, which `alarm` takes for the seconds to be left.
        library.signal(signal.SIGUSR1, library.alarm)
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
        parent = multiprocessing.parent_process()
        if parent is None or parent.pid != os.getppid():  # it ended before that
            sys.exit(1)


def _mask_interrupts(how: str) -> None:
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(getattr(signal, how), [signal.SIGINT])


@contextlib.contextmanager
def _worker_surroundings() -> Iterator[None]:
    """Sets what spawned workers inherit.

    Ctrl-C is not for them, also while they start.
    They need nothing of the user's main script: running it again in each of them would import JAX,
    or even start the training anew where the script has no `__name__` guard.
    """
    main, sys.modules['__main__'] = sys.modules['__main__'], types.ModuleType('__main__')
    before = {name: os.environ.get(name) for name in _WORKER_VARIABLES}
    try:
        os.environ.update(_WORKER_VARIABLES)
        if os.name == 'posix':
            resource_tracker.ensure_running()  # it would take the mask away as it starts
        _mask_interrupts('SIG_BLOCK')
        yield
    finally:
        sys.modules['__main__'] = main
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _mask_interrupts('SIG_UNBLOCK')  # last, as it may raise one


def _shared_file(size: int) -> IO[bytes]:
    """Opens a file without a name, in memory where that is possible.

    Raises:
      UserError: there is no room.
    """
    memory = '/dev/shm'
    file = tempfile.TemporaryFile(dir=memory if os.access(memory, os.W_OK) else None)  # noqa: SIM115
    try:
        file.write(bytes(size))  # not a hole, which would be filled later or, without room, fatally
        file.flush()
    except OSError as error:
        file.close()
        raise UserError(
            f'The arrays that environments share take {size:,} bytes: {error.strerror}.'
        ) from error
    return file


def _empty(
    observation_specs: dict[str, ArraySpec], action_specs: dict[str, ArraySpec], count: int
) -> tuple[Records, dict[str, np.ndarray], list[np.ndarray]]:
    """Records and actions of `count` environments, and all arrays of both."""
    records, actions = empty_records(observation_specs, count), empty_actions(action_specs, count)
    return records, actions, [*records.observation.values(), *records[1:], *actions.values()]


def _starts(arrays: list[np.ndarray]) -> list[int]:
    """Where each array begins in the shared block, and where the block ends."""
    return np.cumsum([0, *(-(-array.nbytes // 64) * 64 for array in arrays)]).tolist()


def _bytes(
    observation_specs: dict[str, ArraySpec], action_specs: dict[str, ArraySpec], count: int
) -> int:
    return _starts(_empty(observation_specs, action_specs, count)[2])[-1]


def _map_arrays(
    file: IO[bytes],
    observation_specs: dict[str, ArraySpec],
    action_specs: dict[str, ArraySpec],
    count: int,
) -> tuple[Records, dict[str, np.ndarray]]:
    """Returns records and actions of `count` environments, as views of a shared file."""
    records, actions, arrays = _empty(observation_specs, action_specs, count)
    starts = _starts(arrays)
    block = np.memmap(file, np.uint8, 'r+', shape=(starts[-1],)).view(np.ndarray)
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
