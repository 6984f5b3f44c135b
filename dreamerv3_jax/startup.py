"""Settings that make JAX faster and quicker to start. They come before jax is imported."""

import contextlib
import ctypes
import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamerv3_jax.errors import UserError

_C_LIBRARY = 'libc.so.6'  # glibc's name; other C libraries have other ones
# From malloc.h. Large buffers are kept instead of being returned to the system after every
# operation, which costs a page fault per 4 KB when they are needed again. The process does not
# shrink then.
_MALLOC_OPTIONS = (
    (-4, 0),  # M_MMAP_MAX: no buffer of its own mapping
    (-1, -1),  # M_TRIM_THRESHOLD: never trim the heap
    (-2, 256 * 1024 * 1024),  # M_TOP_PAD: grow the heap in large pieces
    (-8, 1),  # M_ARENA_MAX: one heap for all threads
)
_HUGE_PAGES = 14  # MADV_HUGEPAGE of sys/mman.h
_one_heap = False  # whether they are in force
own_cache = False  # whether compiled programs are kept in the user's cache folder
# A core that waits for another one ends the process after a minute, so also one that was suspended
# for that long; with these it waits.
_PATIENT = (
    '--xla_cpu_collective_call_warn_stuck_timeout_seconds=1000000000 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=1000000000'
)
# By release of jaxlib. Unknown flags end the process, so those that were not tried are left alone.
_FLAGS = {
    # Puts convolutions and reductions into fusions that are slower than XLA's own loops, uses half
    # of the widest registers, and keeps more arrays at a time than it must, to run more operations
    # at once.
    '0.10.2': '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution,-reduce '
    '--xla_cpu_prefer_vector_width=512 '
    f'--xla_cpu_enable_concurrency_optimized_scheduler=false {_PATIENT}',
    '0.12.0.1': _PATIENT,
}
# XLA splits single operations among the cores, the small ones not at all. As several devices, the
# cores share the sequences of a batch instead. Each device has a copy of the parameters.
_MOST_DEVICES = 4


def find_modules_here() -> None:
    """Lets modules of the current folder be imported, as with `python -m`, but behind others."""
    with contextlib.suppress(FileNotFoundError):  # it was deleted
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


def prepare() -> None:
    """What the command line does before it imports jax.

    Raises:
      UserError: `JAX_NUM_CPU_DEVICES` is no number of devices.
    """
    count = os.environ.get('JAX_NUM_CPU_DEVICES', '-1')  # which is JAX's default
    if count != '-1' and not (count.isdecimal() and int(count)):
        raise UserError(f'JAX_NUM_CPU_DEVICES is {count!r}; set it to 1 or more, or not at all.')
    tune_cpu()
    keep_compiled_programs()


def prepare_plan(kind: str, count: int) -> None:
    """What comes before jax is imported to compile for devices that are not here.

    Args:
      kind: cpu, or a kind of TPU.
      count: number of devices.

    Raises:
      UserError: the compiler for TPUs is missing.
    """
    global _one_heap
    if kind != 'cpu' and importlib.util.find_spec('libtpu') is None:
        pinned = [x for x in importlib.metadata.requires('jax') or () if x.startswith('libtpu')]
        package = pinned[0].partition(';')[0].strip() if pinned else 'libtpu'
        raise UserError(
            f"The compiler for TPUs is not installed; it comes with: pip install '{package}'."
        )
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if kind == 'cpu':
        os.environ['JAX_NUM_CPU_DEVICES'] = str(count)
        tune_cpu()
        _one_heap = False  # nothing will run
    else:  # no TPU is looked for, nor complained of, and others may hold the compiler too
        os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
        os.environ |= {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4'}


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache folder, so that a run goes on within seconds.

    Leaves alone what the environment variable `JAX_COMPILATION_CACHE_DIR` decides.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return
    # A home folder may be shared by machines that do not understand each other's programs.
    machine = hashlib.sha256(instruction_set().encode()).hexdigest()[:8]
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none to write to
        home = Path(os.environ.get('XDG_CACHE_HOME', ''))
        if not home.is_absolute():
            home = Path.home() / '.cache'
        folder = home / 'dreamerv3_jax' / machine
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
            global own_cache
            own_cache = True


def instruction_set() -> str:
    """Returns the line of the system that names the processor's instructions, or its kind."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith(('flags', 'Features')):
                return line
    return platform.machine()


def tune_cpu() -> None:
    """Tunes memory allocation and XLA on a machine without accelerator, before jax is imported.

    Leaves alone what the environment variables `MALLOC_*`, `GLIBC_TUNABLES`, `XLA_FLAGS` or
    `JAX_NUM_CPU_DEVICES` decide.
    """
    if not _only_cpu():
        return
    os.environ.setdefault('JAX_NUM_CPU_DEVICES', str(min(_cores(), _MOST_DEVICES)))
    if not any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ):
        _tune_malloc()
    flags = _FLAGS.get(importlib.metadata.version('jaxlib'))
    if flags:
        os.environ.setdefault('XLA_FLAGS', flags)


def _only_cpu() -> bool:
    platforms = os.environ.get('JAX_PLATFORMS', '')
    if platforms:
        return platforms == 'cpu'
    # Hardware counts with what JAX needs for it: laptops have GPUs that it cannot use, and the
    # compiler alone makes no TPU. Under WSL a GPU is /dev/dxg.
    patterns: list[str] = []
    if importlib.util.find_spec('jax_plugins') is not None:
        patterns += ['/dev/nvidia[0-9]*', '/dev/dxg', '/dev/kfd']
    if importlib.util.find_spec('libtpu') is not None:
        patterns += ['/dev/accel[0-9]*', '/dev/vfio/[0-9]*']
    return not any(map(glob.glob, patterns))


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tune_malloc() -> None:
    global _one_heap
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(_C_LIBRARY)
        for option, value in _MALLOC_OPTIONS:
            library.mallopt(option, value)
        _one_heap = True


def return_memory(buffers: Sequence[int] = ()) -> None:
    """Gives memory that was freed back to the system; compiling leaves a gigabyte of it.

    It lies in hundreds of thousands of pieces. `malloc` would search the large ones for each buffer
    of an update, and hand out the small ones in turn, so that each is far from the last and in no
    cache, for one thread at a time. So all are taken for good, without using the memory in them but
    for a few bytes. What comes lies behind, in pages of 2 MB, of which there are fewer to be looked
    up.

    Args:
      buffers: bytes of each large buffer that the update will take and free again. Each gets a
        place, in which it is not followed by others that stay: a hole would be left that is too
        small for the next one.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(_C_LIBRARY)
        library.malloc_trim(0)
        if _one_heap:
            library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
            library.malloc.argtypes = library.sbrk.argtypes = [ctypes.c_size_t]
            library.free.argtypes = [ctypes.c_void_p]
            _take_pieces(library)
            # What is left beside a large buffer is larger than the place of all others, so that
            # these fill their own first, and too small for a second large buffer.
            others = max(buffers, default=2**28) * 3 // 5
            _make_places(library, [others, *(size + others + size // 4 for size in buffers)])


def _take_pieces(library: ctypes.CDLL) -> None:
    """Takes what is free in the heap as it is now, the largest pieces first."""
    end = library.sbrk(0)
    octaves = [2**bits for bits in range(30, 4, -1)]
    # Down to a page by eighths of an octave: each piece uses the page in which it begins.
    sizes = [size * part // 8 for size in octaves for part in range(15, 7, -1) if size > 2**12]
    for size in sizes + [size for size in octaves if size <= 2**12]:
        # With the 8 bytes that `malloc` puts before each piece it has this size.
        while (piece := library.malloc(size - 8)) and piece + size <= end:
            pass
        library.free(piece)
    library.malloc_trim(0)  # pages behind the heap that pieces began in are no longer used


def _make_places(library: ctypes.CDLL, sizes: Sequence[int]) -> None:
    """Frees areas of these sizes that stay apart. `malloc` takes the smallest that is left."""
    places = []
    for size in sizes:
        if start := library.malloc(size):
            first = -(-start // 2**21) * 2**21
            huge = ctypes.c_void_p(first), ctypes.c_size_t(start + size - first)
            library.madvise(*huge, _HUGE_PAGES)
            places.append(start)
        library.malloc(2**15)  # stays between this one and the next
    for start in places:
        library.free(start)
