"""Small environments whose every number is known, importable by worker processes."""

import ctypes
import itertools
import math
import os
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv

from dreamerv3_jax.envs.vector import VectorEnvironment


def taken_logs(env: VectorEnvironment) -> dict[str, float]:
    """Means over episodes of what environments logged, which they forget."""
    return {name: total / count for name, (total, count) in env.logs.take().items()}


class Counter(gymnasium.Env):
    """Observes episode, step and last action; pays 10 * step + action."""

    metadata = {'render_modes': ['rgb_array'], 'render_fps': 20}

    def __init__(
        self,
        end: str = 'terminated',
        length: int = 0,
        fail_at: int = -1,
        failure: str = 'raise',
        once: str = '',
        render_mode: str | None = None,
    ) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            {
                'count': gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
                'action': gymnasium.spaces.Discrete(4),
            }
        )
        self.action_space = gymnasium.spaces.Discrete(3)
        self.render_mode = render_mode
        self.frames = 0
        self._end = end
        self._length = length
        self._fail_at = fail_at
        self._failure = failure
        self._once = once  # a file: only who creates it fails
        self._episode = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._episode += 1
        self._step = 0
        if self._fail_at == 0 and self._may_fail():
            if self._failure == 'quit':
                sys.exit(3)
            raise ValueError('the robot does not get up')
        self._limit = self._length or int(self.np_random.integers(1, 5))
        return self._observation(3), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        assert self._step < self._limit, 'stepped after the end'
        self._step += 1
        self.frames += 1
        if self._step == self._fail_at and self._may_fail():
            if self._failure == 'exit':
                os._exit(7)
            if self._failure == 'hang':
                time.sleep(1000)
            if self._failure == 'hang in C':
                ctypes.PyDLL(None).sleep(1000)  # no other thread of Python runs
            if self._failure == 'quit':
                sys.exit(3)
            if self._failure != 'raise':
                return self._rubbish()
            raise ValueError('the\nrobot fell over')
        ended = self._step == self._limit
        info = {'log/length': self._step, 'log/episode': float(self._episode), 'log/name': 'toy'}
        return (
            self._observation(int(action)),
            10.0 * self._step + int(action),
            ended and self._end == 'terminated',
            ended and self._end == 'truncated',
            info,
        )

    def render(self) -> Any:
        return np.full((4, 6, 3), self._step, np.uint8)

    def _may_fail(self) -> bool:
        if not self._once:
            return True
        try:
            os.close(os.open(self._once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _rubbish(self) -> Any:
        observation, reward = self._observation(0), 1.0
        if self._failure == 'nan reward':
            reward = math.nan
        elif self._failure == 'infinite reward':
            reward = math.inf
        elif self._failure == 'two rewards':
            reward = np.ones(2)
        elif self._failure == 'nan observation':
            observation['count'][1] = math.nan
        elif self._failure == 'odd action':
            observation['action'] = 4
        elif self._failure == 'huge action':
            observation['action'] = 2**32 + 1  # 1 in 32 bits
        elif self._failure == 'half an action':
            observation['action'] = 1.5
        elif self._failure == 'wrong dtype':
            observation['count'] = np.array(['11', '12'])
        else:
            observation['count'] = np.zeros(3)
        return observation, reward, False, False, {}

    def _observation(self, action: int) -> Any:
        return {'count': np.array([self._episode, self._step], float), 'action': action}


class Clockwork(gymnasium.Env):
    """Moves by its actions alone, and every episode is as long and begins alike."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, length: int) -> None:
        self._length = length

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._step, self._place = 0, np.ones(2, np.float32)
        return self._place, {}

    def step(self, action: Any) -> Any:
        self._step += 1
        self._place = np.float32(0.9) * self._place[::-1] + action
        return self._place, float(self._place[0]), self._step == self._length, False, {}


class Camera(gymnasium.Env):
    """Observes an image; never ends."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros((64, 64, 3), np.uint8), {}

    def step(self, action: Any) -> Any:
        return np.full((64, 64, 3), 7, np.uint8), float(action.sum()), False, False, {}


class Spaceless(gymnasium.Env):
    pass


class Unclosable(Camera):
    def close(self) -> None:
        raise BrokenPipeError('the simulator is gone')


class Slow(Camera):
    """Takes its time for every step."""

    def step(self, action: Any) -> Any:
        time.sleep(0.3)
        return super().step(action)


_numbers = itertools.count(1)


def varying() -> gymnasium.Env:
    env = Camera()
    size = 1000 * next(_numbers) + os.getpid() % 1000
    env.observation_space = gymnasium.spaces.Box(0, 1, (size,))
    return env


def not_an_environment() -> str:
    return 'hello'


def fails() -> gymnasium.Env:
    raise RuntimeError('no such robot')


class Junk(SyncVectorEnv):
    """Returns meaningless rewards and flags on the ticks that reset an environment."""

    def step(self, actions: Any) -> Any:
        resets = self._autoreset_envs.copy()
        observation, reward, terminated, truncated, info = super().step(actions)
        return observation, reward + 99 * resets, terminated | resets, truncated, info


class Odd(SyncVectorEnv):
    """Returns rewards in columns, as some simulators do, or logs that are of no environment."""

    what = ''

    def step(self, actions: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(actions)
        if self.what == 'rewards':
            reward = reward[:, None]
        elif self.what == 'flags':
            truncated = truncated[:, None]
        elif self.what == 'logs':
            info = {'log/x': 0.7}
        elif self.what == 'keys':
            info = {3: reward}
        return observation, reward, terminated, truncated, info


def native_counter(
    num_envs: int, autoreset: str = 'NextStep', junk: bool = False, odd: str = '', **kwargs: Any
) -> SyncVectorEnv:
    kind = Junk if junk else type('Odd', (Odd,), {'what': odd}) if odd else SyncVectorEnv
    return kind([lambda: Counter(**kwargs)] * num_envs, autoreset_mode=autoreset)


class UnclosableVector(SyncVectorEnv):
    def close_extras(self, **kwargs: Any) -> None:
        self.closed = True  # or it would be tried once more as it is deleted
        raise BrokenPipeError('the simulator is gone')


def native_unclosable(num_envs: int) -> SyncVectorEnv:
    return UnclosableVector([Counter] * num_envs)


gymnasium.register('ToyCounter-v0', entry_point=Counter, vector_entry_point=native_counter)
gymnasium.register('ToyUnclosable-v0', entry_point=Counter, vector_entry_point=native_unclosable)
