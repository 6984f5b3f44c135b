"""Files that are there, and whole, also after a loss of power."""

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns when a file, or what a folder lists, is on the disk as it is now."""
    if os.name == 'nt':  # where a folder cannot be opened, nor a file synced that is only read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # from network disks that cannot
            raise
    finally:
        os.close(descriptor)


def write(path: Path, text: str) -> None:
    """Writes a file; there is no moment without this one or the one before as a whole."""
    draft = path.with_name(f'{path.name}.draft')
    draft.write_text(text)
    sync(draft)
    draft.replace(path)
    sync(path.parent)
