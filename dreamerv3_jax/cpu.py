"""Settings that make JAX faster on CPUs. They have to be made before jax is imported."""

import ctypes
import glob
import importlib.metadata
import importlib.util
import os

# From malloc.h. Large buffers are kept instead of being returned to the system after every
# operation, which costs a page fault per 4 KB when they are needed again. The process does not
# shrink then.
_MALLOC_OPTIONS = (
    (-4, 0),  # M_MMAP_MAX: no buffer of its own mapping
    (-1, -1),  # M_TRIM_THRESHOLD: never trim the heap
    (-2, 256 * 1024 * 1024),  # M_TOP_PAD: grow the heap in large pieces
    (-8, 1),  # M_ARENA_MAX: one heap for all threads
)
# This release puts convolutions and reductions into fusions that are slower than XLA's own loops,
# and uses half of the widest registers. Unknown flags end the process, so releases that were not
# tried are left alone.
_TUNED_RELEASE = '0.10.2'
_FLAGS = (
    '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution,-reduce '
    '--xla_cpu_prefer_vector_width=512'
)


def prepare() -> bool:
    """Tunes memory allocation and XLA on a machine without accelerator, before jax is imported.

    Leaves alone what the environment variables `MALLOC_*`, `GLIBC_TUNABLES` or `XLA_FLAGS` decide.

    Returns:
      Whether the machine was taken for one without accelerator.
    """
    if not _only_cpu():
        return False
    if not any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ):
        _tune_malloc()
    if importlib.metadata.version('jaxlib') == _TUNED_RELEASE:
        os.environ.setdefault('XLA_FLAGS', _FLAGS)
    return True


def _only_cpu() -> bool:
    platforms = os.environ.get('JAX_PLATFORMS', '')
    if platforms:
        return platforms == 'cpu'
    devices = glob.glob('/dev/nvidia[0-9]*') + glob.glob('/dev/accel*') + glob.glob('/dev/kfd')
    return not devices and importlib.util.find_spec('libtpu') is None


def _tune_malloc() -> None:
    try:
        library = ctypes.CDLL('libc.so.6')  # glibc's name; other C libraries have other ones
        for option, value in _MALLOC_OPTIONS:
            library.mallopt(option, value)
    except (OSError, AttributeError):
        pass
