"""Playing episodes with a trained agent."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import scipy.stats

from dreamerv3_jax import checkpoint, envs, prediction, run_folder, sharding, steps, video_file
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.replay import Replay
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Batch


class Player:
    """A trained agent that acts in N environments, with the most probable actions by default.

    Example:
      Given a run in `runs/cartpole` and its environment:

        observations = ObservationAdapter(env.observation_space)
        actions = ActionAdapter(env.action_space)
        player = Player('runs/cartpole', observations.specs, actions.specs)
        observation, ended = env.reset()[0], False
        first = True
        while not ended:
          flat = {name: x[None] for name, x in observations.convert(observation).items()}
          action = actions.convert(player.act(flat, np.array([first])), 0)
          observation, _, terminated, truncated, _ = env.step(action)
          first, ended = False, terminated or truncated
    """

    def __init__(
        self,
        logdir: Path | str,
        observation_specs: Mapping[str, ArraySpec],
        action_specs: Mapping[str, ArraySpec],
        *,
        count: int = 1,
        seed: int = 0,
        sample: bool = False,
    ) -> None:
        """Loads the newest checkpoint of a run, onto one device whatever it was trained on.

        Args:
          logdir: folder of the run.
          observation_specs: arrays of an observation by name, see `spaces.ObservationAdapter`.
          action_specs: arrays of an action by name, see `spaces.ActionAdapter`.
          count: N.
          seed: of the latents, and of the actions if they are sampled.
          sample: samples actions.

        Raises:
          UserError: the folder holds no run with a checkpoint, or one for other spaces.
        """
        logdir = Path(logdir)
        self.config = run_folder.read_config(logdir)
        folder = _require_checkpoint(logdir)
        run_folder.check_spaces(logdir, observation_specs, action_specs)
        self._agent = Agent(observation_specs, action_specs, self.config.agent)
        shapes = jax.eval_shape(lambda: self._agent.init(0))
        placed = sharding.abstract(shapes, sharding.state_sharding(self._agent.mesh, shapes))
        checkpointer = checkpoint.Checkpointer(folder)
        self._params = checkpointer.restore_state(placed).params
        checkpointer.close()
        self._seed, self._mode = seed, not sample
        self._calls = 0
        self._state = self._agent.initial_policy_state(count)

    def act(
        self, observation: Mapping[str, np.ndarray], is_first: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Chooses actions {name: [N, n]} for observations {name: [N, *shape]}.

        Args:
          observation: what each environment returned last.
          is_first: [N] bool, whether that came from a reset.
        """
        self._state, actions, self._latents = self._agent.policy(
            self._params, self._state, observation, is_first, (self._seed, self._calls), self._mode
        )
        self._calls += 1
        return jax.device_get(actions)

    def _play(self, env: envs.VectorEnvironment, length: int) -> Batch:
        """Plays N sequences from the reset on, and returns them as the replay does."""
        replay = Replay(
            steps.replay_specs(self._agent),
            capacity=2 * env.num_envs * (length + 1),  # an episode may end at every step
            streams=env.num_envs,
            batch_size=env.num_envs,
            batch_length=length,
            online=True,  # so that each sequence is drawn once
            seed=0,
        )
        records = env.reset()
        for _ in range(length + 1):
            actions = self.act(records.observation, records.is_first)
            latents = jax.device_get(self._latents)
            replay.add(steps.replay_step(records, actions, latents._asdict()))
            records, finals = env.step(actions)
            if finals is not None:
                replay.add(steps.final_step(finals.records, self._agent), finals.streams)
        return steps.to_batch(replay.sample()[0])


def evaluate(
    logdir: Path | str,
    *,
    episodes: int,
    seed: int = 0,
    video: Path | str | None = None,
    sample: bool = False,
    env: ml_collections.ConfigDict | None = None,
    report: Callable[[int, float, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Plays whole episodes with the newest checkpoint of a run.

    The episodes are dealt out among parallel environments beforehand: taking those that end first
    would favour short ones.

    Args:
      logdir: folder of the run.
      episodes: how many.
      seed: of the environments and of all sampling.
      video: .mp4 or .gif of an episode, the first of the first environment.
      sample: samples actions instead of taking the most probable ones.
      env: settings of the environment, as `configs/base.py` has them; those of the run by default.
      report: called after each episode with its number from 1, its return and its length.

    Returns:
      'mean', 'ci95' (half-width of the 95% confidence interval of the mean; not a number for one
      episode), and per episode 'returns' and 'lengths' (agent steps); with a video 'filmed', the
      number of its episode.

    Raises:
      UserError: there is nothing to evaluate, no way to make the video, or the environment has
        other spaces than that of the run.
    """
    logdir = Path(logdir)
    settings = _settings(logdir, env)
    settings.num_envs = count = min(episodes, settings.num_envs)
    quota = np.array([len(range(index, episodes, count)) for index in range(count)])
    returns, lengths = np.zeros(count), np.zeros(count, np.int64)
    finished: dict[str, list[float]] = {'returns': [], 'lengths': []}
    result: dict[str, Any] = {}
    env_seed = run_folder.derived_seed(seed, 2**31)
    with (
        video_file.Film(None if video is None else Path(video)) as film,
        envs.make(settings, env_seed, render=video is not None, restart=False) as played,
    ):
        film.frame_rate = played.frame_rate
        specs = (played.observation_specs, played.action_specs)
        player = Player(logdir, *specs, count=count, seed=seed, sample=sample)
        records, finals = played.reset(), None
        while True:
            recording = film.running
            for streams, part in _in_order(records, finals):
                first = streams[part.is_first]
                returns[first], lengths[first] = 0.0, -1
                returns[streams] += part.reward
                lengths[streams] += 1
                for stream in streams[part.is_last & (quota[streams] > 0)]:
                    finished['returns'].append(float(returns[stream]))
                    finished['lengths'].append(int(lengths[stream]))
                    report(len(finished['returns']), float(returns[stream]), int(lengths[stream]))
                    quota[stream] -= 1
                    if film.running and stream == 0:
                        film.running, result['filmed'] = False, len(finished['returns'])
            # After an automatic reset the picture is of the next episode already.
            if recording and not (records.is_first[0] and not film.running):
                film.add(video_file.picture(played, records))
            if recording and not film.running:
                film.close()
            if not quota.any():
                break
            actions = player.act(records.observation, records.is_first)
            records, finals = played.step(actions)
    values = np.array(finished['returns'])
    ci95 = float('nan')
    if episodes > 1:
        ci95 = float(scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, episodes - 1))
    return result | {'mean': float(values.mean()), 'ci95': ci95, **finished}


def open_loop(
    logdir: Path | str,
    *,
    sequences: int = 4,
    length: int = 50,
    observed: int = 5,
    seed: int = 0,
    video: Path | str | None = None,
    env: ml_collections.ConfigDict | None = None,
) -> dict[str, prediction.Prediction]:
    """Lets the world model of a run predict what it does not see, of episodes played for it.

    The newest checkpoint plays, with sampled actions as in training. The model sees the first steps
    of each sequence, and predicts the rest from the actions alone. A first step comes before all of
    them, where the episode begins.

    Args:
      logdir: folder of the run.
      sequences: B, each of an environment of its own.
      length: T.
      observed: how many of the T steps the model sees.
      seed: of the environments and of all sampling.
      video: .mp4 or .gif, truth above prediction above difference.
      env: settings of the environments; those of the run by default.

    Returns:
      {name: `Prediction`} of each image that the agent observes, arrays [B, T, H, W, C].

    Raises:
      UserError: there is no checkpoint, no image or no sequence of this kind, or no way to make the
        video.
    """
    if sequences < 1 or not 0 < observed < length:
        raise UserError(
            f'There is nothing to predict in {sequences} sequences of {length} steps of which '
            f'{observed} are observed.'
        )
    logdir = Path(logdir)
    settings = _settings(logdir, env)
    settings.num_envs = sequences
    env_seed = run_folder.derived_seed(seed, 2**31)
    with (
        video_file.Film(None if video is None else Path(video)) as film,
        envs.make(settings, env_seed, restart=False) as played,
    ):
        specs = (played.observation_specs, played.action_specs)
        player = Player(logdir, *specs, count=sequences, seed=seed, sample=True)
        if all(spec.kind != 'image' for spec in played.observation_specs.values()):
            raise UserError(f'The agent in {logdir} observes no pictures that it could predict.')
        batch = player._play(played, length)
        predicted = jax.device_get(
            player._agent.open_loop(player._params, batch, observed=observed, seed=(seed, 0))
        )
        if film.running:
            film.frame_rate = played.frame_rate
            for frame in prediction.video(predicted):
                film.add(frame)
    return predicted


def _settings(logdir: Path, env: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
    """Returns a copy of what was given, or of the run's, which must hold a checkpoint."""
    config = run_folder.read_config(logdir)
    _require_checkpoint(logdir)
    return (config.env if env is None else env).copy_and_resolve_references()


def _require_checkpoint(logdir: Path) -> Path:
    folder = logdir / 'checkpoints'
    if checkpoint.latest_step(folder) is None:
        raise UserError(f'{logdir} holds no checkpoint yet; train until the first one is saved.')
    return folder


def _in_order(
    records: envs.Records, finals: envs.FinalRecords | None
) -> list[tuple[np.ndarray, envs.Records]]:
    parts = [] if finals is None else [(finals.streams, finals.records)]
    return [*parts, (np.arange(len(records.reward)), records)]
