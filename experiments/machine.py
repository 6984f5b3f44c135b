"""What a measured figure has to say about where it was measured."""

import pathlib
import platform


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.partition(': ')[2] for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.machine()
