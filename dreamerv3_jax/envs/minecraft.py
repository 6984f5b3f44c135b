"""Minecraft: from bare hands to a diamond, in a new world every episode.

`minecraft/diamond`. The agent gets 1 for each of twelve milestones when it first holds the item in
an episode, and up to 0.01 for health: what it gains or loses of it, as a share of all 20 points.
Blocks break 100 times faster than for people, since a policy that explores seldom holds a button
for long. Death terminates an episode, 36,000 steps cut it. At the end `info` reports under
'log/milestone_<item>' which milestones were reached, and under 'log/milestones' how many.

Observes the 'image', the numbers of all items that are held now ('inventory') and that were held at
most so far ('inventory_max'), which item is in the hand ('equipped'), 'health', 'hunger' and
'breath' (each 1 when full).

The published actions craft by name. MineRL 0.4.4 is the last one that can do so, and the one that
the published environment is based on (github.com/danijar/diamond_env): MineRL 1.0 has keys and
mouse only. A seed chooses the world; MineRL does not promise that animals and monsters then move
the same.
"""

import importlib.metadata
from typing import Any

import gymnasium
import numpy as np

from dreamerv3_jax.errors import UserError

# MineRL 0.4 uses names that NumPy has dropped since.
for _type in (float, int):
    if not hasattr(np, _type.__name__):
        setattr(np, _type.__name__, _type)

from minerl.herobraine.env_spec import EnvSpec  # noqa: E402
from minerl.herobraine.hero import handlers, mc  # noqa: E402

MILESTONES = (
    'log',
    'planks',
    'stick',
    'crafting_table',
    'wooden_pickaxe',
    'cobblestone',
    'stone_pickaxe',
    'iron_ore',
    'furnace',
    'iron_ingot',
    'iron_pickaxe',
    'diamond',
)
HEALTH_REWARD = 0.01 / 20  # for each point, as in the published code; its words say 0.01
PITCH_LIMIT = 60  # degrees up and down
ATTACK_STEPS = 30  # for which the button is held, at the game's own speed of breaking
JUMP_STEPS = 10

# What an action sets; all else is as in _NOOP.
ACTIONS: dict[str, dict[str, Any]] = {
    'noop': {},
    'attack': {'attack': 1},
    'turn_up': {'camera': (-15, 0)},
    'turn_down': {'camera': (15, 0)},
    'turn_left': {'camera': (0, -15)},
    'turn_right': {'camera': (0, 15)},
    'forward': {'forward': 1},
    'back': {'back': 1},
    'left': {'left': 1},
    'right': {'right': 1},
    'jump': {'jump': 1, 'forward': 1},
    'place_dirt': {'place': 'dirt'},
    'craft_planks': {'craft': 'planks'},
    'craft_stick': {'craft': 'stick'},
    'craft_crafting_table': {'craft': 'crafting_table'},
    'place_crafting_table': {'place': 'crafting_table'},
    'craft_wooden_pickaxe': {'nearbyCraft': 'wooden_pickaxe'},
    'craft_stone_pickaxe': {'nearbyCraft': 'stone_pickaxe'},
    'craft_iron_pickaxe': {'nearbyCraft': 'iron_pickaxe'},
    'equip_stone_pickaxe': {'equip': 'stone_pickaxe'},
    'equip_wooden_pickaxe': {'equip': 'wooden_pickaxe'},
    'equip_iron_pickaxe': {'equip': 'iron_pickaxe'},
    'craft_furnace': {'nearbyCraft': 'furnace'},
    'place_furnace': {'place': 'furnace'},
    'smelt_iron_ingot': {'nearbySmelt': 'iron_ingot'},
}
_BUTTONS = ('forward', 'back', 'left', 'right', 'jump', 'attack')
_COMMANDS = {
    'place': handlers.PlaceBlock,
    'equip': handlers.EquipAction,
    'craft': handlers.CraftAction,
    'nearbyCraft': handlers.CraftNearbyAction,
    'nearbySmelt': handlers.SmeltItemNearby,
}
_LIFE = {'health': ('life', 20), 'hunger': ('food', 20), 'breath': ('air', 300)}  # and what is full
_NOOP = {'camera': (0, 0)} | dict.fromkeys(_BUTTONS, 0) | dict.fromkeys(_COMMANDS, 'none')


def make(
    name: str,
    *,
    image_size: int = 0,
    render_mode: str | None = None,
    break_speed: float = 100.0,
    length: int = 36_000,
) -> gymnasium.Env:
    """Returns the environment.

    Args:
      name: 'diamond'.
      image_size: side of the square picture; 0 for 64.
      render_mode: None or 'rgb_array'.
      break_speed: how many times faster blocks break; at 1, the button to break them is held for
        30 steps after every press.
      length: steps after which an episode is cut.

    Raises:
      UserError: the name is another one, or MineRL is too new.
    """
    if name != 'diamond':
        raise UserError(f'Minecraft comes as minecraft/diamond, not {name!r}.')
    try:
        version = importlib.metadata.version('minerl')
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        version = '0.4'
    if not version.startswith('0.'):
        raise UserError(f'MineRL {version} knows no commands that craft; install minerl==0.4.4.')
    env = Diamond(
        DiamondSpec(image_size or 64, break_speed).make(),
        image_size=image_size or 64,
        attack_steps=ATTACK_STEPS if break_speed == 1 else 0,
        length=length,
    )
    env.render_mode = render_mode
    return env


class DiamondSpec(EnvSpec):
    """The game as MineRL is told to set it up."""

    def __init__(self, image_size: int, break_speed: float) -> None:
        self._image_size = image_size
        self._break_speed = break_speed
        super().__init__(name='DreamerDiamond-v0')

    def create_observables(self) -> list[Any]:
        """What is observed."""
        return [
            handlers.POVObservation((self._image_size, self._image_size)),
            handlers.FlatInventoryObservation(list(mc.ALL_ITEMS)),
            # A copy, as the handler adds to it.
            handlers.EquippedItemObservation(list(mc.ALL_ITEMS), _default='air', _other='other'),
            handlers.ObservationFromLifeStats(),
        ]

    def create_actionables(self) -> list[Any]:
        """What can be done."""
        buttons = [
            handlers.KeybasedCommandAction(name, mc.INVERSE_KEYMAP[name]) for name in _BUTTONS
        ]
        commands = []
        for name, handler in _COMMANDS.items():
            items = [action[name] for action in ACTIONS.values() if name in action]
            commands.append(handler(['none', *items], _default='none', _other='none'))
        return [*buttons, handlers.CameraAction(), *commands]

    def create_agent_start(self) -> list[Any]:
        """What the agent starts with: empty hands that break blocks fast."""
        return [handlers.AgentStartBreakSpeedMultiplier(self._break_speed)]

    def create_server_world_generators(self) -> list[Any]:
        """Which world: a new one for every episode."""
        return [handlers.DefaultWorldGenerator(force_reset=True)]

    def create_server_initial_conditions(self) -> list[Any]:
        """When: at dawn, with all that lives."""
        return [
            handlers.TimeInitialCondition(allow_passage_of_time=True, start_time=0),
            handlers.SpawningInitialCondition(allow_spawning=True),
        ]

    def create_server_quit_producers(self) -> list[Any]:
        """When the game ends by itself: at death."""
        return [handlers.ServerQuitWhenAnyAgentFinishes()]

    def create_rewardables(self) -> list[Any]:
        """None; rewards are given outside of the game."""
        return []

    def create_agent_handlers(self) -> list[Any]:
        """None."""
        return []

    def create_monitors(self) -> list[Any]:
        """None."""
        return []

    def create_server_decorators(self) -> list[Any]:
        """None."""
        return []

    def is_from_folder(self, folder: str) -> bool:
        """There are no recordings of this task."""
        return False

    def determine_success_from_rewards(self, rewards: list) -> bool:
        """Asked of recordings only."""
        return False

    def get_docstring(self) -> str:
        """Returns the description."""
        return 'From bare hands to a diamond.'


class Diamond(gymnasium.Env):
    """MineRL's environment of the spec, with the actions and rewards of the benchmark."""

    metadata = {'render_modes': ['rgb_array'], 'render_fps': 20}

    def __init__(self, env: Any, *, image_size: int, attack_steps: int, length: int) -> None:
        self._env = env
        self._attack_steps = attack_steps
        self._length = length
        items = env.observation_space['inventory'].spaces
        self._items = [name for name in items if name != 'log2']  # which count as logs
        equipped = env.observation_space['equipped_items']['mainhand']['type'].values
        self._equippable = [str(name) for name in equipped]
        self._begin()
        box, many = gymnasium.spaces.Box, len(self._items)
        scalars = {name: box(0, np.inf, (1,), np.float32) for name in _LIFE}
        self.observation_space = gymnasium.spaces.Dict(
            {
                'image': box(0, 255, (image_size, image_size, 3), np.uint8),
                'inventory': box(0, np.inf, (many,), np.float32),
                'inventory_max': box(0, np.inf, (many,), np.float32),
                'equipped': box(0, 1, (len(self._equippable),), np.float32),
                **scalars,
            }
        )
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts in a new world."""
        super().reset(seed=seed)
        self._env.seed(int(self.np_random.integers(2**31)))
        self._begin()
        found = self._env.reset()
        observation = self._observe(found)
        self._health = float(found['life_stats']['life'])
        return observation, {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Takes one step.

        Raises:
          RuntimeError: the game no longer answers.
        """
        chosen = list(ACTIONS.values())[int(action)]
        found, _, over, info = self._env.step(self._full_action(chosen))
        if 'error' in info:  # and the observation is made up
            raise RuntimeError(f'Minecraft stopped: {info["error"]}')
        self._steps += 1
        observation = self._observe(found)
        held = {item for item in MILESTONES if self._count(found, item) > 0}
        new = held - self._reached
        self._reached |= held
        health = float(found['life_stats']['life'])
        reward = len(new) + HEALTH_REWARD * (health - self._health)
        self._health = health
        truncated = not over and self._steps >= self._length
        logs: dict[str, Any] = {}
        if over or truncated:
            logs = {f'log/milestone_{item}': float(item in self._reached) for item in MILESTONES}
            logs['log/milestones'] = float(len(self._reached))
        return observation, reward, bool(over), truncated, logs

    def render(self) -> np.ndarray:
        """Returns the picture that is observed; MineRL draws no other."""
        return self._image

    def close(self) -> None:
        """Ends the game."""
        self._env.close()

    def _begin(self) -> None:
        self._steps = 0
        self._health = 0.0
        self._reached: set[str] = set()
        self._most = np.zeros(len(self._items), np.float32)
        self._pitch = 0
        self._attack_left = self._jump_left = 0
        self._image = np.zeros((0, 0, 3), np.uint8)

    def _full_action(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Returns what MineRL gets: buttons stay pressed, and the view stays off the poles."""
        action = {**_NOOP, **chosen}
        if action['attack']:
            self._attack_left = self._attack_steps
        if self._attack_left:
            self._attack_left -= 1
            action.update(attack=1, jump=0)
        if action['jump']:
            self._jump_left = JUMP_STEPS
        if self._jump_left:
            self._jump_left -= 1
            action.update(jump=1, forward=1)
        pitch, yaw = action['camera']
        if abs(self._pitch + pitch) > PITCH_LIMIT:
            pitch = 0
        self._pitch += pitch
        action['camera'] = np.array([pitch, yaw], np.float32)
        return action

    def _count(self, found: dict[str, Any], item: str) -> int:
        more = found['inventory']['log2'] if item == 'log' else 0
        return int(found['inventory'][item] + more)

    def _observe(self, found: dict[str, Any]) -> dict[str, np.ndarray]:
        self._image = np.asarray(found['pov'])
        inventory = np.array([self._count(found, item) for item in self._items], np.float32)
        self._most = np.maximum(self._most, inventory)
        equipped = np.zeros(len(self._equippable), np.float32)
        equipped[self._equippable.index(str(found['equipped_items']['mainhand']['type']))] = 1
        life = {
            name: np.array([found['life_stats'][key] / full], np.float32)
            for name, (key, full) in _LIFE.items()
        }
        return {
            'image': self._image,
            'inventory': inventory,
            'inventory_max': self._most,
            'equipped': equipped,
            **life,
        }
