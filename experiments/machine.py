"""Where something is measured: the processor, the commit, how fast the machine is just then."""

import functools
import itertools
import os
import pathlib
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from typing import Any

from dreamerv3_jax import startup


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.partition(': ')[2] for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.machine()


def this_machine() -> str:
    """Its processor, cores and widest instructions: the names of virtual ones do not tell these."""
    wide = 'with' if ' avx512f' in startup.instruction_set() else 'without'
    return f'{processor()}, {os.cpu_count()} cores, {wide} AVX-512'


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


def time_of(function: Callable[[], Any], repeat: int = 1) -> float:
    """Seconds per call, the mean of `repeat`, after another: the first of them is slower."""
    function()
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - start) / repeat


@functools.cache
def _product() -> Callable[[], Any]:
    """A float32 matrix product of 2048 cubed, compiled."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    return lambda: product(x).block_until_ready()


def prepare_yardsticks() -> None:
    """Comes before anything is compiled that is measured: what compiling leaves makes it slower."""
    _product()


def measured_peak() -> float:
    """GFLOP/s of a float32 matrix product of 2048 cubed, the best of 5."""
    product = _product()
    return 2 * 2048**3 / min(time_of(product) for _ in range(5)) / 1e9


@functools.cache
def _memory() -> tuple[Any, Any]:
    """Half a gigabyte in rows of 4 KB, and place for an eighth of them."""
    import numpy as np

    return np.ones((2**17, 4096), np.uint8), np.ones((2**14, 4096), np.uint8)


def measured_gathers() -> float:
    """GB/s of gathering 16,384 rows of 4 KB, other ones each time, from half a gigabyte."""
    import numpy as np

    memory, gathered = _memory()
    draws = iter(np.random.default_rng().permutation(len(memory)).reshape(-1, len(gathered)))

    def gather() -> None:
        np.take(memory, next(draws), axis=0, out=gathered, mode='clip')

    return gathered.nbytes / min(time_of(gather) for _ in range(4)) / 1e9


def peak_gigabytes() -> float:
    """The most memory that the process has held at a time so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def beside(
    yardsticks: dict[str, Callable[[], float]], function: Callable[[], Any], runs: int
) -> tuple[list[Any], dict[str, list[float]]]:
    """What a function returns each time, and how fast the machine was then, as machines drift.

    A yardstick's value is the mean of those before and after the call. No call begins after
    `runs` of them, nor after 40 seconds but for the first three.
    """
    results: list[Any] = []
    values = [[yardstick() for yardstick in yardsticks.values()]]
    start = time.perf_counter()
    while len(results) < min(runs, 3 if time.perf_counter() - start > 40 else runs):
        results.append(function())
        values.append([yardstick() for yardstick in yardsticks.values()])
    means = [
        [(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(values)
    ]
    return results, dict(zip(yardsticks, map(list, zip(*means, strict=True)), strict=True))
