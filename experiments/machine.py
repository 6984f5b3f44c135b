"""Where something is measured: the processor, the commit, how fast the machine is just then."""

import functools
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
    before_each: Callable[[], Any] | None = None,
) -> list[float]:
    """Seconds per call over `runs`, each the mean of `repeat` calls, after two that warm up.

    So does one after each call of `before_each`: the first after anything else is slower.
    """
    function()
    function()
    result = []
    for _ in range(runs):
        if before_each:
            before_each()
            function()
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        result.append((time.perf_counter() - start) / repeat)
    return result


@functools.cache
def _product() -> Callable[[], Any]:
    """A float32 matrix product of 2048 cubed, compiled."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    return lambda: product(x).block_until_ready()


def measured_peak() -> float:
    """GFLOP/s of a float32 matrix product of 2048 cubed, the best of 10."""
    return 2 * 2048**3 / min(times_of(_product(), 10)) / 1e9


@functools.cache
def _gather() -> Callable[[], Any]:
    """Gathers 4 MB, in rows of 4 KB, from half a gigabyte."""
    import numpy as np

    memory = np.ones((2**17, 4096), np.uint8)
    rows = np.random.default_rng(0).integers(0, len(memory), 1024)
    return lambda: memory[rows]


class Machine:
    """The machine's peak at several times, and the process's peak of memory before the first.

    Made before anything is compiled that is measured: what compiling leaves of the heap would make
    it slower.
    """

    def __init__(self) -> None:
        _product()
        self.gflops: list[float] = []
        self.gathers: list[float] = []  # GB/s
        self.gigabytes = 0.0

    def measure(self) -> None:
        if not self.gflops:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self.gigabytes = usage.ru_maxrss * 1024 / 1e9
        self.gflops.append(measured_peak())

    def measure_with_memory(self) -> None:
        """Measures how fast rows are gathered from memory as well."""
        self.measure()
        self.gathers.append(2**22 / min(times_of(_gather(), 10)) / 1e9)
