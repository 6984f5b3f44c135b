"""Translation between gymnasium spaces and the flat arrays that the agent works on.

An observation or action of any nesting becomes a dictionary of arrays of three kinds: images
(`uint8`, height, width, channels), continuous vectors (`float32`) and vectors of class indices
(`int32`). The agent emits continuous actions in [-1, 1]; here they meet the bounds of the
environment. NumPy only.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium import spaces

from dreamerv3_jax.errors import UserError
from dreamerv3_jax.images import resize

# Image sides for which the network has layers.
MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 48, 256, 16
NO_BOUND = 1e9  # bounds of actions beyond this are taken for none; MuJoCo's none is 1e10

_Convert = Callable[[Any, tuple[int, ...]], np.ndarray]
_Path = tuple[Any, ...]

_LARGEST = np.finfo(np.float32).max  # a float would become the infinity of float16


class BadRecord(ValueError):
    """What an environment returned cannot be learned from; the text goes on after 'returned'."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One flat array of an observation or of an action.

    Attributes:
      kind: 'image', 'continuous' or 'discrete'.
      shape: (H, W, C) of an image, (N,) otherwise.
      classes: the class count of each of the N components of a discrete array, else ().
    """

    kind: Literal['image', 'continuous', 'discrete']
    shape: tuple[int, ...]
    classes: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """`uint8`, `float32` or `int32`."""
        kinds = {'image': np.uint8, 'continuous': np.float32, 'discrete': np.int32}
        return np.dtype(kinds[self.kind])

    def __str__(self) -> str:
        if self.kind == 'discrete':
            runs = ((n, len(list(same))) for n, same in itertools.groupby(self.classes))
            return 'x'.join(f'{n}^{k}' if k > 1 else f'{n}' for n, k in runs) + ' choices'
        return 'x'.join(map(str, self.shape)) + (' image' if self.kind == 'image' else ' numbers')


class ObservationAdapter:
    """Flattens observations of a space.

    Attributes:
      specs: the arrays by name, sorted. Names join dictionary keys and tuple positions with '/'; an
        observation without nesting is called 'observation'.
      messages: what the user should know about the conversion, one sentence each.
    """

    def __init__(self, space: spaces.Space, image_size: tuple[int, int] | None = None) -> None:
        """Prepares the conversion.

        Args:
          space: gymnasium space of a single environment.
          image_size: height and width to resize all images to; None keeps them where possible.

        Raises:
          UserError: the space holds something that has no fixed-size array, or the network has no
            layers for `image_size`.
        """
        self.specs: dict[str, ArraySpec] = {}
        self.messages: list[str] = []
        self._leaves: list[tuple[str, _Path, spaces.Space, _Convert]] = []
        leaves = _named_leaves(space, 'observation')
        layouts = {name: _image_layout(leaf) for name, (_, leaf) in leaves.items()}
        size = _common_size([layout for layout in layouts.values() if layout], image_size)
        convert: _Convert
        for name, (path, leaf) in leaves.items():
            layout = layouts[name]
            if layout is not None:
                self.messages += layout.notices(name, size)
                spec = ArraySpec('image', (*size, layout.channels))
                convert = functools.partial(_convert_image, layout=layout, size=size)
            elif math.prod(leaf.shape or (1,)) == 0:
                self.messages.append(f'Observation {name!r} is empty and left out.')
                continue
            else:
                spec, convert = _vector_observation(name, leaf)
            self.specs[name] = spec
            self._leaves.append((name, path, leaf, convert))
        if not self.specs:
            raise UserError(
                'The environment observes nothing; put an array in its observation space.'
            )

    def convert(self, observation: Any, batch_shape: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        """Returns the flat arrays of an observation, always as copies.

        Args:
          observation: an element of the space, or of its batched form.
          batch_shape: leading dimensions that every array of the observation has.

        Raises:
          BadRecord: a part has another shape or other kinds of numbers than its space, a number is
            not finite in float32, or a class does not exist.
        """
        result = {}
        for name, path, leaf, convert in self._leaves:
            value = observation
            for key in path:
                value = value[key]
            shape = (*batch_shape, *(leaf.shape or ()))
            array = np.asarray(value)
            _check(name, array, shape, np.dtype(leaf.dtype))
            result[name] = convert(array.reshape(shape), batch_shape)
        return result


class ActionAdapter:
    """Builds environment actions from the agent's flat arrays.

    Attributes:
      specs: the arrays by name, sorted; an action without nesting is called 'action'.
      messages: what the user should know about the conversion, one sentence each.
    """

    def __init__(self, space: spaces.Space) -> None:
        """Prepares the conversion.

        Raises:
          UserError: the space holds something that is neither a box nor discrete, or nothing.
        """
        self.specs: dict[str, ArraySpec] = {}
        self.messages: list[str] = []
        for name, (_, leaf) in _named_leaves(space, 'action').items():
            self.specs[name] = _action_spec(name, leaf)
            if isinstance(leaf, spaces.Box) and not np.isfinite(_limits(leaf)).all():
                self.messages.append(
                    f'Action {name!r} has dimensions without bounds; they get values in [-1, 1], '
                    'or a range of 2 from the bound on one side.'
                )
        if not self.specs:
            raise UserError('The environment takes no actions; put an array in its action space.')
        self._assemble = _assembler(space, ())

    def convert(self, actions: Mapping[str, np.ndarray], index: int | None = None) -> Any:
        """Returns the action for one environment, or for a whole vector environment.

        Continuous values are clipped to [-1, 1] and rescaled to the bounds of the space. A
        dimension without bounds keeps [-1, 1]; one with a single bound takes the range of 2 next to
        it. Boxes of integers get the nearest integer.

        Args:
          actions: arrays [N, ...] as described by `specs`.
          index: the row to convert; None converts all rows, for an environment that is batched.
        """
        return self._assemble(actions, slice(None) if index is None else index)


class _ImageLayout(NamedTuple):
    """How a box holds an image."""

    height: int
    width: int
    channels: int
    channel_axis: int | None  # of the box; None if it has none
    scale: float  # from values of the box to 0..255
    dtype: np.dtype

    def notices(self, name: str, size: tuple[int, int]) -> list[str]:
        result = []
        if self.channel_axis == 0:
            result.append(f'Observation {name!r} is read as an image with its channels first.')
        if self.dtype != np.uint8:
            result.append(f'Observation {name!r} is converted from {self.dtype} to 8-bit pixels.')
        elif self.scale != 1:
            result.append(f'Observation {name!r} is read as an image in black and white.')
        if (self.height, self.width) != size:
            result.append(
                f'Observation {name!r} is resized from {self.height}x{self.width} to '
                f'{size[0]}x{size[1]} pixels (env.image_size chooses another size).'
            )
        return result


def _image_layout(space: spaces.Space) -> _ImageLayout | None:
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return None
    high = float(space.high.flat[0]) if space.high.size else 0.0
    even = bool(np.all(space.low == 0) and np.all(space.high == high))
    if space.dtype == np.uint8:
        # Other ranges are codes, such as those of a grid, not brightness.
        if not (np.all(space.high == 255) or (even and high == 1)):
            return None
    else:
        usual = (1, 255) if space.dtype.kind == 'f' else (255,)
        if len(space.shape) != 3 or not even or high not in usual:
            return None
    scale = 255.0 / high
    first, second, *rest = (int(side) for side in space.shape)
    axis: int | None
    if not rest:
        axis, height, width, channels = None, first, second, 1
    elif first < rest[0]:  # the shorter of the outer axes holds the channels
        axis, height, width, channels = 0, second, rest[0], first
    else:
        axis, height, width, channels = 2, first, second, rest[0]
    if min(height, width) < 16 or channels < 1:
        return None
    return _ImageLayout(height, width, channels, axis, scale, space.dtype)


def _common_size(layouts: list[_ImageLayout], requested: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the one size of all images, since the encoder concatenates their channels."""
    if requested is not None:
        for side in requested:
            if not MIN_SIDE <= side <= MAX_SIDE or side % SIDE_MULTIPLE:
                raise UserError(
                    f'env.image_size must be a multiple of {SIDE_MULTIPLE} from {MIN_SIDE} to '
                    f'{MAX_SIDE} (or 0 to keep the size), not {side}.'
                )
        return requested
    heights = [_valid_side(layout.height) for layout in layouts]
    widths = [_valid_side(layout.width) for layout in layouts]
    return max(heights, default=0), max(widths, default=0)


def _valid_side(side: int) -> int:
    return min(max(round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE, MIN_SIDE), MAX_SIDE)


def _convert_image(
    value: Any, batch_shape: tuple[int, ...], *, layout: _ImageLayout, size: tuple[int, int]
) -> np.ndarray:
    image = np.array(value)
    if layout.channel_axis is None:
        image = image[..., None]
    elif layout.channel_axis == 0:
        image = np.moveaxis(image, -3, -1)
    if image.dtype != np.uint8 or layout.scale != 1:
        image = np.rint(np.clip(image * layout.scale, 0, 255)).astype(np.uint8)
    if (layout.height, layout.width) != size:
        image = resize(image, *size)
    return np.ascontiguousarray(image)


def is_finite(value: Any) -> bool:
    """Whether all of an array, or a number, stays finite in float32."""
    return bool((np.abs(value) <= _LARGEST).all())  # false for what is no number


def _check(name: str, value: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuses what would otherwise be scrambled, rounded or cut without a word."""
    # Sides of length 1 mean nothing, and many environments are careless with them.
    if [side for side in value.shape if side != 1] != [side for side in shape if side != 1]:
        raise BadRecord(
            f'an observation {name!r} of shape {value.shape} where its space has {shape}; correct '
            'the space.'
        )
    if value.dtype.kind not in 'biuf':
        raise BadRecord(f'an observation {name!r} of {value.dtype}, which are no numbers.')
    if value.dtype.kind == 'f' and not is_finite(value):
        raise BadRecord(f'an observation {name!r} that is not finite; repair or clip it.')
    if value.dtype.kind == 'f' != dtype.kind and (value % 1).any():
        raise BadRecord(
            f'an observation {name!r} of {value.dtype} where its space has {dtype}; correct the '
            'space.'
        )


def _vector_observation(name: str, space: spaces.Space) -> tuple[ArraySpec, _Convert]:
    if isinstance(space, spaces.Box):
        size = math.prod(space.shape)

        def convert_box(value: Any, batch_shape: tuple[int, ...]) -> np.ndarray:
            return np.array(value, np.float32).reshape(*batch_shape, size)

        return ArraySpec('continuous', (size,)), convert_box
    classes, start = _classes_and_start(name, space, 'observation')

    def convert_discrete(value: Any, batch_shape: tuple[int, ...]) -> np.ndarray:
        indices = np.array(value).reshape(*batch_shape, len(classes)) - start
        if ((indices < 0) | (indices >= classes)).any():
            raise BadRecord(f'an observation {name!r} outside of its space; correct the space.')
        return indices.astype(np.int32)

    return ArraySpec('discrete', (len(classes),), classes), convert_discrete


def _action_spec(name: str, space: spaces.Space) -> ArraySpec:
    if isinstance(space, spaces.Box):
        size = math.prod(space.shape)
        if not size:
            raise UserError(f'Action {name!r} has no dimensions; remove it from the action space.')
        return ArraySpec('continuous', (size,))
    classes, _ = _classes_and_start(name, space, 'action')
    return ArraySpec('discrete', (len(classes),), classes)


def _classes_and_start(
    name: str, space: spaces.Space, role: str
) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns the class count of each component, and the value of its first class, [N] `int64`."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), np.array([space.start], np.int64)
    if isinstance(space, spaces.MultiDiscrete):
        classes = tuple(int(count) for count in space.nvec.ravel())
        return classes, np.asarray(space.start, np.int64).ravel()
    if isinstance(space, spaces.MultiBinary):
        size = math.prod(space.shape)
        return (2,) * size, np.zeros(size, np.int64)
    raise UserError(
        f'The {role} {name!r} is a {type(space).__name__} space, which has no array of fixed size; '
        'wrap the environment so that it uses Box, Discrete, MultiDiscrete, MultiBinary, Dict or '
        'Tuple.'
    )


def _limits(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds of each dimension, two of [N] `float64`, infinite where there is none."""
    low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
    # The largest number of the dtype is a way of saying 'none'.
    return np.where(low < -NO_BOUND, -np.inf, low), np.where(high > NO_BOUND, np.inf, high)


def _assembler(space: spaces.Space, path: _Path) -> Callable[[Mapping[str, np.ndarray], Any], Any]:
    """Returns the function from (flat actions, row or rows) to the nested action."""
    if isinstance(space, spaces.Dict):
        parts = {key: _assembler(part, (*path, key)) for key, part in space.spaces.items()}
        return lambda actions, rows: {key: part(actions, rows) for key, part in parts.items()}
    if isinstance(space, spaces.Tuple):
        items = [_assembler(part, (*path, key)) for key, part in enumerate(space.spaces)]
        return lambda actions, rows: tuple(item(actions, rows) for item in items)
    name = _name(path, 'action')
    convert = _box_action(space) if isinstance(space, spaces.Box) else _discrete_action(space)
    return lambda actions, rows: convert(actions[name][rows])


def _box_action(space: spaces.Box) -> Callable[[np.ndarray], np.ndarray]:
    low, high = _limits(space)
    start = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 2.0, -1.0))
    end = np.where(np.isfinite(high), high, start + 2.0)
    shape, dtype = space.shape, space.dtype

    def convert(values: np.ndarray) -> np.ndarray:
        values = np.minimum(np.maximum(values.astype(np.float64), -1.0), 1.0)
        result = (start * (1.0 - values) + end * (1.0 + values)) / 2  # -1 and 1 meet the bounds
        if dtype.kind in 'iub':
            result = np.rint(result)
        return result.astype(dtype).reshape(values.shape[:-1] + shape)

    return convert


def _discrete_action(space: spaces.Space) -> Callable[[np.ndarray], Any]:
    _, start = _classes_and_start('', space, 'action')
    dtype = np.dtype(space.dtype)
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        return lambda values: (values[..., 0] + first).astype(dtype)
    shape = space.shape or ()
    return lambda values: (values + start).astype(dtype).reshape(values.shape[:-1] + shape)


def _name(path: _Path, bare: str) -> str:
    return '/'.join(str(key) for key in path) or bare


def _named_leaves(space: spaces.Space, bare: str) -> dict[str, tuple[_Path, spaces.Space]]:
    result: dict[str, tuple[_Path, spaces.Space]] = {}
    for path, leaf in _leaves(space, ()):
        name = _name(path, bare)
        if name in result:
            raise UserError(f'Two parts of the space are both called {name!r}; rename one of them.')
        result[name] = (path, leaf)
    return dict(sorted(result.items()))


def _leaves(space: spaces.Space, path: _Path) -> Iterator[tuple[_Path, spaces.Space]]:
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for position, part in enumerate(space.spaces):
            yield from _leaves(part, (*path, position))
    else:
        yield path, space
