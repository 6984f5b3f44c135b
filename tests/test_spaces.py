import math

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from dreamerv3_jax.errors import UserError
from dreamerv3_jax.images import resize
from dreamerv3_jax.spaces import ActionAdapter, ArraySpec, BadRecord, ObservationAdapter, is_finite


def _flat_actions(adapter, rng, count):
    """Draws actions as an agent would: normals that often leave [-1, 1], and class indices."""
    actions = {}
    for name, spec in adapter.specs.items():
        if spec.kind == 'discrete':
            columns = [rng.integers(0, classes, count) for classes in spec.classes]
            actions[name] = np.stack(columns, -1).astype(np.int32)
        else:
            actions[name] = rng.normal(0, 2, (count, *spec.shape)).astype(np.float32)
    return actions


@pytest.mark.parametrize(
    ('spec', 'text'),
    [
        (ArraySpec('image', (64, 64, 3)), '64x64x3 image'),
        (ArraySpec('continuous', (7,)), '7 numbers'),
        (ArraySpec('discrete', (1,), (18,)), '18 choices'),
        (ArraySpec('discrete', (6,), (3, 5, 5, 5, 2, 5)), '3x5^3x2x5 choices'),
    ],
)
def test_description(spec, text):
    assert str(spec) == text


NESTED = spaces.Dict(
    {
        'b': spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2, 2))]),
        'a': spaces.Dict({'z': spaces.MultiBinary(2), 'c': spaces.MultiDiscrete([2, 5])}),
    }
)


@pytest.mark.parametrize(
    ('space', 'spec'),
    [
        (spaces.Box(-1, 1, (3,)), ArraySpec('continuous', (3,))),
        (spaces.Box(-1, 1, (2, 3), np.float64), ArraySpec('continuous', (6,))),
        (spaces.Box(0, 9, (), np.int64), ArraySpec('continuous', (1,))),
        (spaces.Box(0, 255, (128,), np.uint8), ArraySpec('continuous', (128,))),
        (spaces.Box(0, 255, (8, 64, 3), np.uint8), ArraySpec('continuous', (1536,))),
        (spaces.Box(-1, 1, (64, 64, 3), np.float32), ArraySpec('continuous', (12288,))),
        (spaces.Box(0, 255, (64, 96, 3), np.uint8), ArraySpec('image', (64, 96, 3))),
        (spaces.Box(0, 255, (3, 64, 96), np.uint8), ArraySpec('image', (64, 96, 3))),
        (spaces.Box(0, 255, (16, 64, 96), np.uint8), ArraySpec('image', (64, 96, 16))),
        (spaces.Box(0, 255, (64, 48), np.uint8), ArraySpec('image', (64, 48, 1))),
        (spaces.Box(0, 1, (64, 64, 3), np.float32), ArraySpec('image', (64, 64, 3))),
        (spaces.Box(0, 255, (64, 64, 3), np.float64), ArraySpec('image', (64, 64, 3))),
        (spaces.Box(0, 255, (64, 64, 3), np.int64), ArraySpec('image', (64, 64, 3))),
        (spaces.Box(0, 1, (64, 64, 3), np.int64), ArraySpec('continuous', (12288,))),
        (spaces.Discrete(5, start=2), ArraySpec('discrete', (1,), (5,))),
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), ArraySpec('discrete', (4,), (2, 3, 4, 5))),
        (spaces.MultiBinary((2, 2)), ArraySpec('discrete', (4,), (2, 2, 2, 2))),
    ],
)
def test_observation_kinds(space, spec):
    adapter = ObservationAdapter(space)
    assert adapter.specs == {'observation': spec}
    space.seed(0)
    for batch_shape in [(), (2,)]:
        value = space.sample() if not batch_shape else np.stack([space.sample()] * 2)
        array = adapter.convert(value, batch_shape)['observation']
        assert array.shape == (*batch_shape, *spec.shape)
        assert array.dtype == spec.dtype


def test_dtypes():
    kinds = [ArraySpec(kind, (1,)).dtype for kind in ('image', 'continuous', 'discrete')]
    assert kinds == [np.uint8, np.float32, np.int32]


def test_nested_observation():
    adapter = ObservationAdapter(NESTED)
    assert list(adapter.specs) == ['a/c', 'a/z', 'b/0', 'b/1']
    flat = adapter.convert(
        {
            'a': {'c': np.array([1, 4]), 'z': np.array([0, 1], np.int8)},
            'b': (2, np.array([[1.0, 2.0], [3.0, 4.0]])),
        }
    )
    expected = {'a/c': [1, 4], 'a/z': [0, 1], 'b/0': [2], 'b/1': [1, 2, 3, 4]}
    assert {name: value.tolist() for name, value in flat.items()} == expected


def test_observations_are_copies():
    value = np.zeros(3, np.float32)
    image = np.zeros((64, 64, 3), np.uint8)
    flat = ObservationAdapter(spaces.Box(-1, 1, (3,))).convert(value)['observation']
    picture = ObservationAdapter(spaces.Box(0, 255, (64, 64, 3), np.uint8)).convert(image)
    value += 1
    image += 1
    assert not flat.any()
    assert not picture['observation'].any()


def test_start_is_subtracted():
    discrete = ObservationAdapter(spaces.Discrete(5, start=-2))
    assert discrete.convert(np.int64(-2))['observation'].tolist() == [0]
    multi = ObservationAdapter(spaces.MultiDiscrete([3, 4], start=[10, 20]))
    assert multi.convert(np.array([12, 20]))['observation'].tolist() == [2, 0]


def test_channel_first_image():
    image = np.arange(3 * 64 * 48, dtype=np.uint32).reshape(3, 64, 48).astype(np.uint8)
    adapter = ObservationAdapter(spaces.Box(0, 255, (3, 64, 48), np.uint8))
    converted = adapter.convert(image)['observation']
    assert converted[5, 7].tolist() == image[:, 5, 7].tolist()
    assert 'channels first' in adapter.messages[0]
    batch = adapter.convert(np.stack([image, image]), (2,))['observation']
    np.testing.assert_array_equal(batch[1], converted)


@pytest.mark.parametrize(('high', 'value', 'pixel'), [(1, 0.5, 128), (1, 1.0, 255), (255, 7.4, 7)])
def test_float_image(high, value, pixel):
    adapter = ObservationAdapter(spaces.Box(0, high, (64, 64, 1), np.float32))
    array = adapter.convert(np.full((64, 64, 1), value, np.float32))['observation']
    assert (array == pixel).all()


def test_masks_are_black_and_white():
    adapter = ObservationAdapter(spaces.Box(0, 1, (64, 64, 1), np.uint8))
    assert adapter.convert(np.eye(64, dtype=np.uint8)[..., None])['observation'].max() == 255
    assert 'black and white' in adapter.messages[0]


@pytest.mark.parametrize('shape', [(20, 20), (16, 16, 3)])
def test_codes_of_a_grid_are_no_pixels(shape):
    specs = ObservationAdapter(spaces.Box(0, 10, shape, np.uint8)).specs
    assert specs == {'observation': ArraySpec('continuous', (math.prod(shape),))}


@pytest.mark.parametrize(
    ('shape', 'size'),
    [((210, 160, 3), (208, 160)), ((84, 84, 4), (80, 80)), ((20, 20, 3), (48, 48)),
     ((400, 600, 3), (256, 256))],
)  # fmt: skip
def test_impossible_image_sizes_are_mended(shape, size):
    adapter = ObservationAdapter(spaces.Box(0, 255, shape, np.uint8))
    assert adapter.specs['observation'].shape[:2] == size
    assert f'{size[0]}x{size[1]}' in adapter.messages[0]
    image = np.full(shape, 9, np.uint8)
    assert (adapter.convert(image)['observation'] == 9).all()


def test_images_share_the_largest_size():
    space = spaces.Dict(
        {
            'wide': spaces.Box(0, 255, (48, 96, 3), np.uint8),
            'high': spaces.Box(0, 255, (64, 64, 1), np.uint8),
        }
    )
    specs = ObservationAdapter(space).specs
    assert specs == {
        'high': ArraySpec('image', (64, 96, 1)),
        'wide': ArraySpec('image', (64, 96, 3)),
    }
    specs = ObservationAdapter(space, image_size=(80, 80)).specs
    assert {spec.shape[:2] for spec in specs.values()} == {(80, 80)}


@pytest.mark.parametrize('side', [32, 60, 272])
def test_refused_image_size(side):
    with pytest.raises(UserError, match=f'multiple of 16 .* not {side}'):
        ObservationAdapter(spaces.Box(0, 255, (64, 64, 3), np.uint8), image_size=(side, side))


@pytest.mark.parametrize(
    'space',
    [spaces.Text(4), spaces.Sequence(spaces.Discrete(2)), spaces.Graph(spaces.Discrete(2), None)],
)
@pytest.mark.parametrize('adapter', [ObservationAdapter, ActionAdapter])
def test_unsupported_spaces_are_named(space, adapter):
    with pytest.raises(UserError, match=rf"'a/words' is a {type(space).__name__} space"):
        adapter(spaces.Dict({'a': spaces.Dict({'words': space})}))


def test_empty_and_ambiguous_spaces():
    adapter = ObservationAdapter(spaces.Dict(a=spaces.Box(0, 1, (0,)), b=spaces.Discrete(2)))
    assert list(adapter.specs) == ['b']
    assert "'a' is empty" in adapter.messages[0]
    with pytest.raises(UserError, match='observes nothing'):
        ObservationAdapter(spaces.Box(0, 1, (0,)))
    with pytest.raises(UserError, match='takes no actions'):
        ActionAdapter(spaces.Dict())
    with pytest.raises(UserError, match='has no dimensions'):
        ActionAdapter(spaces.Box(0, 1, (0,)))
    twice = spaces.Dict({'a/b': spaces.Discrete(2), 'a': spaces.Dict(b=spaces.Discrete(2))})
    with pytest.raises(UserError, match="both called 'a/b'"):
        ObservationAdapter(twice)


def _row(*values):
    return np.array(values, np.uint8).reshape(1, -1, 1)


def test_resize_shrinks_with_a_triangle():
    # Scale 2: the first output is centred at 1; inputs at .5, 1.5, 2.5 have weights .75, .75, .25.
    # (3*0 + 3*70 + 1*140) / 7 = 50 and, mirrored, (1*70 + 3*140 + 3*210) / 7 = 160.
    assert resize(_row(0, 70, 140, 210), 1, 2).ravel().tolist() == [50, 160]


def test_resize_grows_linearly():
    # Centres at .25, .75, 1.25, 1.75 between inputs at .5 and 1.5.
    assert resize(_row(0, 100), 1, 4).ravel().tolist() == [0, 25, 75, 100]


def test_resize_treats_axes_alike():
    image = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    small = resize(image, 16, 20)
    assert small.shape == (2, 16, 20, 3)
    np.testing.assert_array_equal(small[1, ..., 2:], resize(image[1, ..., 2:], 16, 20))
    turned = resize(image.swapaxes(1, 2), 20, 16).swapaxes(1, 2).astype(int)
    assert np.abs(turned - small).max() <= 1  # the order of the axes only rounds differently
    np.testing.assert_array_equal(resize(image, 30, 40), image)


@given(st.integers(0, 255), st.integers(1, 70), st.integers(1, 70))
def test_resize_keeps_constants(value, old, new):
    assert (resize(np.full((old, 5, 1), value, np.uint8), new, 3) == value).all()


BOUND = st.floats(-1e6, 1e6, width=32)


@given(BOUND, BOUND, st.floats(-3, 3, width=32))
def test_continuous_actions_meet_their_bounds(first, second, value):
    low, high = np.float32(min(first, second)), np.float32(max(first, second))
    space = spaces.Box(np.array([low]), np.array([high]))
    adapter = ActionAdapter(space)

    def act(raw):
        return adapter.convert({'action': np.array([[raw]], np.float32)}, 0)

    assert space.contains(act(value))
    assert act(-1.0) == act(-7.0) == low
    assert act(1.0) == act(7.0) == high
    middle = (float(low) + float(high)) / 2
    np.testing.assert_allclose(act(0.0), middle, rtol=1e-6, atol=1e-6)
    assert act(value) <= act(value + 0.5)


def test_continuous_action_values():
    space = spaces.Box(np.array([[0.0, -2.0]]), np.array([[10.0, 2.0]]), dtype=np.float64)
    adapter = ActionAdapter(space)
    assert adapter.specs == {'action': ArraySpec('continuous', (2,))}
    actions = {'action': np.array([[9.0, 9.0], [0.5, -0.5]], np.float32)}
    assert adapter.convert(actions, 1).tolist() == [[7.5, -1.0]]
    assert adapter.messages == []


@pytest.mark.parametrize(
    ('low', 'high', 'dtype', 'ends'),
    [
        (-np.inf, np.inf, np.float32, (-1, 1)),
        (-np.finfo(np.float32).max, np.finfo(np.float32).max, np.float32, (-1, 1)),
        (-1e10, 1e10, np.float64, (-1, 1)),  # MuJoCo's
        (5, np.inf, np.float32, (5, 7)),
        (0, np.finfo(np.float32).max, np.float32, (0, 2)),
        (-np.inf, -3, np.float32, (-5, -3)),
        (0, np.iinfo(np.int64).max, np.int64, (0, 2)),
        (np.iinfo(np.int64).min, np.iinfo(np.int64).max, np.int64, (-1, 1)),
    ],
)
def test_actions_without_a_bound(low, high, dtype, ends):
    space = spaces.Box(low, high, (1,), dtype)
    adapter = ActionAdapter(space)
    assert 'without bounds' in adapter.messages[0]
    for value, expected in zip((-5.0, 5.0, 0.0), (*ends, sum(ends) / 2), strict=True):
        action = adapter.convert({'action': np.array([[value]], np.float32)}, 0)
        assert action == expected and space.contains(action)


def test_integer_box_actions_round():
    adapter = ActionAdapter(spaces.Box(0, 4, (3,), np.int32))
    action = adapter.convert({'action': np.array([[-1, 0.3, 1]], np.float32)}, 0)
    assert action.dtype == np.int32
    assert action.tolist() == [0, 3, 4]  # 2 + 2 * 0.3 = 2.6


def test_discrete_actions():
    adapter = ActionAdapter(spaces.Discrete(3, start=5))
    assert adapter.specs == {'action': ArraySpec('discrete', (1,), (3,))}
    action = adapter.convert({'action': np.array([[0], [2]], np.int32)}, 1)
    assert action == 7
    assert spaces.Discrete(3, start=5).contains(action)


@pytest.mark.parametrize(
    'space',
    [
        NESTED,
        spaces.Discrete(4),
        spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 2], [3, 4]]),
        spaces.MultiBinary((2, 3)),
        spaces.Box(-3, 5, (2, 2), np.float64),
        spaces.Dict(move=spaces.Box(0, 1, (2,)), use=spaces.Discrete(2, start=1)),
    ],
)
def test_actions_belong_to_their_space(space):
    adapter = ActionAdapter(space)
    assert list(adapter.specs) == sorted(adapter.specs)
    actions = _flat_actions(adapter, np.random.default_rng(0), 20)
    rows = [adapter.convert(actions, row) for row in range(20)]
    assert all(space.contains(row) for row in rows)
    # An observation adapter undoes the nesting, so each row and the batch must come back the same.
    undo = ObservationAdapter(space)
    batch = undo.convert(adapter.convert(actions), (20,))
    for name, spec in adapter.specs.items():
        nested = name if name in undo.specs else 'observation'
        again = np.stack([undo.convert(row)[nested] for row in rows])
        np.testing.assert_array_equal(batch[nested], again)
        if spec.kind == 'discrete':
            np.testing.assert_array_equal(again, actions[name])


# What is no element of the space.


@pytest.mark.parametrize(
    ('space', 'value', 'words'),
    [
        (spaces.Box(-1, 1, (2, 3)), np.zeros((3, 2)), r"'observation' of shape \(3, 2\) where"),
        (spaces.Box(0, 255, (64, 48, 3), np.uint8), np.zeros((3, 64, 48), np.uint8), 'shape'),
        (spaces.Box(0, 255, (64, 48, 3), np.uint8), np.full((64, 48, 3), 0.5), 'of float64'),
        (spaces.Box(0, 255, (64, 48, 3), np.uint8), np.full((64, 48, 3), np.nan), 'not finite'),
        (spaces.Box(0, 1, (64, 48, 3)), np.full((64, 48, 3), np.inf), 'not finite'),
        (spaces.Box(-1, 1, (2,)), np.array(['1', '2']), 'of <U1, which are no numbers'),
        (spaces.Box(-1, 1, (2,)), np.array([1j, 2]), 'of complex128, which are no numbers'),
        (spaces.Box(-1, 1, (2,)), [1.0, None], 'of object, which are no numbers'),
        (spaces.Box(-1, 1, (2,)), None, r'of shape \(\)'),
        (spaces.Discrete(3), 1.5, 'of float64 where its space has int64'),
        (spaces.Discrete(3), np.nan, 'not finite'),
        (spaces.MultiDiscrete([2, 3]), [1], r'of shape \(1,\) where its space has \(2,\)'),
    ],
)  # fmt: skip
def test_what_is_no_element_of_the_space_is_refused(space, value, words):
    with pytest.raises(BadRecord, match=words):
        ObservationAdapter(space).convert(value)


@pytest.mark.parametrize(
    ('space', 'value'),
    [
        (spaces.Box(-1, 1, (2,)), [[1, 2]]),
        (spaces.Box(-1, 1, (1,)), 0.5),
        (spaces.Box(-1, 1, (1, 2)), (True, 0.5)),
        (spaces.Discrete(3), np.array([2.0])),
        (spaces.Box(0, 255, (64, 48), np.uint8), np.full((64, 48, 1), 7.0)),
    ],
)
def test_sides_of_one_and_whole_floats_do_no_harm(space, value):
    (found,) = ObservationAdapter(space).convert(value).values()
    np.testing.assert_array_equal(found.ravel(), np.ravel(value))


@pytest.mark.parametrize('shape', [(64, 48, 1), (64, 48), (1, 64, 48)])
def test_a_side_of_one_may_stand_anywhere(shape):
    image = np.random.default_rng(0).integers(0, 256, (64, 48), np.uint8)
    adapter = ObservationAdapter(spaces.Box(0, 255, (1, 64, 48), np.uint8))
    (found,) = adapter.convert(image.reshape(shape)).values()
    np.testing.assert_array_equal(found, image[..., None])


@pytest.mark.parametrize('value', [[2**32, 0], [0, 3], [0, -(2**40)], [-1, 0]])
def test_classes_that_do_not_exist_are_refused(value):
    with pytest.raises(BadRecord, match='outside of its space'):
        ObservationAdapter(spaces.MultiDiscrete([2, 3])).convert(np.array(value))


def test_what_is_too_large_for_float32_is_refused():
    with pytest.raises(BadRecord, match='not finite'):
        ObservationAdapter(spaces.Box(-np.inf, np.inf, (2,), np.float64)).convert([1e300, 0])


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64, np.int32])
def test_infinity_of_any_precision_is_not_finite(dtype):
    assert is_finite(np.array([0, -3, 60_000], dtype))
    if dtype != np.int32:
        for number in (np.inf, -np.inf, np.nan):
            assert not is_finite(np.array([0, number], dtype))
