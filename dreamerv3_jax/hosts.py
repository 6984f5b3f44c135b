"""Hosts that train one agent together. Where there is only one, nothing here does anything.

All hosts run the same program in step. What one of them knows alone (its clock, its signals, its
environments, its disk) the others have to be told before anybody acts on it, or they would wait for
each other in different places for ever.
"""

import contextlib
import ctypes
import glob
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from dreamerv3_jax import startup
from dreamerv3_jax.errors import Failure, UserError, one_line, readable_device_errors

_PATIENCE = 300.0  # seconds in which all hosts have to be there
_LAST_WORDS = 3.0  # seconds in which all other hosts can say why they end
_LOST = re.compile(
    'gloo|nccl|peer|socket|coordination|heartbeat|barrier|unavailable|deadline_exceeded|aborted',
    re.IGNORECASE,
)
_GONE = 'Another host is gone'
_AGAIN = '; give the same command on all hosts, or on others, to go on from the last checkpoint.'
_all_know: list[BaseException] = []  # errors with which all hosts end


def connect(settings: ml_collections.ConfigDict) -> None:
    """Joins the hosts of a run, before anything else is done with jax.

    Args:
      settings: `config.hosts`: 'coordinator' (address:port of the first host), 'count' and 'index';
        with a count of 0 they are found where SLURM, Kubernetes or a TPU pod say them.

    Raises:
      UserError: the other hosts are not there.
    """
    alone = not _started_together() if settings.count == 0 else settings.count == 1
    if alone or jax.distributed.is_initialized():
        return
    if settings.count and settings.index == 0:
        _check_port(settings.coordinator)
    local = re.match(r'localhost:|127\.|\[::1\]:', settings.coordinator)
    # jax aborts a process that it takes for cut off, even one whose Python is about to tell why.
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    # Its handler of SIGTERM would take the place of the default one until training begins.
    jax.config.update('jax_enable_preemption_service', False)
    watch = threading.Timer(_PATIENCE, _give_up)  # jax would end the process without a sentence
    watch.start()
    patience = int(_PATIENCE) + 60
    try:
        if settings.count:
            jax.distributed.initialize(
                settings.coordinator,
                settings.count,
                settings.index,
                cluster_detection_method='deactivate',
                initialization_timeout=patience,
                # By default the first host listens on all of its addresses.
                coordinator_bind_address=settings.coordinator if local else None,
            )
        else:
            jax.distributed.initialize(initialization_timeout=patience)
            if jax.process_count() == 1:  # with whom nobody need speak
                jax.distributed.shutdown()
    except Exception as error:
        with readable_device_errors(''):
            if 'Unable to initialize backend' in str(error):  # the hosts are there
                raise
        raise UserError(_not_found(_reason(error))) from error
    finally:
        watch.cancel()


def share_programs_or_keep_none() -> None:
    """Compiled programs are kept only where all hosts find those that the first one writes.

    It would not compile again, while the others do; and on GPUs they then wait for its part of what
    is measured, for a day.
    """
    if count() == 1:
        return
    folder = Path(os.environ['JAX_COMPILATION_CACHE_DIR']) if startup.own_cache else None

    def leave_mark() -> str:
        with contextlib.suppress(OSError):
            if folder:
                descriptor, path = tempfile.mkstemp(prefix='mark-', dir=folder)
                os.close(descriptor)
                return Path(path).name
        return ''

    mark = first(leave_mark)
    if not all(gather(bool(folder and mark and (folder / mark).exists()))) and folder:
        jax.config.update('jax_enable_compilation_cache', False)
        compilation_cache.reset_cache()  # or what the first program found would hold for all
    if index() == 0 and folder and mark:
        (folder / mark).unlink(missing_ok=True)


def _check_port(coordinator: str) -> None:
    """Raises an error where jax would crash, as another program listens there."""
    port = f'{int(coordinator.rpartition(":")[2]):04X}'
    for path in glob.glob('/proc/net/tcp*'):  # Linux
        for line in Path(path).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == '0A' and local.endswith(f':{port}'):  # listens
                raise UserError(
                    f'Something listens at the port of {coordinator} already; choose another one '
                    'in config.hosts.coordinator, the same on all hosts.'
                )


def _give_up() -> None:
    reason = f'not all were there for {_PATIENCE:g} seconds'
    print(f'dreamerv3-jax: {_not_found(reason)}', file=sys.stderr, flush=True)
    os._exit(2)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Runs in the thread of jax that would end the process."""
    time.sleep(2 * _LAST_WORDS)  # in which `_leave` ends it, if the other host is missed in Python
    # Where `sys.stderr` was replaced to hide what orbax prints, this is to be read all the same.
    os.write(
        2,
        f'dreamerv3-jax: {_GONE}, or this process failed, for the reason above{_AGAIN}\n'.encode(),
    )
    os._exit(1)


def _not_found(reason: str) -> str:
    return (
        f'The other hosts cannot be found ({reason}); name them with '
        '--config.hosts.coordinator=ADDRESS:PORT, --config.hosts.count and '
        '--config.hosts.index, or train on this one alone with --config.hosts.count=1.'
    )


def _started_together() -> bool:
    """Whether what starts processes on many hosts says that this is one of several."""
    get = os.environ.get
    slurm = 'SLURM_STEP_NODELIST' in os.environ and get('SLURM_NTASKS', '1') != '1'
    kubernetes = 'KUBERNETES_SERVICE_HOST' in os.environ and 'JOB_COMPLETION_INDEX' in os.environ
    workers = get('TPU_PROCESS_ADDRESSES') or get('TPU_WORKER_HOSTNAMES') or ''
    pod = ',' in workers or get('MEGASCALE_NUM_SLICES', '1') != '1'
    # A machine of Google's cloud with a TPU asks its metadata server, unless it is told not to.
    asks = (
        not workers
        and 'TPU_SKIP_MDS_QUERY' not in os.environ
        and 'tpu' in get('JAX_PLATFORMS', 'tpu')
        and bool(glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*'))
        and importlib.util.find_spec('libtpu') is not None
    )
    return slurm or kubernetes or pod or asks


def count() -> int:
    """Returns the number of hosts."""
    return jax.process_count()


def index() -> int:
    """Returns the number of this host, from 0."""
    return jax.process_index()


def share(total: int, name: str) -> int:
    """Returns this host's part of a number that all of them share equally.

    Raises:
      UserError: it does not divide; `name` is the setting.
    """
    if total % count():
        raise agreed(
            UserError(
                f'config.{name}={total} does not divide among {count()} hosts; '
                f'choose a multiple of {count()}.'
            )
        )
    return total // count()


def gather_numbers(numbers: np.ndarray) -> np.ndarray:
    """Returns the numbers [n] int32 of all hosts, [hosts, n]."""
    return numbers[None] if count() == 1 else np.asarray(multihost_utils.process_allgather(numbers))


def gather(value: Any) -> list[Any]:
    """Returns a value of each host, of anything that JSON can hold."""
    if count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value, default=repr).encode(), np.uint8)
    lengths = gather_numbers(np.array([len(data)], np.int32))[:, 0]
    # Of few different lengths, as each compiles a program.
    padded = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = gather_numbers(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def first(function: Callable[[], Any]) -> Any:
    """Returns on all hosts what a function returns, or raises, on the first, which alone calls it.

    Raises:
      UserError: the first host did.
    """
    if count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if index() == 0:
        try:
            answer['result'] = function()
        except UserError as error:
            answer['error'], answer['code'] = str(error), error.exit_code
    answer = gather(answer)[0]
    if 'error' in answer:
        kind = Failure if answer['code'] == Failure.exit_code else UserError
        raise agreed(kind(answer['error']))
    return answer['result']


def agreed(error: BaseException) -> BaseException:
    """Marks an error that all hosts raise at this point, so that they end together."""
    _all_know.append(error)
    return error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends the hosts together, whatever happens in this context.

    Where the others cannot know of an error, this ends the process at once: in the usual way it
    would wait for them, and they for it.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if error not in _all_know:
            _leave(error)
        jax.distributed.shutdown()
        raise
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def lost(error: BaseException) -> bool:
    """Whether another host is gone, by an error of what was exchanged with it."""
    return (
        jax.distributed.is_initialized()
        and not isinstance(error, UserError | OSError)
        and bool(_LOST.search(str(error)))
    )


def _leave(error: BaseException) -> None:
    text, code = str(error), getattr(error, 'exit_code', 1)
    if isinstance(error, KeyboardInterrupt):
        text, code = '', 130
    elif isinstance(error, SystemExit):
        text, code = '', int(error.code or 0)
    elif not isinstance(error, UserError):
        text = ''
        if lost(error):
            text = f'{_GONE} ({_reason(error)}){_AGAIN}'
        else:
            traceback.print_exception(error)
    if text:
        print(f'dreamerv3-jax: {text}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(RuntimeError):  # of devices that cannot be used
        if index() == 0:  # with which the others would be ended
            time.sleep(_LAST_WORDS)
    os._exit(code)


def _reason(error: BaseException) -> str:
    return one_line(error)[:200].rstrip('.')
