"""bsuite: small tasks that each ask for one ability, such as memory or exploration.

`bsuite/<family>/<number>`, bsuite's own ids, for example `bsuite/catch/0`, `bsuite/memory_len/10`.
There are 23 families; a number stands for a difficulty, or for a repetition with other random
numbers. At the end of an episode `info` reports under 'log/' what bsuite scores, such as
'log/total_regret': totals since the environment was made.

The images of the mnist families are not part of the package; see `make`.
"""

import os
from pathlib import Path
from typing import Any

import bsuite
import gymnasium
import numpy as np
from bsuite import sweep
from bsuite.utils import datasets

from dreamerv3_jax.errors import UserError, nearest

_MNIST = tuple(
    f'{part}-{content}-ubyte.gz'
    for part in ('train', 't10k')
    for content in ('images-idx3', 'labels-idx1')
)


def make(name: str, *, mnist: str = '') -> gymnasium.Env:
    """Returns the environment of a task.

    Args:
      name: family and number, joined with '/'.
      mnist: folder with the four files of MNIST; '' for the environment variable BSUITE_MNIST.

    Raises:
      UserError: there is no such task, or the files of MNIST are not where they should be.
    """
    if name not in sweep.SETTINGS:
        raise UserError(
            f'There is no bsuite task {name!r}'
            + nearest(name, sweep.SETTINGS, 'names are <family>/<number>')
        )
    family = name.partition('/')[0]
    if family.startswith('mnist'):
        _use_mnist(os.path.expanduser(mnist or os.environ.get('BSUITE_MNIST', '')))
    return BehaviourTask(bsuite.load(family, sweep.SETTINGS[name]))


def _use_mnist(folder: str) -> None:
    missing = [file for file in _MNIST if not folder or not Path(folder, file).is_file()]
    if missing:
        raise UserError(
            f'The mnist tasks read {", ".join(_MNIST)}: put these four files of MNIST into a '
            'folder and name it in env.kwargs.mnist or BSUITE_MNIST '
            f'({folder or "no folder"} lacks {", ".join(missing)}).'
        )
    # The tasks give no argument here, and files that are there are not downloaded.
    datasets.load_mnist.__defaults__ = (folder,)


class BehaviourTask(gymnasium.Env):
    """A task of bsuite behind gymnasium's interface."""

    def __init__(self, env: Any) -> None:
        self._env = env
        shape = env.observation_spec().shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(env.action_spec().num_values)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; what is fixed by the task's number, no seed changes."""
        super().reset(seed=seed)
        layer = self._env if seed is not None else None
        while layer is not None:  # noise on the reward is a layer with random numbers of its own
            if '_rng' in vars(layer):
                layer._rng.seed(int(self.np_random.integers(2**31)))
            layer = vars(layer).get('_env')
        return self._env.reset().observation, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one step."""
        time_step = self._env.step(int(action))
        terminated = time_step.last() and time_step.discount == 0
        truncated = time_step.last() and not terminated
        logs = {}
        if time_step.last():
            logs = {f'log/{name}': float(value) for name, value in self._env.bsuite_info().items()}
        return time_step.observation, float(time_step.reward), terminated, truncated, logs
