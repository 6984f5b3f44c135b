"""Checkpoints of a run: train state, replay and counters in one atomic step of an orbax manager."""

import contextlib
import dataclasses
import errno
import functools
import gc
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import jax
import numpy as np
import orbax.checkpoint as ocp

from dreamerv3_jax import durable, hosts
from dreamerv3_jax.errors import Failure, UserError, one_line
from dreamerv3_jax.train_state import TrainState

KEEP = 2
CHECKSUMS = 'checksums.json'  # of the files of a checkpoint, in its folder


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder; one that is still being written has another name."""
    return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint in a folder, or None."""
    return max(_steps(folder), default=None)


class NotSaved(Failure):
    """A checkpoint cannot be written; those before it are whole."""

    full = False  # whether the disk is


class Saved(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    replay: dict[str, Any] | None  # as from `Replay.state`; each host saves arrays of its own names
    counters: dict[str, Any]  # JSON


class _ArrayFiles(ocp.CheckpointHandler):
    """Arrays in a `.npy` file each, written and mapped piece by piece.

    A replay can fill most of the memory; a copy of it, as orbax's own handler makes, may not fit.
    """

    def save(self, directory: Any, args: '_ArrayArgs') -> None:
        """Writes the arrays, which may be views of any layout."""
        for name, array in args.arrays.items():
            try:
                _write_array(directory / f'{quote(name, safe="")}.npy', array)
            except OSError as error:
                if error.errno is None:  # numpy wrote less than it should and does not say why
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise

    def restore(self, directory: Any, args: '_ArrayArgs | None' = None) -> dict[str, np.ndarray]:
        """Maps the files; they are read where they are looked at."""
        return {
            unquote(path.stem): np.load(path, mmap_mode='r', allow_pickle=False)
            for path in directory.glob('*.npy')
        }


def _write_array(path: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file; `np.save` writes number by number what is not in one piece."""
    with path.open('wb') as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header | {'fortran_order': False})
        for part in [array] if array.flags.c_contiguous else array:
            np.ascontiguousarray(part).tofile(file)


@ocp.args.register_with_handler(_ArrayFiles, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ArrayArgs(ocp.args.CheckpointArgs):
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Checkpointer:
    """Writes and reads the checkpoints in one folder; the newest `KEEP` are kept.

    A checkpoint that cannot be read, or whose files are not as they were written, is passed over
    with a warning, and the one before it is taken.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder, making it if it is missing."""
        self._folder = folder.absolute()
        # Orbax would give up a new one where an old one cannot be removed; see `_remove_old`.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False)
        with _silence():
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, saved: Saved) -> None:
        """Writes a checkpoint; when this returns it is complete on disk.

        Raises:
          NotSaved: the disk is full, or it cannot be written for another reason.
        """
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {'state': ocp.args.StandardSave(saved.state)}
        counters = saved.counters | {'layout': _layout(saved.state)}
        # Empty files, such as those of a replay before its first step, cannot be mapped.
        empty = saved.replay is None or not all(x.size for x in saved.replay['arrays'].values())
        if saved.replay is not None and not any(hosts.gather(empty)):
            items['replay'] = _ArrayArgs(saved.replay['arrays'])
            counters['replay'] = saved.replay['metadata']
            layouts = hosts.gather(_layout(saved.replay['arrays']))
            counters['arrays'] = {name: x for part in layouts for name, x in part.items()}
        items['counters'] = ocp.args.JsonSave(counters)
        try:
            with _silence():
                if not self._manager.save(step, args=ocp.args.Composite(**items)):
                    raise OSError('there is a later one already')
                self._manager.wait_until_finished()
            hosts.first(lambda: _write_checksums(self._folder / str(step)))
            hosts.first(self._remove_old)
        except (OSError, ValueError) as error:
            if hosts.lost(error):
                raise
            # One that lacks its checksums only: the next ones would push whole ones out of the way.
            if hosts.index() == 0:
                shutil.rmtree(self._folder / str(step), ignore_errors=True)
            with contextlib.suppress(OSError, ValueError), _silence():
                self._manager.reload()
            full = re.search('no space left on device|quota exceeded', str(error), re.IGNORECASE)
            reason = full.group() if full else _reason(error)
            failure = NotSaved(
                f'Cannot write the checkpoint {self._folder / str(step)}: {reason}; '
                + ('make room for it, ' if full else '')
                + 'those before it are kept.'
            )
            failure.full = bool(full)
            raise failure from error
        finally:
            if hosts.index() == 0:
                for path in self._folder.glob('*.orbax-checkpoint-tmp*'):  # also of a killed run
                    shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self) -> None:
        """Removes all but the newest, as far as it is possible."""
        with contextlib.suppress(OSError):
            for step in _steps(self._folder)[:-KEEP]:
                shutil.rmtree(self._folder / str(step), ignore_errors=True)  # or at the next save

    def restore_state(self, abstract: TrainState) -> TrainState:
        """Reads the newest train state onto the shardings of `abstract`.

        Raises:
          UserError: the checkpoint is of another agent, or none can be read.
        """
        return self._newest(abstract, with_replay=False)[1].state

    def restore(self, abstract: TrainState) -> Saved:
        """Reads the newest checkpoint, to go on from there.

        Later ones that cannot be read are renamed, as they would be taken for newer ones again.

        Raises:
          UserError: the checkpoint is of another agent, or none can be read.
        """
        newest, saved = self._newest(abstract, with_replay=True)

        def put_away() -> None:
            for step in self._manager.all_steps():
                if step > newest:
                    damaged = self._folder / f'damaged-{step}'
                    shutil.rmtree(damaged, ignore_errors=True)  # of a damage before
                    (self._folder / str(step)).rename(damaged)

        hosts.first(put_away)
        with _silence():
            self._manager.reload()
        return saved

    def close(self) -> None:
        """Waits for pending work and lets go of the folder."""
        self._manager.close()

    def _newest(self, abstract: TrainState, *, with_replay: bool) -> tuple[int, Saved]:
        """Returns the step and the contents of the newest checkpoint that can be read.

        One without checksums, of a run that was killed as it wrote them, cannot be told from a
        damaged one: it is taken only where there is no other.
        """

        def complete(step: int) -> bool:
            return (self._folder / str(step) / CHECKSUMS).exists()

        def warn(step: int, text: str) -> None:
            if hosts.index() == 0:
                logging.getLogger(__name__).warning(
                    'The checkpoint %s %s', self._folder / str(step), text
                )

        def candidates() -> list[int]:
            return sorted(
                sorted(self._manager.all_steps(), reverse=True), key=complete, reverse=True
            )

        reason, steps = '', hosts.first(candidates)
        for step in steps:
            problem = ''
            try:
                folder = self._folder / str(step)
                damage = hosts.first(functools.partial(_damage, folder, with_replay))
                # Told before orbax makes all hosts wait: to fail amid that mixes up what they say.
                if damage := damage or next(filter(None, hosts.gather(_unreadable(folder))), ''):
                    raise ValueError(damage)
                with _silence():
                    saved = self._read(step, abstract, with_replay)
            except (MemoryError, UserError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # of many kinds, by what is damaged
                problem = _reason(error)
            if problem := next(filter(None, hosts.gather(problem)), ''):  # on any host
                reason = problem
                warn(step, f'is damaged and was passed over: {reason}')
                continue
            for other in steps:
                if other > step and not complete(other):
                    warn(other, f'has no {CHECKSUMS} and was passed over.')
            if not complete(step):
                warn(step, f'has no {CHECKSUMS} and was taken unchecked.')
            return step, saved
        raise Failure(
            f'{self._folder} holds no checkpoint that can be read ({reason or "it is empty"}); '
            'move the folder of the run away to start anew.'
        )

    def _read(self, step: int, abstract: TrainState, with_replay: bool) -> Saved:
        def read(**items: Any) -> Any:
            return self._manager.restore(step, args=ocp.args.Composite(**items))

        counters = read(counters=ocp.args.JsonRestore())['counters']
        ours = _layout(abstract)
        theirs = counters.pop('layout', ours)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise UserError(
                    f'The checkpoint {self._folder / str(step)} is of another agent: {name} is '
                    f'{theirs.get(name, "absent")} there and {ours.get(name, "absent")} here.'
                )
        metadata, layout = counters.pop('replay', None), counters.pop('arrays', None)
        replay = None
        if with_replay and metadata is not None:
            replay = {'arrays': read(replay=_ArrayArgs())['replay'], 'metadata': metadata}
            if _layout(replay['arrays']) != layout:  # where there are no checksums
                raise ValueError('the replay is not as it was written.')
        return Saved(read(state=ocp.args.StandardRestore(abstract))['state'], replay, counters)


def abstract_state(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state, to restore into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _layout(arrays: Any) -> dict[str, str]:
    """Dtype and shape of every array by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): f'{x.dtype}{list(x.shape)}'
        for path, x in leaves
    }


def _write_checksums(folder: Path) -> None:
    # A process that is killed before this leaves a checkpoint that is complete, but not checked.
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    for path in [*files, *folder.rglob('*/'), folder.parent]:
        durable.sync(path)
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    durable.write(folder / CHECKSUMS, json.dumps([sums, _checksum_of(sums)], indent=2) + '\n')


def _damage(folder: Path, with_replay: bool) -> str:
    """Says what is damaged in a checkpoint with checksums; nothing if nothing is."""
    path = folder / CHECKSUMS
    if not path.exists():
        return ''
    try:
        sums, own = json.loads(path.read_text())
    except OSError as error:
        return _reason(error)
    except ValueError:
        sums = own = None
    if own != _checksum_of(sums):
        return f'{CHECKSUMS} is not as it was written.'
    for name, expected in sums.items():
        if with_replay or not name.startswith('replay/'):
            try:
                found = _checksum(folder / name)
            except OSError as error:
                return _reason(error)
            if found != expected:
                return f'{name} is not as it was written.'
    return ''


def _unreadable(folder: Path) -> str:
    """Says what this host, of several, cannot read of a checkpoint in which the first one can."""
    if hosts.count() == 1:
        return ''
    paths = hosts.first(lambda: [str(path.relative_to(folder)) for path in folder.rglob('*')])
    try:
        for path in map(folder.joinpath, paths):
            if not path.is_dir():
                with path.open('rb') as file:
                    file.read(1)
    except OSError as error:
        return _reason(error)
    return ''


def _checksum_of(sums: Any) -> int:
    return zlib.crc32(json.dumps(sums).encode())


def _checksum(path: Path) -> int:
    result = 0
    with path.open('rb') as file:
        while piece := file.read(1 << 20):  # a replay does not fit into memory twice
            result = zlib.crc32(piece, result)
    return result


def _reason(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) <= 400 else f'{text[:100]} ... {text[-300:]}'  # the cause comes last


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hides what orbax and its threads print about what went wrong; it raises as well."""
    loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
    levels = [logger.level for logger in loggers]
    threads, hook = set(threading.enumerate()), sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            try:
                yield
            except Exception as error:
                # Here ends what would end, and print, later.
                warnings.simplefilter('ignore', RuntimeWarning)  # of coroutines left alone
                deadline = time.monotonic() + 5
                while set(threading.enumerate()) - threads and time.monotonic() < deadline:
                    time.sleep(0.01)
                traceback.clear_frames(error.__traceback__)
                gc.collect()
                raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
