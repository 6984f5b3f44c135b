"""What an update needs on devices that need not be here; it is compiled for them ahead of time."""

import dataclasses
import importlib.metadata
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies

from dreamerv3_jax import envs, flops, policy, program, sharding, summary
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.errors import UserError, one_line
from dreamerv3_jax.free_space import available_memory
from dreamerv3_jax.settings import override
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.topology import CHIPS, Topology

EFFICIENCY = 0.5  # share of published rates that an update is taken to reach
USABLE = 0.98  # of a device's memory; the system keeps the rest
SIDE, ACTIONS = 64, 17  # of the image and the choices where no environment is named
_SENT = {'all-reduce': 2}  # times its bytes, in a ring; others once
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Figures:
    """One compiled update. Bytes are those of one device, operations those of all."""

    devices: int
    memory: int  # of a device; 0 where nobody says
    parameters: int
    arguments: int  # state and batch
    results: int  # those that do not take the place of arguments
    temporaries: int
    code: int
    beside: int  # the next batch, and parameters to act with
    refused: int  # bytes that the compiler wanted at least, where it did not compile
    flops: int
    products_seconds: float  # at published rates; 0 where there are none
    state_seconds: float
    exchange_seconds: float
    collectives: dict[str, list[int]]  # kind: [number, bytes]
    compile_seconds: float

    @property
    def peak(self) -> int:
        """Bytes in use during an update."""
        parts = self.arguments + self.results + self.temporaries + self.code
        return max(self.refused, self.memory) if self.refused else parts + self.beside

    @property
    def fits(self) -> bool:
        """Whether a device has as much memory."""
        return not self.refused and (not self.memory or self.peak <= USABLE * self.memory)

    @property
    def seconds(self) -> float:
        """Estimated time of an update; 0 where there are no published figures."""
        published = self.products_seconds + self.state_seconds + self.exchange_seconds
        return published / EFFICIENCY


Specs = tuple[Mapping[str, ArraySpec], Mapping[str, ArraySpec]]  # of observation and action


def specs_of(config: ml_collections.ConfigDict) -> Specs:
    """Observation and actions: of the environment, or a picture and a choice where it has no id."""
    if config.env.id:
        with envs.make(config.env, config.seed, restart=False) as env:
            return env.observation_specs, env.action_specs
    side = config.env.image_size or SIDE
    image, choice = ArraySpec('image', (side, side, 3)), ArraySpec('discrete', (1,), (ACTIONS,))
    return {'image': image}, {'action': choice}


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices, or descriptions of them.

    Raises:
      UserError: there are no such ones.
    """
    if topology.kind == 'cpu':
        return jax.devices()[: topology.size]
    bounds = [*topology.shape, 1, 1][:3]
    options = {'chips_per_host_bounds': bounds} if topology.size < 4 else {}
    try:
        described = topologies.get_topology_desc(str(topology), 'tpu', **options)
    except Exception as error:
        reason = one_line(error)[:200].rstrip('.')
        raise UserError(
            f'There is no topology {topology} ({reason}); choose one that is sold, as v5e:2x2, '
            'v5e:4x8, v5p:2x2x1 or v6e:16x16.'
        ) from error
    return list(described.devices)


class Planner:
    """Compiles the update of given settings for given devices."""

    def __init__(self, config: ml_collections.ConfigDict, topology: Topology) -> None:
        """Looks at the environment and makes the agent; nothing is compiled yet.

        Raises:
          UserError: the environment, the devices, the mesh or the batch does not go.
        """
        self.topology = topology
        self.config = config.copy_and_resolve_references()
        self.specs = specs_of(config)
        self._devices = devices_of(topology)
        self.agent = self._make_agent(self.config)
        self.config.agent.compute_dtype = self.agent.config.compute_dtype

    def _make_agent(self, config: ml_collections.ConfigDict) -> Agent:
        mesh, _ = sharding.arrange(config.mesh, config.replay.batch_size, self._devices)
        sharding.batch_sharding(mesh, config.replay.batch_size)
        return Agent(*self.specs, AgentConfig.from_mapping(config.agent.to_dict()), mesh)

    def measure(self, changes: Mapping[str, str] | None = None) -> Figures:
        """Compiles the update, which may take minutes.

        Args:
          changes: settings to change before, as text by name.

        Raises:
          UserError: the devices, the mesh or the batch does not go.
        """
        config = self.config.copy_and_resolve_references()
        for key, text in (changes or {}).items():
            override(config, key, text)
        agent, start = self._make_agent(config), time.monotonic()
        size, length = config.replay.batch_size, config.replay.batch_length
        programs: tuple[Any, ...] = ()
        refused = 0
        try:
            programs = agent.compile_update(size, length)
        except jax.errors.JaxRuntimeError as error:
            refused = _wanted(str(error))
            if not refused:
                raise
        seconds = time.monotonic() - start
        rows = size // agent.mesh.size
        products = _products(self.specs, config, rows, self._devices[0])
        chip = CHIPS.get(self.topology.kind)
        counts: Counter[str] = Counter()
        amounts: Counter[str] = Counter()
        for compiled in programs:
            for collective in program.collectives(compiled.as_text()):
                counts[collective.kind] += collective.times
                amounts[collective.kind] += collective.times * collective.bytes
        stats = [compiled.memory_analysis() for compiled in programs]
        arguments = stats[0].argument_size_in_bytes if stats else 0
        results = sum(each.output_size_in_bytes - each.alias_size_in_bytes for each in stats)
        sent = sum(_SENT.get(kind, 1) * amount for kind, amount in amounts.items())
        return Figures(
            devices=agent.mesh.size,
            memory=self._memory(agent.mesh.size),
            parameters=sum(agent.parameter_counts().values()),
            arguments=arguments,
            results=results,
            temporaries=max((each.temp_size_in_bytes for each in stats), default=0),
            code=sum(each.generated_code_size_in_bytes for each in stats),
            beside=_beside(agent, rows, length),
            refused=refused,
            flops=agent.mesh.size * sum(x.flops * x.times for x in products),
            products_seconds=sum(
                x.times * max(x.flops / chip.flops, x.bytes / chip.bandwidth) for x in products
            )
            if chip
            else 0.0,
            state_seconds=2 * arguments / chip.bandwidth if chip else 0.0,
            exchange_seconds=sent / chip.links if chip else 0.0,
            collectives={kind: [counts[kind], amounts[kind]] for kind in sorted(counts)},
            compile_seconds=round(seconds, 1),
        )

    def _memory(self, devices: int) -> int:
        if self.topology.kind == 'cpu':  # the devices are cores, which share one memory
            return (available_memory() or 0) // devices
        return int(CHIPS[self.topology.kind].memory)

    def alternatives(self) -> Iterator[dict[str, str]]:
        """Settings that take less memory, the nearest first, each with those before it.

        Remat, then a wider fsdp, then bfloat16 unless on CPUs, then smaller batches.
        """
        config, count = self.config, self.agent.mesh.size
        changes = {}
        if not config.agent.remat:
            changes['agent.remat'] = 'true'
            yield dict(changes)
        for fsdp in range(config.mesh.fsdp + 1, count + 1):
            if count % fsdp == 0:
                changes['mesh.fsdp'] = str(fsdp)
                if config.mesh.data != -1:
                    changes['mesh.data'] = str(count // fsdp)
                yield dict(changes)
        if config.agent.compute_dtype == 'float32' and self.topology.kind != 'cpu':
            changes['agent.compute_dtype'] = 'bfloat16'
            yield dict(changes)
        size = config.replay.batch_size
        while size % (2 * count) == 0:
            size //= 2
            changes['replay.batch_size'] = str(size)
            yield dict(changes)


def _wanted(message: str) -> int:
    """Bytes that a compiler wanted, from its message, or 1; 0 if that is about something else."""
    if 'RESOURCE_EXHAUSTED' not in message:
        return 0
    found = re.search(r'(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds) ', message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 1


def _products(
    specs: Specs, config: ml_collections.ConfigDict, rows: int, device: jax.Device
) -> list[flops.Product]:
    """Products of one device of this kind, whose part of the batch has this many sequences."""
    mesh = sharding.make_mesh(data=1, devices=[device])
    agent = Agent(*specs, AgentConfig.from_mapping(config.agent.to_dict()), mesh)
    state = jax.eval_shape(lambda: agent.init(0))
    batch = agent.blank_batch(rows, config.replay.batch_length)
    return flops.products(agent.pure_update, state, batch)


def _beside(agent: Agent, rows: int, length: int) -> int:
    """Bytes on the device that acts, beside the update: see `Agent.acting_params` and `send`."""
    batch = sum(x.nbytes for x in jax.tree.leaves(agent.blank_batch(rows, length)))
    if agent.mesh.shape['fsdp'] == 1:
        return batch
    counts = agent.parameter_counts()
    return batch + 4 * sum(counts[name] for name in policy.NETWORKS)


def report(
    config: ml_collections.ConfigDict, topology: Topology, show: Callable[[str], None]
) -> None:
    """Compiles the update and tells what it needs, and what would fit if it does not.

    Args:
      config: all settings.
      topology: the devices.
      show: called with each line, as soon as it is known.

    Raises:
      UserError: the environment, the devices, the mesh or the batch does not go.
    """
    planner = Planner(config, topology)
    _show_rows(_before(planner), show)
    show(_row('compiling', 'for these devices; this takes minutes for the larger sizes'))
    figures = planner.measure()
    _show_rows(_after(planner.config, figures, topology), show)
    if figures.fits:
        return
    for changes in planner.alternatives():
        flags = ' '.join(f'--config.{key}={text}' for key, text in changes.items())
        show(_row('trying', flags))
        figures = planner.measure(changes)
        if figures.fits:
            show(_row('nearest', f'{flags}: {memory(figures)}'))
            return
    show(_row('nearest', 'none with these devices: choose more of them or a smaller size'))


def _row(name: str, text: str) -> str:
    return f'{name:12} {text}'


def _show_rows(rows: Mapping[str, str], show: Callable[[str], None]) -> None:
    for name, text in rows.items():
        show(_row(name, text))


def _before(planner: Planner) -> dict[str, str]:
    """What is known before compiling."""
    config, rows = planner.config, summary.agent_rows(planner.config, planner.agent)
    return {
        'devices': f'{planner.topology}, mesh {rows["mesh"]}',
        'observation': rows['observation'],
        'action': rows['action'],
        'parameters': rows['parameters'],
        'update': f'{config.replay.batch_size} sequences of {config.replay.batch_length} steps, '
        f'{config.agent.compute_dtype}, ' + ('remat' if config.agent.remat else 'no remat'),
        'replay': f'{rows["replay"]}, of all hosts together',
    }


def memory(figures: Figures) -> str:
    """The memory of a device that is in use, and all of it."""
    return f'{gib(figures.peak)} of {gib(figures.memory)} GiB on a device'


def gib(count: float) -> str:
    """Bytes as a number of GiB."""
    return f'{count / 2**30:.3g}'


def _after(
    config: ml_collections.ConfigDict, figures: Figures, topology: Topology
) -> dict[str, str]:
    """What a compiled program tells."""
    rows = {}
    if figures.refused:
        rows['memory'] = 'refused by the compiler, which wants at least what follows'
    else:
        rows['memory'] = (
            f'arguments {gib(figures.arguments)} + results {gib(figures.results)} + '
            f'temporaries {gib(figures.temporaries)} + program {gib(figures.code)} + '
            f'next batch and acting {gib(figures.beside)} GiB'
        )
    if figures.memory:
        rows['fits'] = f'{"yes" if figures.fits else "no"}: {memory(figures)}'
        if topology.kind == 'cpu' and not config.replay.on_disk:
            rows['fits'] += ', beside the replay'
    each = figures.flops / figures.devices
    rows['operations'] = f'{figures.flops / 1e12:.4g} TFLOP, {each / 1e12:.4g} on each device'
    if not figures.refused:
        exchanged = [
            f'{count} {kind} of {amount / 1e6:,.2f} MB'
            for kind, (count, amount) in figures.collectives.items()
        ]
        rows['exchanged'] = ', '.join(exchanged) or 'nothing'
        rows |= _times(config, figures, topology)
    version = importlib.metadata.version('jax')
    rows['compiled'] = f'in {figures.compile_seconds:.0f} s with jax {version}'
    return rows


def _times(
    config: ml_collections.ConfigDict, figures: Figures, topology: Topology
) -> dict[str, str]:
    replay = config.replay
    per_update = replay.batch_size * replay.batch_length / replay.train_ratio
    every = f'one update every {per_update:g} (train ratio {replay.train_ratio:g})'
    chip = CHIPS.get(topology.kind)
    if chip is None:
        return {'time': 'not estimated, as CPUs have no published peak', 'steps': every}
    parts = {
        'products': figures.products_seconds,
        'parameters and optimiser': figures.state_seconds,
        'exchanges': figures.exchange_seconds,
    }
    seconds = figures.seconds
    return {
        'time': f'{1e3 * seconds:.3g} ms, estimated, and more where operations are small: '
        + ', '.join(f'{name} {1e3 * part / EFFICIENCY:.3g}' for name, part in parts.items()),
        'assuming': f'{EFFICIENCY:.0%} of the published {chip.flops / 1e12:g} TFLOP/s, '
        f'{chip.bandwidth / 1e9:g} GB/s of memory, {chip.links / 1e9:g} GB/s to other chips',
        'steps': f'{per_update / seconds:,.0f} agent steps per second keep it busy: {every}',
    }
