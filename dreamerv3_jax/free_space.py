"""How much memory and disk there is to take."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS = Path('/sys/fs/cgroup')


def available_memory() -> int | None:
    """Returns the free memory in bytes, or `None` where the system does not say.

    That of a container, or of a job of SLURM, is its limit where that is less.
    """
    limits = []
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        limits = [1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable:')]
        limits += _limits_of_groups()
    except (OSError, ValueError):
        pass  # not Linux
    if not limits:
        try:
            limits = [os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
        except (AttributeError, OSError, ValueError):
            return None
    return min(limits)


def _limits_of_groups() -> Iterator[int]:
    """Limits of the control groups that this process is in, of both versions, and those above."""
    for line in Path('/proc/self/cgroup').read_text().splitlines():
        _, controllers, group = line.split(':', 2)
        if not controllers:
            root, name = _GROUPS, 'memory.max'
        elif 'memory' in controllers.split(','):
            root, name = _GROUPS / 'memory', 'memory.limit_in_bytes'
        else:
            continue
        path = PurePosixPath(group)
        for part in (path, *path.parents):
            with contextlib.suppress(OSError, ValueError):  # there is none
                yield int((root / part.relative_to('/') / name).read_text())


def available_disk(directory: Path) -> int:
    """Returns the free bytes on the disk of a folder, with those of the replay that is in it."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    reused = sum(512 * getattr(path.stat(), 'st_blocks', 0) for path in directory.rglob('*.ring'))
    return shutil.disk_usage(existing).free + reused
