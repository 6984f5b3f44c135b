"""The folder of a run: its settings and spaces, and whether another start may use it."""

import collections
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dreamerv3_jax import durable, hosts
from dreamerv3_jax.configs import base
from dreamerv3_jax.errors import Failure, UserError
from dreamerv3_jax.spaces import ArraySpec

Specs = Mapping[str, ArraySpec]  # arrays of an observation or an action by name

# Settings that a later start may change.
MAY_CHANGE = (
    'logdir', 'mesh.', 'hosts.', 'run.', 'env.timeout', 'replay.on_disk', 'agent.remat',
)  # fmt: skip
SEEN_WITHIN = 90.0  # seconds; network disks may remember for so long that there was no folder


class Lock:
    """Keeps other processes out of a run, until it is closed or this process ends in any way."""

    def __init__(self, logdir: Path) -> None:
        """Takes the lock, and makes the folder if it is missing.

        Raises:
          UserError: another process has it, or the folder cannot be written to.
        """
        self._file: int | None = None
        self._path = logdir / 'lock'
        with _writing(logdir):
            logdir.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0)  # see `_refuse_links`
            self._file = os.open(self._path, flags, 0o644)
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self._file, 200).decode(errors='replace') or 'another process'
            raise UserError(
                f'{logdir} is in use by {owner}; stop it, or choose another folder with '
                '--config.logdir.'
            ) from error
        except (ImportError, OSError):
            return  # Windows, and some network disks, have no such locks
        with contextlib.suppress(OSError):  # a full disk, and the lock holds without a name
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f'process {os.getpid()} of {platform.node()}'.encode(), 0)

    def holds(self) -> bool:
        """Whether other processes see it: not if the folder was deleted and they made it anew."""
        try:
            return self._file is None or os.path.samestat(os.fstat(self._file), self._path.stat())
        except OSError:  # nobody made it anew, or the disk fails
            return True

    def close(self) -> None:
        """Lets others in."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    __del__ = close


def create(
    logdir: Path,
    config: ml_collections.ConfigDict,
    observation_specs: Specs,
    action_specs: Specs,
    lock: Lock | None = None,
) -> Lock:
    """Makes the folder, locks it, and writes its settings and spaces.

    Args:
      logdir: the folder.
      config: for `config.json`.
      observation_specs: for `spaces.json`, and so are
      action_specs: these.
      lock: where it was taken before; else the folder was not there.

    Returns:
      The lock.

    Raises:
      UserError: the folder cannot be written to or holds links, a setting cannot be written down,
        another process holds the lock, or has used the folder since it was looked for.
    """
    try:
        settings = config.to_dict()
        settings |= {'checksum': _checksum(settings)}
        texts = {'config.json': json.dumps(settings, indent=2)}
    except TypeError as error:
        raise UserError(
            f'config.env.kwargs takes numbers, text, lists and dictionaries only: {error}.'
        ) from error
    texts['spaces.json'] = json.dumps(_spaces(observation_specs, action_specs), indent=2)
    if lock is None:
        lock = Lock(logdir)
        if (logdir / 'config.json').exists():
            lock.close()
            raise UserError(
                f'Another process has begun a run in {logdir} meanwhile; give the same command '
                'again to go on from there.'
            )
    with _writing(logdir):
        _refuse_links(logdir)
        for name, text in texts.items():
            durable.write(logdir / name, text + '\n')
    return lock


def read_config(logdir: Path) -> ml_collections.ConfigDict:
    """Settings of the run in a folder.

    Raises:
      UserError: there is no run.
    """
    path = logdir / 'config.json'
    try:
        settings = json.loads(path.read_text())
        checksum = settings.pop('checksum', None)  # an older version wrote none
        if checksum not in (None, _checksum(settings)):
            raise ValueError('it is not what was written')
        for group, values in base.get_config().to_dict().items():  # of an older version
            if isinstance(values, dict):
                settings[group] = values | settings.get(group, {})
        return ml_collections.ConfigDict(settings)
    except OSError as error:
        raise UserError(
            f'{logdir} holds no run: {path.name} cannot be read ({error.strerror}).'
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} is damaged: {error}.') from error


def check_nothing_lost(logdir: Path) -> None:
    """Refuses to begin a run over one whose checkpoints were taken away.

    One that was stopped before its first checkpoint has the folder for it.

    Raises:
      UserError: there are metrics, but no such folder.
    """
    metrics, checkpoints = logdir / 'metrics.jsonl', logdir / 'checkpoints'
    if not checkpoints.exists() and metrics.exists() and metrics.stat().st_size:
        raise UserError(
            f'{logdir} holds a run without its {checkpoints.name}; bring them back to go on, or '
            'move the folder away to start anew.'
        )


def check_hosts(config: ml_collections.ConfigDict) -> None:
    """Refuses hosts that were not started by the same command, or are not alike.

    Raises:
      UserError: with the first difference.
    """
    if hosts.count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f'JAX takes the devices of {hosts.count()} hosts together here; leave out '
            '--config.hosts.count=1, or let libtpu take the chips of one host only '
            '(TPU_VISIBLE_CHIPS, TPU_CHIPS_PER_PROCESS_BOUNDS, TPU_PROCESS_BOUNDS).'
        )
    numbers = collections.Counter(device.process_index for device in jax.devices()).values()
    if len(set(numbers)) > 1:  # jax could not exchange anything
        raise hosts.agreed(
            UserError(
                f'The hosts have different numbers of devices ({", ".join(map(str, numbers))}); '
                'let each have as many, on CPUs with JAX_NUM_CPU_DEVICES.'
            )
        )
    first, *others = hosts.gather(config.to_dict())
    for index, other in enumerate(others, 1):
        for key, expected, found in _differences(first, other):
            if not key.startswith('hosts.'):
                raise hosts.agreed(
                    UserError(
                        f'config.{key} is {expected} on host 0 and {found} on host {index}; give '
                        'the same command on all hosts, or --config.hosts.count=1 to train on '
                        'each of them alone.'
                    )
                )


def check_lock(logdir: Path, lock: Lock | None) -> None:
    """Refuses to write to a folder that was deleted, and that another run has made anew.

    Raises:
      Failure: it is another's now.
    """
    if lock and not lock.holds():
        raise Failure(
            f"{logdir} was deleted while this run was writing to it, and is another run's now; "
            'nothing was saved to it.'
        )


def own_rings(folder: Path, *, on_disk: bool) -> Path | None:
    """Where this host keeps its replay, None in memory; what was kept in another way is deleted."""
    count, suffix = hosts.count(), f'-of-{hosts.count()}'

    def clean() -> None:
        if not on_disk:
            shutil.rmtree(folder, ignore_errors=True)
        for path in folder.glob('*-of-*'):
            if count == 1 or not path.name.endswith(suffix):
                shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob('*.ring') if count > 1 else ():
            path.unlink(missing_ok=True)

    hosts.first(clean)
    if not on_disk:
        return None
    return folder if count == 1 else folder / f'{hosts.index()}{suffix}'


def check_shared(logdir: Path) -> None:
    """Refuses hosts that do not all see the folder of the run in time.

    Raises:
      UserError: with the first that does not.
    """
    path, start = logdir / 'config.json', time.monotonic()
    while not path.exists() and time.monotonic() < start + SEEN_WITHIN:
        time.sleep(0.5)
    seen = hosts.gather(path.exists())
    if not all(seen):
        raise hosts.agreed(
            UserError(
                f'Host {seen.index(False)} does not see {logdir.absolute()}; choose a folder that '
                'all hosts share with --config.logdir.'
            )
        )


def check(logdir: Path, config: ml_collections.ConfigDict) -> None:
    """Refuses to go on with a run under other settings.

    Raises:
      UserError: with every difference.
    """
    way = 'choose another folder with --config.logdir, or the same settings'
    _compare(logdir, 'settings', read_config(logdir).to_dict(), config.to_dict(), way)


def check_spaces(logdir: Path, observation_specs: Specs, action_specs: Specs) -> None:
    """Refuses to go on with a run, or to play with it, in an environment with other spaces.

    Raises:
      UserError: with every difference.
    """
    path = logdir / 'spaces.json'
    if path.exists():  # an older version wrote none
        way = 'take an environment with the same spaces, or another run'
        _compare(logdir, 'spaces', _read(path), _spaces(observation_specs, action_specs), way)


def derived_seed(seed: int, start: int) -> int:
    """A seed for one purpose: a start (its ticks), another host or an evaluation (2**31 on)."""
    return int(np.random.SeedSequence([seed, start]).generate_state(1)[0])


def _compare(logdir: Path, what: str, then: dict[str, Any], now: dict[str, Any], way: str) -> None:
    differences = [
        f'{key}: {old} then, {new} now'
        for key, old, new in _differences(then, now)
        if not key.startswith(MAY_CHANGE)
    ]
    if differences:
        raise UserError(
            f'{logdir} holds a run with other {what} ({"; ".join(differences)}); {way}.'
        )


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names whose values differ, and both values."""
    old, new = _flat(one), _flat(other)
    return [
        (key, old.get(key, 'absent'), new.get(key, 'absent'))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _spaces(observation_specs: Specs, action_specs: Specs) -> dict[str, Any]:
    groups = {'observation': observation_specs, 'action': action_specs}
    return {
        group: {name: dataclasses.asdict(spec) for name, spec in specs.items()}
        for group, specs in groups.items()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is damaged: {error}.') from error


def _refuse_links(logdir: Path) -> None:
    """A folder that came from elsewhere must not lead what is written into other folders."""
    for path in logdir.rglob('*'):
        if path.is_symlink():
            raise UserError(
                f'{path} is a link, but a run writes in its own folder only; put what it points to '
                'in its place, or choose another folder with --config.logdir.'
            )


@contextlib.contextmanager
def _writing(logdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f'Cannot write to {logdir} ({error.strerror}); '
            'choose another folder with --config.logdir.'
        ) from error


def _checksum(settings: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(settings, sort_keys=True).encode())


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name, as they are when they come back from the file."""

    def items(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                result |= items(value, f'{prefix}{key}.')
            else:
                result[prefix + key] = value
        return result

    return items(json.loads(json.dumps(settings, default=repr)), '')
