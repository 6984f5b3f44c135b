"""The training loop: step the environments, act, store, train when it is due, log, checkpoint."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dreamerv3_jax import checkpoint, envs, run_folder, sharding, steps
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.interrupts import Interrupted, Interrupts
from dreamerv3_jax.metrics import MetricWriter
from dreamerv3_jax.progress import ProgressLine, Timer
from dreamerv3_jax.replay import Replay, bytes_per_step, check_memory
from dreamerv3_jax.train_ratio import TrainRatio
from dreamerv3_jax.types import Metrics, StoredLatent

MOST_SKIPPED = 10  # updates in a row
COUNTERS = (
    'ticks', 'steps', 'frames', 'episodes', 'updates', 'skipped', 'skipped_in_a_row', 'restarts',
)  # fmt: skip


def train(config: ml_collections.ConfigDict, logdir: Path | str, preset: str = 'none') -> None:
    """Trains until `config.run.steps` environment frames, or goes on with the run in `logdir`.

    Args:
      config: all settings, see `configs/base.py`.
      logdir: folder of the run.
      preset: name of the configuration, for the log.

    Raises:
      UserError: a setting, the environment or the folder does not allow the run.
    """
    try:
        with Trainer(config, Path(logdir), preset) as trainer:
            trainer.run()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise UserError(
            f'The memory of the {jax.devices()[0].device_kind} is too small for {config.size}; '
            f'choose a smaller size, as in --config={preset}:size12m, or spread it over more '
            'devices with --config.mesh.fsdp.'
        ) from error


class Trainer:
    """One run. `tick` is one step of all environments with everything that follows from it."""

    def __init__(self, config: ml_collections.ConfigDict, logdir: Path, preset: str) -> None:
        """Builds everything, restores the newest checkpoint and prints what the run will be."""
        self._config, self._logdir = config, logdir
        self._progress = ProgressLine(config.run.steps)
        with contextlib.ExitStack() as self._opened:  # closes everything if the rest of it fails
            self._build(preset)
            self._opened = self._opened.pop_all()
        self._timer = Timer()
        self._interrupts = Interrupts(
            lambda: self._progress.message('Stopping after this update, to save a checkpoint ...')
        )
        self._pending: tuple[Any, StoredLatent, Metrics] | None = None  # an update in flight
        self._metrics: list[Metrics] = []  # of updates not yet logged
        self._returns = np.zeros(self._env.num_envs)
        self._lengths = np.zeros(self._env.num_envs, np.int64)
        self._policy_state = self._agent.initial_policy_state(self._env.num_envs)
        self._records: envs.Records | None = None
        self._acting_params: Any = None  # until the next update

    def __enter__(self) -> 'Trainer':
        return self

    def __exit__(self, *_: object) -> None:
        self._show_messages()
        self._opened.close()

    def _build(self, preset: str) -> None:
        config, logdir, opened = self._config, self._logdir, self._opened
        data, fsdp = config.mesh.data, config.mesh.fsdp
        devices = sharding.devices_for(config.replay.batch_size, fsdp) if data == -1 else None
        mesh = sharding.make_mesh(data, fsdp, devices)
        # A new folder is not made before all else is known to be right.
        lock = run_folder.Lock(logdir) if logdir.exists() else None
        if lock:
            opened.callback(lock.close)
        resumed = checkpoint.latest_step(logdir / 'checkpoints')
        if resumed is None:
            run_folder.check_nothing_lost(logdir)
        else:
            run_folder.check(logdir, config)
        self._make_env(resumed or 0)
        observation_specs, action_specs = self._env.observation_specs, self._env.action_specs
        if resumed is not None:
            run_folder.check_spaces(logdir, observation_specs, action_specs)
        self._agent = Agent(observation_specs, action_specs, config.agent, mesh)
        specs = steps.replay_specs(self._agent)
        directory = logdir / 'replay' if config.replay.on_disk else None
        check_memory(specs, config.replay.capacity, directory)
        sharding.batch_sharding(mesh, config.replay.batch_size)
        lock = run_folder.create(logdir, config, observation_specs, action_specs, lock)
        opened.callback(lock.close)
        self._replay = Replay(
            specs,
            capacity=config.replay.capacity,
            streams=self._env.num_envs,
            batch_size=config.replay.batch_size,
            batch_length=config.replay.batch_length,
            online=config.replay.online,
            seed=config.seed,
            directory=directory,
        )
        self._ratio = TrainRatio(
            config.replay.train_ratio, config.replay.batch_size * config.replay.batch_length
        )
        self._describe(preset, bytes_per_step(specs))
        self._state = self._agent.init(config.seed)
        self._checkpointer = opened.enter_context(
            contextlib.closing(checkpoint.Checkpointer(logdir / 'checkpoints'))
        )
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        if resumed is not None:
            self._restore()
            if self.counters['ticks'] != resumed:  # a damaged checkpoint was passed over
                self._env.close()
                self._make_env(self.counters['ticks'])
        self._progress.episodes = self.counters['episodes']
        self._writer = opened.enter_context(
            contextlib.closing(MetricWriter(logdir, resume_step=self.counters['frames']))
        )
        opened.callback(self._progress.close)
        self._show_messages()
        if resumed is not None:
            self._progress.message(
                f'Going on at {self.counters["frames"]:,} frames and '
                f'{self.counters["updates"]:,} updates; the environments start new episodes.'
            )

    def _make_env(self, start: int) -> None:
        # Each start seeds its environments anew, or it would play the first episodes once more.
        seed = run_folder.derived_seed(self._config.seed, start)
        self._env = self._opened.enter_context(envs.make(self._config.env, seed))

    def _restore(self) -> None:
        saved = self._checkpointer.restore(checkpoint.abstract_state(self._state))
        counters = self.counters | saved.counters
        ratio = counters.pop('ratio')
        self._state, self.counters = saved.state, counters
        if saved.replay is not None:  # else the count starts anew when there is a batch again
            self._replay.load_state(saved.replay)
            self._ratio.load_state(ratio)

    def run(self) -> None:
        """Ticks until the run is complete; saves at intervals and at the end.

        Raises:
          KeyboardInterrupt: after Ctrl-C, once the run is saved or it was told why it cannot be.
          SystemExit: likewise with code 143, after SIGTERM, which machines send before they go.
        """
        run = self._config.run
        if self.counters['frames'] >= run.steps:
            self._progress.message(
                'The run is complete; go on with --config.run.steps above '
                f'{self.counters["frames"]}.'
            )
            return
        started = time.monotonic()
        self._progress.message('Compiling the update ...')
        self._agent.compile_update(self._config.replay.batch_size, self._config.replay.batch_length)
        self._progress.message(f'Compiled in {time.monotonic() - started:.0f} s.')
        self._timer.restart()
        logged = saved = time.monotonic()
        with self._interrupts.collected():
            while self.counters['frames'] < run.steps and not self._interrupts.received:
                try:
                    self.tick()
                except (UserError, Interrupted) as error:
                    if not self._interrupts.explain(error):
                        raise
                    break
                now = time.monotonic()
                self._progress.update(
                    self.counters['frames'], self.counters['updates'], self._timer.shares()
                )
                if now - logged >= run.log_every:
                    self.log()
                    logged = now
                if now - saved >= run.checkpoint_every:
                    with self._timer.section('checkpoint'):
                        self._try_to_save()
                    saved = now
            self.log(final=True)
            try:
                self.save()
            except UserError as error:
                if not self._interrupts.received:
                    raise
                self._progress.message(str(error))
        self._progress.close()
        if self._interrupts.received:
            raise self._interrupts.exception()
        self._progress.message(f'Done. Evaluate with: dreamerv3-jax evaluate {self._logdir}')

    def tick(self) -> None:
        """One observation and one action of every environment, and the updates that are due."""
        if self._records is None:
            self._train()  # what was due when the run was stopped, before anything new
            with self._timer.section('env'), self._interrupts.raised():
                self._records = self._env.reset()
        records = self._records
        with self._timer.section('update'):
            jax.block_until_ready(self._state.updates)
        with self._timer.section('policy'):
            if self._acting_params is None:
                self._acting_params = self._agent.acting_params(self._state)
            self._policy_state, actions, latent = self._agent.policy(
                self._acting_params,
                self._policy_state,
                records.observation,
                records.is_first,
                seed=(self._config.seed, self.counters['ticks']),
            )
            actions, latent = jax.device_get((actions, latent))
        with self._timer.section('replay'):
            self._replay.add(steps.replay_step(records, actions, latent._asdict()))
        self.counters['ticks'] += 1
        self.counters['steps'] += int(np.sum(~records.is_last))
        self.counters['frames'] = self.counters['steps'] * self._config.env.repeat
        self._train()
        # The last update of this tick is still being computed while the environments step.
        with self._timer.section('env'), self._interrupts.raised():
            self._records, finals = self._env.step(actions)
        if finals is not None:
            with self._timer.section('replay'):
                self._replay.add(steps.final_step(finals.records, self._agent), finals.streams)
            self._count_episodes(finals.streams, finals.records)
        self._show_messages()
        self._count_episodes(np.arange(self._env.num_envs), self._records)

    def _show_messages(self) -> None:
        """Shows what there is to say, and counts the environments that were built again."""
        for messages in (self._env.messages, self._writer.messages):
            for message in messages:
                self._progress.message(message)
            messages.clear()
        self.counters['restarts'] += self._env.pop_restarts()

    def _train(self) -> None:
        """Makes the updates that are due; those after an interrupt are due when the run goes on."""
        if self._replay.can_sample:
            due = self._ratio.due(self.counters['steps'])
            while due and not self._interrupts.received:
                self._update()
                due -= 1
            self._ratio.give_back(due)

    def _update(self) -> None:
        with self._timer.section('update'):
            self._finish_update()
        with self._timer.section('replay'):
            sampled, index = self._replay.sample()
        with self._timer.section('update'):
            self._state, latents, metrics = self._agent.update(self._state, steps.to_batch(sampled))
        self._acting_params = None
        self._pending = (index, latents, metrics)
        self._metrics.append(metrics)
        self.counters['updates'] += 1

    def _finish_update(self) -> None:
        """Waits for the update in flight, and writes its latents to the replay.

        Raises:
          UserError: too many updates in a row were skipped.
        """
        if self._pending is None:
            return
        index, latents, metrics = self._pending
        self._pending = None
        if metrics['optimizer/skipped']:
            self._count_skipped(jax.device_get(metrics))
            return
        self.counters['skipped_in_a_row'] = 0
        self._replay.update_latents(index, np.asarray(latents.deter), np.asarray(latents.stoch))

    def _count_skipped(self, metrics: Mapping[str, Any]) -> None:
        self.counters['skipped'] += 1
        self.counters['skipped_in_a_row'] += 1
        losses = [name for name in metrics if name.startswith('loss/') and name != 'loss/total']
        names = [name for name in losses if not np.isfinite(metrics[name])] or ['the gradient']
        what = f'{", ".join(names)} {"are" if len(names) > 1 else "is"} not finite'
        if self.counters['skipped_in_a_row'] >= MOST_SKIPPED:
            raise UserError(
                f'{MOST_SKIPPED} updates in a row were skipped, as {what}; look for numbers of '
                'extreme size in what the environment returns. The last checkpoint is kept.'
            )
        if self.counters['skipped_in_a_row'] == 1:
            self._progress.message(
                f'Update {self.counters["updates"]:,} is skipped, as {what}; nothing has changed.'
            )

    def _count_episodes(self, streams: np.ndarray, records: envs.Records) -> None:
        first = streams[records.is_first]
        self._returns[first], self._lengths[first] = 0.0, -1
        self._returns[streams] += records.reward
        self._lengths[streams] += 1
        for stream in streams[records.is_last]:
            self.counters['episodes'] += 1
            self._progress.add_episode(float(self._returns[stream]))
            self._writer.add_episode(float(self._returns[stream]), int(self._lengths[stream]))

    def log(self, *, final: bool = False) -> None:
        """Writes the means since the last call, without waiting for the update in flight."""
        done = self._metrics if final else self._metrics[:-1]
        for metrics in jax.device_get(done):
            skipped = {'optimizer/skipped': metrics['optimizer/skipped']}
            self._writer.add(skipped if metrics['optimizer/skipped'] else metrics, 'train/')
        self._metrics = self._metrics[len(done) :]
        self._writer.add(self._env.pop_logs(), 'episode/')
        self._writer.add(self._timer.shares(), 'time/')
        names = ('episodes', 'updates', 'skipped', 'restarts')
        self._writer.add({name: self.counters[name] for name in names}, 'count/')
        self._writer.write(self.counters['frames'])
        self._timer.restart()

    def _try_to_save(self) -> None:
        try:
            self.save()
        except checkpoint.NotSaved as error:
            self._progress.message(
                f'{str(error).rstrip(".")}. Training goes on; the next attempt is in '
                f'{self._config.run.checkpoint_every:g} seconds.'
            )

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
          NotSaved: the disk is full, or it cannot be written for another reason.
          UserError: too many updates in a row were skipped.
        """
        self._finish_update()
        replay = self._replay.state() if self._config.run.checkpoint_replay else None
        counters = {**self.counters, 'ratio': self._ratio.state()}
        self._checkpointer.save(
            self.counters['ticks'], checkpoint.Saved(self._state, replay, counters)
        )

    def _describe(self, preset: str, step_bytes: int) -> None:
        config, agent = self._config, self._agent
        observations, actions = agent.observation_specs, agent.action_specs
        counts = agent.parameter_counts()
        devices = jax.devices()
        per_update = (
            config.replay.batch_size * config.replay.batch_length / config.replay.train_ratio
        )
        memory = step_bytes * config.replay.capacity / 1e9
        rows = {
            'run': f'{self._logdir} (preset {preset}, seed {config.seed})',
            'environment': f'{config.env.id}, {self._env.num_envs} in parallel, '
            f'repeat {config.env.repeat}',
            'observation': ', '.join(f'{name}: {spec}' for name, spec in observations.items()),
            'action': ', '.join(f'{name}: {spec}' for name, spec in actions.items()),
            'parameters': f'{sum(counts.values()):,} ({config.size}): '
            + ', '.join(f'{name.strip("_")} {count:,}' for name, count in counts.items()),
            'devices': f'{len(devices)} {devices[0].platform} ({devices[0].device_kind}), '
            f'mesh data={agent.mesh.shape["data"]} fsdp={agent.mesh.shape["fsdp"]}',
            'replay': f'{config.replay.capacity:,} steps x {step_bytes:,} bytes = {memory:.2f} GB '
            + ('on disk' if config.replay.on_disk else 'of memory'),
            'training': f'one update every {per_update:g} steps '
            f'(train ratio {config.replay.train_ratio:g}), until {config.run.steps:,} frames',
        }
        for name, text in rows.items():
            self._progress.message(f'{name:12} {text}')
