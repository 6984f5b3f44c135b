"""The training loop: step the environments, act, store, train when it is due, log, checkpoint."""

import contextlib
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np

from dreamerv3_jax import agreement, checkpoint, envs, hosts, run_folder, sharding, steps, summary
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.agreement import Told
from dreamerv3_jax.errors import Failure, UserError, readable_device_errors
from dreamerv3_jax.interrupts import Interrupted, Interrupts
from dreamerv3_jax.learner import Learner
from dreamerv3_jax.metrics import Means, MetricWriter
from dreamerv3_jax.progress import ProgressLine, Timer
from dreamerv3_jax.replay import Replay, check_memory
from dreamerv3_jax.settings import validate
from dreamerv3_jax.train_ratio import TrainRatio

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
      Failure: the run cannot go on.
    """
    validate(config)
    hosts.connect(config.hosts)
    with (
        hosts.together(),
        readable_device_errors(
            'for these networks, or another process holds it; choose a smaller --config.size, a '
            'wider --config.mesh.fsdp, or --config.agent.remat, which makes updates slower.'
        ),
        Trainer(config, Path(logdir), preset) as trainer,
    ):
        trainer.run()


class Trainer:
    """One run. `tick` is one step of all environments with everything that follows from it."""

    def __init__(self, config: ml_collections.ConfigDict, logdir: Path, preset: str) -> None:
        """Builds everything, restores the newest checkpoint and prints what the run will be."""
        self._config, self._logdir = config, logdir
        # What follows from the seed by chance differs between hosts; the agent is the same.
        own = run_folder.derived_seed(config.seed, 2**31 + hosts.index())
        self._seed = own if hosts.index() else config.seed
        self._progress = ProgressLine(config.run.steps, quiet=hosts.index() > 0)
        self._timer = Timer()
        self._interrupts = Interrupts(
            lambda: self._progress.message('Stopping after this update, to save a checkpoint ...')
        )
        self._records: envs.Records | None = None
        self._told = Told()
        self._episodes = self._restarts = 0  # since then, here
        self._logged = self._saved = time.monotonic()
        with contextlib.ExitStack() as self._opened:  # closes everything if the rest of it fails
            self._build(preset)
            self._opened = self._opened.pop_all()
        self._returns = np.zeros(self._env.num_envs)
        self._lengths = np.zeros(self._env.num_envs, np.int64)
        self._policy_state = self._agent.initial_policy_state(self._env.num_envs)

    def __enter__(self) -> 'Trainer':
        return self

    def __exit__(self, *_: object) -> None:
        self._show_messages()
        self._opened.close()

    def _build(self, preset: str) -> None:
        config, logdir, opened = self._config, self._logdir, self._opened
        run_folder.check_hosts(config)
        hosts.share_programs_or_keep_none()
        mesh, acting = sharding.arrange(config.mesh, config.replay.batch_size)
        sequences = hosts.share(config.replay.batch_size, 'replay.batch_size')
        hosts.share(config.env.num_envs, 'env.num_envs')
        resumed = hosts.first(self._look_into_folder)
        self._make_env(resumed or 0)
        observation_specs, action_specs = self._env.observation_specs, self._env.action_specs
        if resumed is not None:
            hosts.first(lambda: run_folder.check_spaces(logdir, observation_specs, action_specs))
        self._agent = Agent(observation_specs, action_specs, config.agent, mesh, acting)
        specs, capacity = steps.replay_specs(self._agent), config.replay.capacity // hosts.count()
        folder = logdir / 'replay' if config.replay.on_disk else None
        nodes = hosts.gather(platform.node())
        share = 1.0 if folder else nodes.count(platform.node()) / len(nodes)  # of disk, or memory
        check_memory(specs, config.replay.capacity, folder, share, resumed=resumed is not None)
        sharding.batch_sharding(mesh, config.replay.batch_size)
        hosts.first(self._create_folder)
        run_folder.check_shared(logdir)
        self._replay = Replay(
            specs,
            capacity=capacity,
            streams=self._env.num_envs,
            batch_size=sequences,
            batch_length=config.replay.batch_length,
            online=config.replay.online,
            seed=self._seed,
            directory=run_folder.own_rings(logdir / 'replay', on_disk=config.replay.on_disk),
        )
        for line in summary.lines(config, logdir, preset, self._agent):
            self._say(line)
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        batch_steps = config.replay.batch_size * config.replay.batch_length
        self._learner = Learner(
            self._agent,
            self._agent.init(config.seed),
            self._replay,
            TrainRatio(config.replay.train_ratio, batch_steps),
            counters=self.counters,
            timer=self._timer,
            say=self._say,
        )
        checkpointer = checkpoint.Checkpointer(logdir / 'checkpoints')
        self._checkpointer = opened.enter_context(contextlib.closing(checkpointer))
        if resumed is not None:
            shapes = checkpoint.abstract_state(self._learner.state)
            self._learner.restore(self._checkpointer.restore(shapes))
            if self.counters['ticks'] != resumed:  # a damaged checkpoint was passed over
                self._env.close()
                self._make_env(self.counters['ticks'])
        self._progress.episodes = self.counters['episodes']
        self._writer = Means() if hosts.index() else self._open_metrics(anew=resumed is None)
        opened.callback(self._progress.close)
        self._show_messages()
        if resumed is not None:
            done = f'{self.counters["frames"]:,} frames and {self.counters["updates"]:,} updates'
            self._say(f'Going on at {done}; the environments start new episodes.')

    def _look_into_folder(self) -> int | None:
        """Locks the folder, if it is there, and returns the step of its newest checkpoint."""
        # A new folder is not made before all else is known to be right.
        self._lock = run_folder.Lock(self._logdir) if self._logdir.exists() else None
        if self._lock:
            self._opened.callback(self._lock.close)
        resumed = checkpoint.latest_step(self._logdir / 'checkpoints')
        if resumed is None:
            run_folder.check_nothing_lost(self._logdir)
        else:
            run_folder.check(self._logdir, self._config)
        return resumed

    def _create_folder(self) -> None:
        specs = (self._agent.observation_specs, self._agent.action_specs)
        self._lock = run_folder.create(self._logdir, self._config, *specs, lock=self._lock)
        self._opened.callback(self._lock.close)

    def _open_metrics(self, *, anew: bool) -> MetricWriter:
        writer = MetricWriter(self._logdir, resume_step=self.counters['frames'], anew=anew)
        return self._opened.enter_context(contextlib.closing(writer))

    def _say(self, text: str) -> None:
        """Says what all hosts know, once."""
        if hosts.index() == 0:
            self._progress.message(text)

    def _make_env(self, start: int) -> None:
        # Each start seeds its environments anew, or it would play the first episodes once more.
        seed = run_folder.derived_seed(self._config.seed, start)
        part = (hosts.index(), hosts.count())
        self._env = self._opened.enter_context(envs.make(self._config.env, seed, part=part))

    def run(self) -> None:
        """Ticks until the run is complete; saves at intervals and at the end.

        Raises:
          KeyboardInterrupt: after Ctrl-C, once the run is saved or it was told why it cannot be.
          SystemExit: likewise with code 143, after SIGTERM, which machines send before they go.
        """
        run = self._config.run
        if self.counters['frames'] >= run.steps:
            self._say(
                'The run is complete; go on with --config.run.steps above '
                f'{self.counters["frames"]}.'
            )
            return
        started = time.monotonic()
        self._say('Compiling the update ...')
        self._agent.compile_update(self._config.replay.batch_size, self._config.replay.batch_length)
        self._say(f'Compiled in {time.monotonic() - started:.0f} s.')
        self._timer.restart()
        self._logged = self._saved = time.monotonic()
        with self._interrupts.collected():
            while self.counters['frames'] < run.steps:
                try:
                    self.tick()
                except (UserError, Interrupted) as error:
                    if self._told.failed or not self._interrupts.explain(error):
                        if hosts.count() == 1:
                            self.log()  # what led to it
                        raise
                    break
                self._progress.update(
                    self.counters['frames'], self.counters['updates'], self._timer.shares()
                )
                if self._stopped():  # where a tick was cut short on one host, all come here
                    break
                if self._told.log or self._told.save:  # what a checkpoint counts is never lost
                    self.log(final=bool(self._told.save))
                if self._told.save:
                    with self._timer.section('checkpoint'):
                        self._try_to_save()
            try:
                self.log(final=True)
                self._save_last()
            except UserError as error:
                if not self._interrupts.received or hosts.count() > 1:
                    raise
                self._progress.message(str(error))
        self._progress.close()
        if self._interrupts.received:
            raise hosts.agreed(self._interrupts.exception())
        self._say(f'Done. Evaluate with: dreamerv3-jax evaluate {self._logdir}')

    def tick(self) -> None:
        """One observation and one action of every environment, and the updates that are due."""
        if self._records is None:
            self._agree()
            self._train()  # what was due when the run was stopped, before anything new
            with self._environments():
                self._records = self._env.reset()
            self._agree()
            if self._stopped():  # one host may have been told to while it waited
                return
        records = self._records
        assert records is not None
        with self._timer.section('update'):
            self._learner.wait()
        with self._timer.section('policy'):
            self._policy_state, actions, latent = self._agent.policy(
                self._learner.acting_params,
                self._policy_state,
                records.observation,
                records.is_first,
                seed=(self._seed, self.counters['ticks']),
            )
        self.counters['ticks'] += 1
        self.counters['steps'] += self._told.steps
        self.counters['frames'] = self.counters['steps'] * self._config.env.repeat
        # Devices of one host have their next work before it looks at what they chose.
        self._learner.begin(self.counters['steps'], self._stopped)
        with self._timer.section('policy'):
            actions, latent = jax.device_get((actions, latent))
        # From here on the environments step, if in processes of their own; updates go on meanwhile.
        with self._timer.section('env'):
            self._env.start(actions)
        with self._timer.section('replay'):
            self._replay.add(steps.replay_step(records, actions, latent._asdict()))
        self._train()
        with self._environments():
            self._records, finals = self._env.finish()
        if finals is not None:
            with self._timer.section('replay'):
                self._replay.add(steps.final_step(finals.records, self._agent), finals.streams)
            self._count_episodes(finals.streams, finals.records)
        self._show_messages()
        self._count_episodes(np.arange(self._env.num_envs), self._records)
        self._agree()

    @contextlib.contextmanager
    def _environments(self) -> Iterator[None]:
        """Waits for the environments; if that ends in an error, the other hosts hear of it."""
        try:
            with self._timer.section('env'), self._interrupts.raised():
                yield
        except (UserError, Interrupted) as error:
            if hosts.count() > 1:
                self._records = None
                self._agree(failed=not self._interrupts.explain(error))
                hosts.agreed(error)
            raise

    def _agree(self, *, failed: bool = False) -> None:
        """Tells the other hosts what they have to know, and hears it from them.

        Raises:
          Failure: another host cannot go on.
        """
        now, run, received = time.monotonic(), self._config.run, self._interrupts.received
        self._told = agreement.agree(
            Told(
                steps=0 if self._records is None else int(np.sum(~self._records.is_last)),
                ready=self._replay.can_sample,
                episodes=self._episodes,
                restarts=self._restarts,
                signal=received[0] if received else 0,
                failed=failed,
                log=now - self._logged >= run.log_every,
                save=now - self._saved >= run.checkpoint_every,
            )
        )
        self._episodes = self._restarts = 0
        self.counters['episodes'] += self._told.episodes
        self.counters['restarts'] += self._told.restarts
        self._progress.episodes = self.counters['episodes']
        if self._told.signal and not received:
            received.append(self._told.signal)
            self._say('Another host was told to stop; stopping to save a checkpoint ...')
        if self._told.failed and not failed:
            raise hosts.agreed(Failure('Another host cannot go on, and says why.'))

    def _stopped(self) -> bool:
        """Whether a signal came; of many hosts all stop, once all have heard of it."""
        return bool(self._interrupts.received if hosts.count() == 1 else self._told.signal)

    def _train(self) -> None:
        if self._replay.can_sample if hosts.count() == 1 else self._told.ready:
            self._learner.train(self.counters['steps'], self._stopped)

    def _show_messages(self) -> None:
        """Shows what there is to say, and counts the environments that were built again."""
        for messages in (self._env.messages, self._writer.messages):
            for message in messages:
                self._progress.message(message)
            messages.clear()
        self._restarts += self._env.pop_restarts()

    def _count_episodes(self, streams: np.ndarray, records: envs.Records) -> None:
        first = streams[records.is_first]
        self._returns[first], self._lengths[first] = 0.0, -1
        self._returns[streams] += records.reward
        self._lengths[streams] += 1
        for stream in streams[records.is_last]:
            self._episodes += 1
            self._progress.add_episode(float(self._returns[stream]))
            self._writer.add_episode(float(self._returns[stream]), int(self._lengths[stream]))

    def log(self, *, final: bool = False) -> None:
        """Writes the means since the last call; waits for the update in flight only if final."""
        if final:
            try:
                self._learner.finish()
            except Failure:  # what led to it is written, too
                self.log()
                raise
        self._logged = time.monotonic()
        measured = self._learner.take_metrics()
        self._writer.put({f'episode/{name}': x for name, x in self._env.logs.take().items()})
        everywhere = hosts.gather(self._writer.take())
        if isinstance(self._writer, MetricWriter):
            for taken in (measured, *everywhere):
                self._writer.put(taken)
            self._writer.add(self._timer.shares(), 'time/')
            names = ('episodes', 'updates', 'skipped', 'restarts')
            self._writer.add({name: self.counters[name] for name in names}, 'count/')
            self._writer.write(self.counters['frames'])
        self._timer.restart()

    def _try_to_save(self) -> None:
        try:
            self.save()
        except checkpoint.NotSaved as error:
            if hosts.count() > 1:  # the others may have saved
                raise
            self._saved = time.monotonic()
            self._progress.message(
                f'{str(error).rstrip(".")}. Training goes on; the next attempt is in '
                f'{self._config.run.checkpoint_every:g} seconds.'
            )

    def _save_last(self) -> None:
        """Saves a complete run without its replay if that does not fit: better than no agent."""
        try:
            self.save()
        except checkpoint.NotSaved as error:
            held = self._config.run.checkpoint_replay
            if not (error.full and held) or self._interrupts.received or hosts.count() > 1:
                raise
            self._progress.message(f'{error} Saving without the replay, to collect anew.')
            self.save(replay=False)

    def save(self, *, replay: bool = True) -> None:
        """Writes a checkpoint, with the replay unless it is to be left out.

        Raises:
          NotSaved: the disk is full, or it cannot be written for another reason.
          Failure: too many updates in a row were skipped, or the folder is another run's now.
        """
        self._learner.finish()
        hosts.first(lambda: run_folder.check_lock(self._logdir, self._lock))
        saved = self._learner.saved(replay and self._config.run.checkpoint_replay)
        self._checkpointer.save(self.counters['ticks'], saved)
        self._saved = time.monotonic()
