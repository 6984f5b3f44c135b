"""Playing episodes with a trained agent."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats

from dreamerv3_jax import checkpoint, envs, run_folder
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.errors import UserError
from dreamerv3_jax.spaces import ArraySpec

FRAMES_PER_SECOND = 30


class Player:
    """A trained agent that acts in N environments, with the most probable actions unless told otherwise."""

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
        """Loads the newest checkpoint of a run.

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
        if checkpoint.latest_step(logdir / 'checkpoints') is None:
            raise UserError(f'{logdir} holds no checkpoint yet; train until the first one is saved.')
        self._agent = Agent(observation_specs, action_specs, self.config.agent)
        checkpointer = checkpoint.Checkpointer(logdir / 'checkpoints')
        state = checkpoint.abstract_state(jax.eval_shape(lambda: self._agent.init(0)))
        self._params = checkpointer.restore_state(state).params
        checkpointer.close()
        self._count, self._seed, self._mode = count, seed, not sample
        self._calls = 0
        self._state = self._agent.initial_policy_state(count)

    def act(self, observation: Mapping[str, np.ndarray], is_first: np.ndarray) -> dict[str, np.ndarray]:
        """Chooses actions {name: [N, n]} for observations {name: [N, *shape]}.

        Args:
          observation: what each environment returned last.
          is_first: [N] bool, whether that came from a reset.
        """
        self._state, actions, _ = self._agent.policy(
            self._params, self._state, observation, is_first, (self._seed, self._calls), self._mode
        )
        self._calls += 1
        return jax.device_get(actions)


def evaluate(
    logdir: Path, *, episodes: int, seed: int = 0, video: Path | None = None, sample: bool = False
) -> dict[str, Any]:
    """Plays whole episodes with the newest checkpoint of a run.

    The episodes are dealt out among parallel environments beforehand: taking those that end first would
    favour short ones.

    Args:
      logdir: folder of the run.
      episodes: how many.
      seed: of the environments and of all sampling.
      video: .mp4 or .gif of the first episode.
      sample: samples actions instead of taking the most probable ones.

    Returns:
      'mean', 'ci95' (half-width of the 95% confidence interval of the mean), 'returns' and 'lengths'.

    Raises:
      UserError: there is nothing to evaluate, or no way to make the video.
    """
    config = run_folder.read_config(logdir)
    config.env.num_envs = count = min(episodes, config.env.num_envs)
    writer = _video_writer(video) if video else None
    quota = np.array([len(range(index, episodes, count)) for index in range(count)])
    returns, lengths = np.zeros(count), np.zeros(count, np.int64)
    finished: dict[str, list[float]] = {'returns': [], 'lengths': []}
    with envs.make(config.env, run_folder.derived_seed(seed, 2**31), render=video is not None) as env:
        player = Player(
            logdir, env.observation_specs, env.action_specs, count=count, seed=seed, sample=sample
        )
        records, finals = env.reset(), None
        filming = writer is not None
        while quota.any():
            for streams, part in _in_order(records, finals):
                first = streams[part.is_first]
                returns[first], lengths[first] = 0.0, -1
                returns[streams] += part.reward
                lengths[streams] += 1
                for stream in streams[part.is_last & (quota[streams] > 0)]:
                    finished['returns'].append(float(returns[stream]))
                    finished['lengths'].append(int(lengths[stream]))
                    quota[stream] -= 1
                    filming = filming and stream != 0
            if filming:
                writer.append_data(_picture(env, records))
            actions = player.act(records.observation, records.is_first)
            records, finals = env.step(actions)
    if writer is not None:
        writer.close()
    values = np.array(finished['returns'])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    ci95 = float(error * scipy.stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else float('nan')
    return {'mean': float(values.mean()), 'ci95': ci95, **finished}


def _in_order(records: envs.Records, finals: envs.FinalRecords | None) -> list[tuple[np.ndarray, envs.Records]]:
    parts = [] if finals is None else [(finals.streams, finals.records)]
    return [*parts, (np.arange(len(records.reward)), records)]


def _video_writer(path: Path) -> Any:
    try:
        import imageio
    except ImportError as error:
        raise UserError('Videos need imageio; pip install "dreamerv3-jax[video]".') from error
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {'macro_block_size': 1} if path.suffix == '.mp4' else {'loop': 0}
    return imageio.get_writer(path, fps=FRAMES_PER_SECOND, **options)


def _picture(env: envs.VectorEnvironment, records: envs.Records) -> np.ndarray:
    """What the first environment shows: its own rendering, or its first image observation."""
    picture = env.render()
    if picture is not None:
        return picture
    for name, spec in env.observation_specs.items():
        if spec.kind == 'image':
            image = records.observation[name][0]
            return np.repeat(image[..., :1], 3, -1) if image.shape[-1] != 3 else image
    raise UserError('This environment draws no pictures; evaluate it without --video.')
