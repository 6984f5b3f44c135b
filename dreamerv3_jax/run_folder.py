"""The folder of a run: its settings, and whether another start may use it."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dreamerv3_jax.configs import base
from dreamerv3_jax.errors import UserError

MAY_CHANGE = ('logdir', 'mesh.', 'run.', 'env.timeout')  # settings that a later start may change


class Lock:
    """Keeps other processes out of a run, until it is closed or this process ends in any way."""

    def __init__(self, logdir: Path) -> None:
        """Takes the lock of an existing folder.

        Raises:
          UserError: another process has it.
          OSError: the folder cannot be written to.
        """
        self._file: int | None = None
        self._file = os.open(logdir / 'lock', os.O_RDWR | os.O_CREAT, 0o644)
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
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f'process {os.getpid()} of {platform.node()}'.encode(), 0)

    def close(self) -> None:
        """Lets others in."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    __del__ = close


def create(logdir: Path, config: ml_collections.ConfigDict) -> Lock:
    """Makes the folder, locks it, and writes its settings, `config.json`.

    Returns:
      The lock.

    Raises:
      UserError: the folder cannot be written to, a setting cannot be written down, or another
        process holds the lock.
    """
    try:
        text = json.dumps(config.to_dict(), indent=2)
        logdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(logdir)
        draft = logdir / 'config.json.draft'
        draft.write_text(text + '\n')
        draft.replace(logdir / 'config.json')  # there is no moment without a complete file
        return lock
    except TypeError as error:
        raise UserError(
            f'config.env.kwargs takes numbers, text, lists and dictionaries only: {error}.'
        ) from error
    except OSError as error:
        raise UserError(
            f'Cannot write to {logdir} ({error.strerror}); '
            'choose another folder with --config.logdir.'
        ) from error


def read_config(logdir: Path) -> ml_collections.ConfigDict:
    """Settings of the run in a folder.

    Raises:
      UserError: there is no run.
    """
    path = logdir / 'config.json'
    try:
        settings = json.loads(path.read_text())
        settings['env'] = base.get_config().env.to_dict() | settings['env']  # of an older version
        return ml_collections.ConfigDict(settings)
    except OSError as error:
        raise UserError(
            f'{logdir} holds no run: {path.name} cannot be read ({error.strerror}).'
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} is damaged: {error}.') from error


def check(logdir: Path, config: ml_collections.ConfigDict) -> None:
    """Refuses to go on with a run under other settings.

    Raises:
      UserError: with every difference.
    """
    if not (logdir / 'config.json').exists():
        return
    old, new = _flat(read_config(logdir)), _flat(config)
    differences = [
        f'{key}: {old.get(key, "absent")} then, {new.get(key, "absent")} now'
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(MAY_CHANGE) and old.get(key) != new.get(key)
    ]
    if differences:
        raise UserError(
            f'{logdir} holds a run with other settings ({"; ".join(differences)}); '
            'choose another folder with --config.logdir, or the same settings.'
        )


def derived_seed(seed: int, start: int) -> int:
    """Seed of the environments at the given start of a run (0 for the first)."""
    return int(np.random.SeedSequence([seed, start]).generate_state(1)[0])


def _flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Settings by dotted name, with the values that they have when they come back from the file."""

    def items(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                result |= items(value, f'{prefix}{key}.')
            else:
                result[prefix + key] = value
        return result

    return items(json.loads(json.dumps(config.to_dict(), default=repr)), '')
