"""Devices: the mesh, which axis of which array is split over it, and compiling for it.

The batch is split over both mesh axes. Parameters, optimiser state and slow critic are split over
`fsdp` (fully sharded data parallelism) by shape, see `state_sharding`. An update repeats the
parameters on every device once, see `whole`, and splits their gradients again, see `split`. The
compiler inserts the communication; the same program serves one device and many.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dreamerv3_jax.errors import UserError

Devices = Mesh  # the name in other files, which only pass it on
LEAST_SHARDED = 4096  # elements; smaller arrays are cheaper to repeat than to gather


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as (data, fsdp), so that those of one copy of the parameters are near.

    Args:
      data: number of groups that see different sequences; -1 takes all devices.
      fsdp: number of devices over which a copy of the parameters is spread.
      devices: by default all there are; the first of them are taken where not all are needed.

    Raises:
      UserError: the numbers do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        if len(devices) % fsdp:
            raise UserError(
                f'mesh.fsdp={fsdp} does not divide the {len(devices)} devices; '
                'choose a number that does, or how many of them to use with mesh.data.'
            )
        data = len(devices) // fsdp
    if data * fsdp > len(devices):
        raise UserError(
            f'mesh.data={data} times mesh.fsdp={fsdp} needs {data * fsdp} devices and there are '
            f'{len(devices)}; lower one of them.'
        )
    if data * fsdp < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f'mesh.data={data} times mesh.fsdp={fsdp} takes {data * fsdp} devices of '
            f'{len(devices)}, but many hosts use all of theirs; leave mesh.data at -1.'
        )
    axes, devices = ('data', 'fsdp'), devices[: data * fsdp]
    try:
        return jax.make_mesh((data, fsdp), axes, (AxisType.Auto,) * 2, devices=devices)
    except (AssertionError, NotImplementedError, ValueError):
        # JAX places meshes on whole slices of TPUs, and on the GPUs of one machine; elsewhere the
        # nearest devices are those with the next numbers.
        devices = sorted(devices, key=_place)
        return Mesh(np.asarray(devices).reshape(data, fsdp), axes, axis_types=(AxisType.Auto,) * 2)


def _place(device: jax.Device) -> tuple[int, int, int]:
    return getattr(device, 'slice_index', None) or 0, device.process_index, device.id


def arrange(
    settings: Any, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, jax.Device | None]:
    """The mesh of the devices that learn, and the one of this process that acts only, if one does.

    Args:
      settings: `config.mesh`.
      batch_size: sequences of a batch, of all hosts.
      devices: by default all there are.

    Raises:
      UserError: the settings do not fit the devices.
    """
    acting = None
    devices = jax.devices() if devices is None else devices
    if settings.acting:
        acting = [device for device in devices if device.process_index == jax.process_index()][-1]
        devices = set_apart(devices)
    if settings.data == -1:
        devices = devices_for(batch_size, settings.fsdp, devices)
    return make_mesh(settings.data, settings.fsdp, devices), acting


def set_apart(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Devices without the last one of each host, which acts.

    Raises:
      UserError: a host has one device only.
    """
    last = {device.process_index: device for device in devices}
    learning = [device for device in devices if device not in last.values()]
    if len({device.process_index for device in learning}) < len(last):
        raise UserError(
            'mesh.acting needs two devices on each host, one to act and one to learn; '
            'leave it out, and one device does both.'
        )
    return learning


def devices_for(batch_size: int, fsdp: int, devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """All of them, but of those of one CPU only as many as the sequences can be dealt out to.

    They are cores, see `startup.tune_cpu`, and any number of them does.
    """
    if devices[0].platform != 'cpu' or jax.process_count() > 1:
        return devices
    fitting = [n for n in range(1, len(devices) + 1) if n % fsdp == 0 == batch_size % n]
    return devices[: max(fitting)] if fitting else devices


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Sharding for each array of a state: its longest axis that divides by `fsdp`, if it is large.

    Args:
      mesh: from `make_mesh`.
      state: tree of arrays or of their shapes.
    """
    size = mesh.shape['fsdp']

    def shard(array: Any) -> NamedSharding:
        axes = [axis for axis in range(array.ndim) if array.shape[axis] % size == 0]
        if size == 1 or not axes or math.prod(array.shape) < LEAST_SHARDED:
            return NamedSharding(mesh, P())
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, P(*[None] * longest, 'fsdp'))

    return jax.tree.map(shard, state)


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Sharding that splits the leading axis of every array of a batch over all devices.

    Raises:
      UserError: the sequences cannot be dealt out evenly.
    """
    if batch_size % mesh.size:
        raise UserError(
            f'A batch of {batch_size} sequences does not divide among {mesh.size} devices; '
            f'change replay.batch_size, or the mesh.'
        )
    return NamedSharding(mesh, P(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that repeats an array on every device."""
    return NamedSharding(mesh, P())


def whole(mesh: Mesh, tree: Any) -> Any:
    """Repeats arrays on every device, inside a compiled function.

    Once for all of an update: left to itself, the compiler gathers parameters inside the scans
    again at every step.
    """
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def split(mesh: Mesh, tree: Any) -> Any:
    """Splits arrays as those of a state are, inside a compiled function.

    What leads up to them stays as it is: split too, its own slices and pads would need exchanges.
    """
    return jax.lax.with_sharding_constraint(whole(mesh, tree), state_sharding(mesh, tree))


def own_device(mesh: Mesh) -> Any:
    """Sharding that places arrays on one device of this process."""
    return replicated(mesh) if mesh.size == 1 else SingleDeviceSharding(mesh.local_devices[0])


def gather(mesh: Mesh, tree: Any) -> Any:
    """Arrays of a state, whole on `own_device`: without a copy where they are there already."""
    if mesh.size == 1:
        return tree
    if mesh.shape['fsdp'] > 1:
        tree = _replicate(mesh)(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    # Between devices: `device_put` would copy each array to the host and from there to all of them.
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def send(batch: Any, sharding: NamedSharding) -> Any:
    """Starts to place rows on the devices; each process has those of its own devices."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: (
            x if isinstance(x, jax.Array) else jax.make_array_from_process_local_data(sharding, x)
        ),
        batch,
    )


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array that are on the devices of this process, as `send` takes them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([shard.data for shard in shards])


def compile_for(function: Callable, *arguments: Any, out_shardings: Any, donate: int) -> Any:
    """Compiles `function` ahead of time; the result cannot recompile, it refuses other shapes.

    Args:
      function: pure; its first `donate` arguments give their buffers to its results.
      *arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      out_shardings: of the results.
      donate: how many arguments to donate.
    """
    # Unused arguments stay: what `plan` reads of the program's memory is of all that is there.
    jitted = jax.jit(
        function, donate_argnums=range(donate), out_shardings=out_shardings, keep_unused=True
    )
    return jitted.lower(*arguments).compile()


def abstract(tree: Any, sharding: Any) -> Any:
    """Shapes of a tree of arrays with one sharding for all of them, or a tree of shardings."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
        tree,
        sharding,
    )
