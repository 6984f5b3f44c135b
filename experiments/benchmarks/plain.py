"""The update as one would write it first: optimisations by name, and the way to leave each out.

python -m experiments.benchmarks.plain [--size=size1m] [--kind='images 64x64x3'] [--runs=7]

Times the update without each optimisation in turn, and without all of them, beside the update as it
is: both are compiled in one process and take turns, and the ratio of their medians is printed. The
settings of `startup` are measured in processes of their own, which take turns three times.
--output=FILE writes a table there, as markdown.
"""

import argparse
import contextlib
import importlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarks import measure
from experiments.machine import measured_on

NAME = 'experiments.benchmarks.plain'  # of this module, however it was started


def _window_max_pool(x: Any) -> Any:
    import jax
    import numpy as np

    shape = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -np.inf, jax.lax.max, shape, shape, 'VALID')


def _convolve(x: Any, kernel: Any, group: int) -> Any:
    from dreamerv3_jax.nets import convolutions

    return convolutions.convolve(x, kernel)


def _pooled(conv: Any, x: Any) -> Any:
    from dreamerv3_jax.nets import convolutions

    return convolutions.max_pool(conv(x))


def _upsampled(conv: Any, x: Any) -> Any:
    return conv(x.repeat(2, 1).repeat(2, 2))


def _scan(step: Callable, params: Any, start: Any, inputs: Any) -> Any:
    import jax

    def body(state: Any, xs: Any) -> Any:
        state, output = step(params, state, xs)
        return state, (state, output)

    return jax.lax.scan(body, start, inputs)[1]


def _sequence(cell: Any, deter: Any, stoch: Any, action: Any) -> Any:
    import flax.linen as nn
    import jax.numpy as jnp

    def product(layer: Any, x: Any) -> Any:  # [N, G, in] -> [N, G, out]
        out = jnp.einsum('ngi,gio->ngo', x, layer.kernel.astype(layer.dtype))
        return out + layer.bias.astype(layer.dtype).reshape(1, layer.blocks, -1)

    shared = jnp.concatenate([cell.deter_in(deter), cell.stoch_in(stoch), action], -1)
    shared = jnp.broadcast_to(shared[:, None], (len(shared), cell.blocks, shared.shape[-1]))
    blocks = deter.reshape(len(deter), cell.blocks, -1)
    x = product(cell.recurrent, jnp.concatenate([blocks, shared], -1))
    x = nn.silu(cell.recurrent_norm(x.reshape(deter.shape))).reshape(blocks.shape)
    reset, candidate, update = (
        part.reshape(deter.shape) for part in jnp.split(product(cell.gates, x), 3, -1)
    )
    update = nn.sigmoid(update - 1)
    return update * jnp.tanh(nn.sigmoid(reset) * candidate) + (1 - update) * deter


def _critic_loss(
    logits: Any, returns: Any, slow_value: Any, bins: Any, *, slow_scale: float
) -> Any:
    import jax

    from dreamerv3_jax.losses import two_hot_loss

    returns, slow_value = jax.lax.stop_gradient((returns, slow_value))
    slow = two_hot_loss(logits, slow_value, bins)
    return two_hot_loss(logits, returns, bins) + slow_scale * slow


# name: (module, attribute, what takes its place)
PATCHES: dict[str, tuple[str, str, Callable]] = {
    'maximum of four slices for pooling': ('nets.convolutions', 'max_pool', _window_max_pool),
    'first convolutions on space-to-depth images': (
        'nets.convolutions',
        'Conv.pooled',
        _pooled,
    ),
    'upsampling convolutions on the small image': (
        'nets.convolutions',
        'Conv.upsampled',
        _upsampled,
    ),
    'gradients of kernels from groups of images': (
        'nets.convolutions',
        'convolve_in_groups',
        _convolve,
    ),
    "gradients of the scan's parameters in one batch": (
        'rssm',
        'scan_with_batched_gradients',
        _scan,
    ),
    'what lies between products computed again for gradients': (
        'nets.layers',
        'recompute',
        lambda function: function,
    ),
    'blocks of the recurrent model first': ('nets.rssm_cell', 'RSSMCell.sequence', _sequence),
    'both targets of the critic in one pass': ('losses', 'critic_loss', _critic_loss),
    'kernels transposed before the scan': (
        'nets.layers',
        'product',
        lambda x, kernel: x @ kernel,
    ),
    'maxima and sums of 16 numbers at once': (
        'reductions',
        '_reduce',
        lambda on_cpu, elsewhere, x: elsewhere(x),
    ),
}
# From images convolutions take most of the time, and what these bring is less than the noise.
FROM_VECTORS = tuple(PATCHES)[-2:]
SETTINGS = {
    'a device for each core': {'JAX_NUM_CPU_DEVICES': '1'},
    'settings of XLA': {'XLA_FLAGS': '--xla_cpu_prefer_vector_width=256'},  # the default
    'settings of the allocator': {'MALLOC_PERTURB_': '0'},
}


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Leaves out these optimisations of all that is traced meanwhile."""
    with contextlib.ExitStack() as stack:
        for name in names:
            module, attribute, plain = PATCHES[name]
            owner: Any = importlib.import_module(f'dreamerv3_jax.{module}')
            *path, last = attribute.split('.')
            for part in path:
                owner = getattr(owner, part)
            stack.callback(setattr, owner, last, getattr(owner, last))
            setattr(owner, last, plain)
        yield


class Form:
    """An update that was compiled without some optimisations, and the seconds that it takes."""

    def __init__(self, size: str, kind: str, left_out: tuple[str, ...] = ()) -> None:
        self._agent = measure.make_agent(size, kind)
        with without(*left_out):
            self._agent.compile_update(16, 64)
        self._state, self._batch = self._agent.init(seed=0), measure.random_batch(self._agent)
        self.run()

    def run(self) -> float:
        import jax

        start = time.perf_counter()
        self._state, *_ = jax.block_until_ready(self._agent.update(self._state, self._batch))
        return time.perf_counter() - start


def ratio(plain: Form, as_it_is: Form, runs: int) -> float:
    """Seconds that one form takes, relative to those of the other; they take turns."""
    seconds = [(plain.run(), as_it_is.run()) for _ in range(runs)]
    first, second = map(statistics.median, zip(*seconds, strict=True))
    return first / second


def names(kind: str) -> list[str]:
    """The optimisations that can matter to an update from such observations."""
    if kind.startswith('images'):
        return [name for name in PATCHES if name not in FROM_VECTORS]
    return [name for name, (module, *_) in PATCHES.items() if 'conv' not in module]


def ratios(size: str, kind: str, runs: int, only: str) -> Iterator[tuple[str, float]]:
    """What is left out, and the times that the update takes then."""
    as_it_is = Form(size, kind)
    cases = {name: (name,) for name in names(kind)} | {'all of these': tuple(names(kind))}
    for name, left_out in cases.items():
        if only in name:
            yield name, ratio(Form(size, kind, left_out), as_it_is, runs)
    for name, settings in SETTINGS.items():
        if only in name:
            yield name, ratio_of_settings(f'update {size} {kind}', settings, runs)


def ratio_of_settings(case: str, settings: dict[str, str], runs: int) -> float:
    """Seconds that a case takes with settings, relative to those without; processes take turns."""
    with tempfile.TemporaryDirectory() as cache:  # of compiled programs
        seconds = []
        for chosen in (settings, {}) * 3:
            (result,) = measure.in_process(case, runs, JAX_COMPILATION_CACHE_DIR=cache, **chosen)
            seconds.append(statistics.median(result['seconds']))
    return statistics.median(seconds[::2]) / statistics.median(seconds[1::2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--size', default='size1m')
    parser.add_argument('--kind', default='vectors')
    parser.add_argument('--runs', type=int, default=7)
    parser.add_argument('--only', default='', help='a part of the names to be measured')
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args()

    from dreamerv3_jax import startup

    startup.tune_cpu()
    lines = [
        f"{measured_on()}: `python -m {NAME} --size={options.size} --kind='{options.kind}'`.",
        '',
        '| left out | times the update takes then |',
        '|---|---|',
    ]
    print('\n'.join(lines), flush=True)
    for name, value in ratios(options.size, options.kind, options.runs, options.only):
        lines.append(f'| {name} | {value:.2f} |')
        print(lines[-1], flush=True)
        if options.output:
            options.output.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
