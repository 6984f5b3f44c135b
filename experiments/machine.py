"""Where something is measured: the processor, the commit, how fast the machine is just then."""

import os
import pathlib
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from typing import Any


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.partition(': ')[2] for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.machine()


def commit() -> str:
    """Short name of the commit that is checked out, with a plus where files differ from it."""
    command = ['git', 'describe', '--always', '--exclude=*', '--dirty=+']
    folder = pathlib.Path(__file__).parent
    return subprocess.run(
        command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def measured_on() -> str:
    """How a measured figure begins to say where it comes from."""
    day = time.strftime('%Y-%m-%d')
    return f'Measured on {day}, commit {commit()}, with {processor()}, {os.cpu_count()} cores'


def times_of(
    function: Callable[[], Any],
    runs: int,
    repeat: int = 1,
    before_each: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Seconds per call over `runs`, each the mean of `repeat` calls, after two that warm up."""
    function()
    function()
    result = []
    for _ in range(runs):
        before_each()
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        result.append((time.perf_counter() - start) / repeat)
    return result


def measured_peak() -> float:
    """GFLOP/s of a float32 matrix product of 2048 cubed."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)
    return 2 * 2048**3 / min(times_of(lambda: product(x).block_until_ready(), 10)) / 1e9


class Machine:
    """The machine's peak at several times, and the process's peak of memory before the first."""

    def __init__(self) -> None:
        self.gflops: list[float] = []
        self.gigabytes = 0.0

    def measure(self) -> None:
        if not self.gflops:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self.gigabytes = usage.ru_maxrss * 1024 / 1e9
        self.gflops.append(measured_peak())
