"""Stand-ins for packages that no registry has, written after their documented interfaces.

They hold an adapter to the contract of a package, and say nothing about its worlds. What MineRL's
Python part does with a spec was recorded from its version 0.4.4.
"""

import importlib.machinery
import types

import numpy as np


def module(name, **contents):
    """Returns a module that `importlib.util.find_spec` finds in `sys.modules`."""
    result = types.ModuleType(name)
    result.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(result).update(contents)
    return result


class RecordedLabContract:
    """`deepmind_lab.Lab`: strict about arguments and about when it may be asked what.

    The level gives a reward of 1 for each frame in which the agent moves forward. It lasts for
    `length` frames, or only for `early` of them where that is less.
    """

    length, early = 90, 10**9
    latest = None  # the one that was made last

    def __init__(self, level, observations, config=None, renderer='software'):
        config = {} if config is None else config
        if not isinstance(observations, list) or not isinstance(config, dict):
            raise TypeError('must be list, dict')
        if not all(isinstance(text, str) for pair in config.items() for text in pair):
            raise TypeError('bad argument type for built-in operation')
        unknown = set(observations) - {spec['name'] for spec in self.observation_spec()}
        if unknown:
            raise ValueError(f'Unknown observation {unknown}')
        assert level.startswith('contributed/dmlab30/')
        assert not level.endswith('_test') or config.get('allowHoldOutLevels') == 'true'
        assert renderer in ('software', 'hardware')
        self.level, self.config, self.renderer = level, config, renderer
        self.names = observations
        self.frame, self.running, self.closed = 0, False, False
        self.steps, self.seeds = [], []
        type(self).latest = self

    def observation_spec(self):
        return [
            {'name': 'RGB_INTERLEAVED', 'dtype': np.uint8, 'shape': (0, 0, 3)},
            {'name': 'INSTR', 'dtype': str, 'shape': ()},
            {'name': 'FRAMES_REMAINING_AT_60', 'dtype': np.float64, 'shape': (1,)},
        ]

    def action_spec(self):
        limits = {
            'LOOK_LEFT_RIGHT_PIXELS_PER_FRAME': (-512, 512),
            'LOOK_DOWN_UP_PIXELS_PER_FRAME': (-512, 512),
            'STRAFE_LEFT_RIGHT': (-1, 1),
            'MOVE_BACK_FORWARD': (-1, 1),
            'FIRE': (0, 1),
            'JUMP': (0, 1),
            'CROUCH': (0, 1),
        }
        return [{'name': name, 'min': low, 'max': high} for name, (low, high) in limits.items()]

    def reset(self, episode=-1, seed=None):
        if not (seed is None or type(seed) is int):
            raise ValueError(f"'seed' must be int or None, was '{type(seed).__name__}'")
        self.seeds.append(seed)
        self.rng = np.random.default_rng(seed)
        self.frame, self.running = 0, True

    def is_running(self):
        return self.running

    def step(self, action, num_steps=1):
        if not self.running:
            raise RuntimeError('wrong status to advance')
        assert isinstance(action, np.ndarray)
        assert action.dtype == np.intc
        assert action.shape == (7,)
        for value, spec in zip(action, self.action_spec(), strict=True):
            assert spec['min'] <= value <= spec['max']
        self.steps.append((tuple(action.tolist()), num_steps))
        reward = 0.0
        for _ in range(num_steps):
            self.frame += 1
            reward += float(action[3] == 1)
            self.running = self.frame < min(self.length, self.early)
            if not self.running:
                break
        return reward

    def observations(self):
        if not self.running:
            raise RuntimeError('wrong status for observations')
        height, width = int(self.config['height']), int(self.config['width'])
        found = {
            'RGB_INTERLEAVED': self.rng.integers(0, 256, (height, width, 3), np.uint8),
            'INSTR': 'Get the red hat from the blue room.',
            'FRAMES_REMAINING_AT_60': np.array([float(self.length - self.frame)]),
        }
        return {name: found[name] for name in self.names}

    def close(self):
        self.closed, self.running = True, False
        return True


def lab_modules():
    """Returns the modules of DeepMind Lab by name."""
    return {'deepmind_lab': module('deepmind_lab', Lab=RecordedLabContract)}


ITEMS = (
    *('air', 'cobblestone', 'crafting_table', 'diamond', 'dirt', 'furnace', 'iron_ingot'),
    *('iron_ore', 'iron_pickaxe', 'log', 'log2', 'planks', 'stick', 'stone_pickaxe'),
    'wooden_pickaxe',
)


class _Enum:
    def __init__(self, values):
        self.values = np.array(sorted(values))


class _Dict(dict):
    @property
    def spaces(self):
        return self


class _Handler:
    """Any of MineRL's handlers; the first argument is what matters here."""

    name = ''

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options


def _handler(name='', base=_Handler):
    return type('Handler', (base,), {'name': name})


class _Key(_Handler):
    def __init__(self, command, key):
        super().__init__(command, key)
        self.name = command


class _Items(_Handler):
    """A handler of commands; what is not among its items, it refuses."""

    def __init__(self, items, _default=None, _other=None):
        assert _default == _other == 'none'
        super().__init__(items)
        self.items = items


_SPEC_METHODS = (
    *('create_observables', 'create_actionables', 'create_rewardables', 'create_agent_start'),
    *('create_agent_handlers', 'create_monitors', 'create_server_initial_conditions'),
    *('create_server_world_generators', 'create_server_quit_producers', 'get_docstring'),
    *('create_server_decorators', 'is_from_folder', 'determine_success_from_rewards'),
)


class RecordedEnvSpecContract:
    """`minerl.herobraine.env_spec.EnvSpec`, whose `make` gives a `RecordedMineRLContract`."""

    def __init__(self, name, max_episode_steps=None, reward_threshold=None, agent_count=None):
        assert all(hasattr(self, method) for method in _SPEC_METHODS)  # there they are abstract
        self.name = name
        self.observables = self.create_observables()
        self.actionables = {handler.name: handler for handler in self.create_actionables()}
        assert self.create_rewardables() == self.create_agent_handlers() == []
        assert self.create_monitors() == self.create_server_decorators() == []
        self.agent_start = self.create_agent_start()
        self.server = [
            *self.create_server_initial_conditions(),
            *self.create_server_world_generators(),
            *self.create_server_quit_producers(),
        ]

    def make(self):
        return RecordedMineRLContract(self)


class RecordedMineRLContract:
    """What `EnvSpec.make` returns: the interface of gym before 0.26.

    There is no world: tests set `inventory`, `life`, `dies` and `error` for the next step.
    """

    latest = None  # the one that was made last

    def __init__(self, spec):
        self.spec = spec
        self.size = spec.observables[0].arguments[0]
        self.observation_space = _Dict(
            inventory=_Dict.fromkeys(spec.observables[1].arguments[0]),
            equipped_items={'mainhand': {'type': _Enum({*ITEMS, 'air', 'other'})}},
        )
        self.actions, self.seeds = [], []
        self.started = self.closed = False
        type(self).latest = self

    def seed(self, seed=None, seed_spaces=True):
        assert seed is None or isinstance(seed, int)
        self.seeds.append(seed)

    def reset(self):
        self.started, self.over, self.dies, self.error = True, False, False, None
        self.inventory, self.life, self.hand = {}, 20.0, 'air'
        self.rng = np.random.default_rng(self.seeds[-1])
        return self._observation()

    def step(self, action):
        assert self.started
        if self.over:
            raise RuntimeError('Attempted to step an environment server with done=True')
        assert set(action) == set(self.spec.actionables)
        for name, handler in self.spec.actionables.items():
            if isinstance(handler, _Items):
                assert action[name] in handler.items
            elif name == 'camera':
                assert action[name].shape == (2,)
            else:
                assert action[name] in (0, 1)
        self.actions.append(action)
        self.over = self.dies or bool(self.error)
        if self.error:
            return self._observation(), 0, True, {'error': self.error}
        return self._observation(), 0.0, self.over, {}

    def close(self):
        self.closed = True

    def _observation(self):
        width, height = self.size
        return {
            'pov': self.rng.integers(0, 256, (height, width, 3), np.uint8),
            'inventory': {
                name: np.array(self.inventory.get(name, 0))
                for name in self.observation_space['inventory']
            },
            'equipped_items': {
                'mainhand': {'damage': np.array(0), 'maxDamage': np.array(0), 'type': self.hand}
            },
            'life_stats': {
                'air': np.array(300),
                'food': np.array(10),
                'is_alive': np.array(self.life > 0),
                'life': np.array(self.life),
                'saturation': np.array(5.0),
                'score': np.array(0),
                'xp': np.array(0),
            },
        }


def minerl_modules():
    """Returns the modules of MineRL by name."""
    handlers = types.SimpleNamespace(
        POVObservation=_handler('pov'),
        FlatInventoryObservation=_handler('inventory'),
        EquippedItemObservation=_handler('equipped_items'),
        ObservationFromLifeStats=_handler('life_stats'),
        KeybasedCommandAction=_Key,
        CameraAction=_handler('camera'),
        PlaceBlock=_handler('place', _Items),
        EquipAction=_handler('equip', _Items),
        CraftAction=_handler('craft', _Items),
        CraftNearbyAction=_handler('nearbyCraft', _Items),
        SmeltItemNearby=_handler('nearbySmelt', _Items),
        AgentStartBreakSpeedMultiplier=_handler(),
        DefaultWorldGenerator=_handler(),
        TimeInitialCondition=_handler(),
        SpawningInitialCondition=_handler(),
        ServerQuitWhenAnyAgentFinishes=_handler(),
    )
    keys = {'forward': '17', 'back': '31', 'left': '30', 'right': '32', 'jump': '57'}
    mc = types.SimpleNamespace(ALL_ITEMS=list(ITEMS), INVERSE_KEYMAP={**keys, 'attack': '-100'})
    return {
        'minerl': module('minerl', __path__=[]),
        'minerl.herobraine': module('minerl.herobraine', __path__=[]),
        'minerl.herobraine.env_spec': module(
            'minerl.herobraine.env_spec', EnvSpec=RecordedEnvSpecContract
        ),
        'minerl.herobraine.hero': module('minerl.herobraine.hero', handlers=handlers, mc=mc),
    }


MODULES = {'dmlab': lab_modules, 'minecraft': minerl_modules}


def install(folder):
    """Writes modules into a folder that give the stand-ins to every process which looks there."""
    for function in MODULES.values():
        package = next(iter(function()))
        code = f'import sys, doubles\nsys.modules.update(doubles.{function.__name__}())\n'
        (folder / f'{package}.py').write_text(code)
