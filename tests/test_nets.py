"""Encoder, decoder and heads: plain forms of the image paths, and all shapes they must take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_agent import ACTION_SPECS, CONFIG, OBSERVATION_SPECS

from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.configs import base
from dreamerv3_jax.nets import encoder as encoder_lib
from dreamerv3_jax.nets.decoder import Decoder
from dreamerv3_jax.nets.encoder import Encoder
from dreamerv3_jax.nets.heads import Actor, Head
from dreamerv3_jax.networks import make_networks
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.transforms import two_hot_bins, two_hot_mean

BLOCKS, DETER, STOCH = 4, 8, 6
FLOAT32 = jnp.dtype('float32')
SIDES = [(48, 48), (64, 64), (80, 80), (96, 96), (256, 256), (48, 256), (96, 64), (160, 224)]


pytestmark = pytest.mark.usefixtures('quick_compilation')


def image(height, width, channels=3):
    return ArraySpec('image', (height, width, channels))


def make_encoder(specs, depth=2, layers=1):
    return Encoder(specs, layers, 8, depth, FLOAT32)


def make_decoder(specs, depth=2, layers=1):
    return Decoder(specs, DETER, STOCH, BLOCKS, layers, 8, depth, FLOAT32)


def zeros(specs, *leading):
    return {name: np.zeros((*leading, *spec.shape), spec.dtype) for name, spec in specs.items()}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomised(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.3 * random(*x.shape, seed=i) for i, x in enumerate(leaves)])


def applied_shapes(module, *inputs):
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.eval_shape(module.apply, params, *inputs)


# The shapes of all observations.


@pytest.mark.parametrize(('height', 'width'), SIDES)
def test_images_of_all_sides(height, width):
    specs = {'image': image(height, width)}
    encoder = make_encoder(specs)
    tokens = applied_shapes(encoder, zeros(specs, 2, 5))
    # Four stages halve the sides; the last one has 4 * depth channels.
    assert tokens.shape == (2, 5, height // 16 * (width // 16) * 8)
    assert encoder.tokens == tokens.shape[-1]
    output = applied_shapes(make_decoder(specs), random(2, 5, DETER), random(2, 5, STOCH))
    assert output['image'].shape == (2, 5, height, width, 3)
    assert output['image'].dtype == FLOAT32


def test_several_images_of_any_channels_and_vectors():
    specs = {
        'camera': image(64, 48, 3),
        'depth': image(64, 48, 1),
        'stack': image(64, 48, 12),
        **OBSERVATION_SPECS,
    }
    encoder = make_encoder(specs)
    tokens = applied_shapes(encoder, zeros(specs, 2))
    assert tokens.shape == (2, 8 + 4 * 3 * 8) and encoder.tokens == tokens.shape[-1]
    output = applied_shapes(make_decoder(specs), random(2, DETER), random(2, STOCH))
    assert {name: x.shape for name, x in output.items()} == {
        'camera': (2, 64, 48, 3),
        'depth': (2, 64, 48, 1),
        'stack': (2, 64, 48, 12),
        'mode': (2, 5),  # logits of three and two classes
        'vector': (2, 3),
    }


def test_vectors_alone():
    encoder = make_encoder(OBSERVATION_SPECS)
    assert applied_shapes(encoder, zeros(OBSERVATION_SPECS, 2)).shape == (2, 8)
    assert encoder.tokens == 8


# Values.


def test_vectors_enter_sorted_as_symlog_and_one_hot():
    specs = {
        'z': ArraySpec('continuous', (2,)),
        'a': ArraySpec('discrete', (2,), (3, 2)),
        'm': ArraySpec('continuous', (1,)),
    }
    values = {
        'z': jnp.array([[np.e - 1, 0.0]]),
        'm': jnp.array([[1 - np.e]], jnp.float32),
        'a': jnp.array([[1, 1]]),
    }
    encoder = make_encoder(specs)
    params = randomised(encoder, values)
    hidden = params['params']['mlp']['hidden_0']
    # Sorted names: a (one-hots of three and two classes), m, z.
    expected = np.array([[0, 1, 0, 0, 1, -1, 1, 0]])
    linear = expected @ hidden['linear']['kernel'] + hidden['linear']['bias'][None]
    np.testing.assert_allclose(
        encoder.apply(params, values), silu(rms_norm(linear, hidden['norm']['scale'])), rtol=1e-4
    )


def test_one_hots_by_hand():
    result = encoder_lib.one_hots(jnp.array([[2, 0], [0, 1]]), (3, 2))
    assert result.tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]
    result = encoder_lib.one_hots(jnp.array([1, 0, 1, 2]), (2, 2, 2, 3))
    assert result.tolist() == [0, 1, 1, 0, 0, 1, 0, 0, 1]


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale):
    return (
        x
        / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-4)
        * scale.reshape(*[1] * (x.ndim - 1), -1)
    )


def convolve(x, layer):
    """A 5x5 convolution with same padding, tap by tap."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    taps = (
        padded[:, row : row + height, column : column + width] @ layer['kernel'][row, column]
        for row in range(5)
        for column in range(5)
    )
    return sum(taps) + layer['bias'].reshape(1, 1, 1, -1)


def pool(x):
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def upsample(x):
    return x.repeat(2, 1).repeat(2, 2)


def test_image_encoder_is_its_plain_form():
    specs = {'b': image(48, 64, 1), 'a': image(48, 64, 2)}
    rng = np.random.default_rng(0)
    values = {
        name: rng.integers(256, size=(2, *spec.shape)).astype(np.uint8)
        for name, spec in specs.items()
    }
    encoder = make_encoder(specs)
    params = randomised(encoder, values)
    layers = params['params']
    x = np.concatenate([values['a'], values['b']], -1) / 255 - 0.5
    for stage in range(4):
        x = pool(convolve(x, layers[f'conv_{stage}']))
        x = silu(rms_norm(x, layers[f'norm_{stage}']['scale']))
        assert x.shape == (2, 24 >> stage, 32 >> stage, 2 * (2, 3, 4, 4)[stage])
    actual = jax.jit(encoder.apply)(params, values)
    np.testing.assert_allclose(actual, x.reshape(2, -1), rtol=1e-3, atol=1e-4)


def test_image_decoder_is_its_plain_form():
    specs = {'b': image(48, 64, 1), 'a': image(48, 64, 2)}
    decoder = make_decoder(specs)
    deter, stoch = random(2, DETER), random(2, STOCH, seed=1)
    params = randomised(decoder, deter, stoch)
    layers = params['params']
    # Each of the four blocks sees two numbers of deter and gives two channels of the [3, 4, 8] map.
    block = layers['from_deter']
    bias = block['bias'].reshape(BLOCKS, 3, 4, 2)
    x = np.concatenate(
        [
            (deter[:, 2 * g : 2 * g + 2] @ block['kernel'][g]).reshape(2, 3, 4, 2) + bias[g][None]
            for g in range(BLOCKS)
        ],
        -1,
    )
    hidden = layers['from_stoch_hidden']
    y = stoch @ hidden['linear']['kernel'] + hidden['linear']['bias'][None]
    y = silu(rms_norm(y, hidden['norm']['scale']))
    assert y.shape == (2, 16)  # twice the units
    y = y @ layers['from_stoch']['kernel'] + layers['from_stoch']['bias'][None]
    x = silu(rms_norm(x + y.reshape(2, 3, 4, 8), layers['map_norm']['scale']))
    for stage, channels in enumerate((8, 6, 4)):
        x = convolve(upsample(x), layers[f'conv_{stage}'])
        assert x.shape[-1] == channels
        x = silu(rms_norm(x, layers[f'norm_{stage}']['scale']))
    x = 1 / (1 + np.exp(-convolve(upsample(x), layers['image'])))
    actual = jax.jit(decoder.apply)(params, deter, stoch)
    np.testing.assert_allclose(actual['a'], x[..., :2], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(actual['b'], x[..., 2:], rtol=1e-3, atol=1e-4)


def test_middle_grey_is_zero():
    # Half of 255 is nothing, so the encoder of it, without biases, is nothing.
    specs = {'image': image(48, 48, 1)}
    encoder = make_encoder(specs)
    shape = (1, 48, 48, 1)
    params = jax.tree.map(
        lambda x: jnp.zeros(x.shape) if x.ndim == 1 else jnp.ones(x.shape),
        jax.eval_shape(encoder.init, jax.random.key(0), {'image': jnp.zeros(shape, jnp.uint8)}),
    )
    encode = functools.partial(encoder.apply, method='_image')
    assert not np.any(jax.jit(encode)(params, jnp.full(shape, 127.5)))


def test_pictures_that_are_scaled_already_are_refused():
    encoder = make_encoder({'image': image(48, 48, 1)})
    with pytest.raises(AssertionError):
        encoder.init(jax.random.key(0), {'image': jnp.ones((1, 48, 48, 1))})


# Heads.


def test_reward_and_critic_start_at_exactly_zero():
    networks = make_networks(OBSERVATION_SPECS, ACTION_SPECS, CONFIG)
    state = (random(7, CONFIG.deter), random(7, CONFIG.stoch * CONFIG.classes))
    bins = two_hot_bins(CONFIG.bins)

    @jax.jit
    def predictions(key):
        return [
            two_hot_mean(head(head.init(key, *state), *state), bins)
            for head in (networks.reward, networks.critic)
        ]

    for prediction in predictions(jax.random.key(0)):
        assert prediction.shape == (7,) and not np.any(prediction)


def test_actor_starts_close_to_nothing():
    actor = Actor(ACTION_SPECS, (DETER, STOCH), 1, 64, 0.01, FLOAT32)
    state = (random(50, DETER), random(50, STOCH))
    params = jax.jit(actor.init)(jax.random.key(0), *state)['params']
    for name in ('logits_button', 'mean_move', 'std_move'):
        assert not np.any(params[name]['bias'])
        # 0.01 / sqrt(64 inputs), give or take what so few weights show.
        np.testing.assert_allclose(np.std(params[name]['kernel']), 0.01 / 8, rtol=0.2)
    (logits,), (mean, std) = (
        actor.apply({'params': params}, *state)[x] for x in ('button', 'move')
    )
    assert logits.shape == (50, 5) and mean.shape == std.shape == (50, 2)
    assert 0 < max(np.abs(x).max() for x in (logits, mean, std)) < 0.1


def test_head_is_float32():
    head = Head((DETER, STOCH), 1, 8, 3, 1.0, jnp.dtype('bfloat16'))
    output = applied_shapes(head, random(2, 5, DETER), random(2, 5, STOCH))
    assert output.shape == (2, 5, 3) and output.dtype == FLOAT32


# All networks.

WALKER = {
    'height': ArraySpec('continuous', (1,)),
    'orientations': ArraySpec('continuous', (14,)),
    'velocity': ArraySpec('continuous', (9,)),
}


def counts(observation_specs, action_specs, size):
    config = AgentConfig.from_mapping(base.get_config(size).agent)
    networks = make_networks(observation_specs, action_specs, config)
    params = jax.eval_shape(networks.init, jax.random.key(0), zeros(observation_specs, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {FLOAT32}
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}


def test_published_number_of_parameters():
    expected = {
        'dynamics': 364_416,
        'encoder': 10_112,
        'decoder': 51_096,
        'reward': 57_663,
        'continue_': 41_153,
        'actor': 50_316,
        'critic': 66_111,
    }
    actual = counts(WALKER, {'action': ArraySpec('continuous', (6,))}, 'size1m')
    assert actual == expected and sum(actual.values()) == 640_867


@pytest.mark.parametrize(
    ('size', 'least', 'most'),
    [
        ('size1m', 0.6, 1.4),
        ('size12m', 9, 15),
        ('size25m', 20, 30),
        ('size50m', 40, 60),
        ('size100m', 80, 120),
        ('size200m', 160, 240),
        ('size400m', 330, 470),
    ],
)
def test_published_sizes_build(size, least, most):
    specs = {'image': image(64, 64), **OBSERVATION_SPECS}
    total = sum(counts(specs, ACTION_SPECS, size).values()) / 1e6
    assert least < total < most, total
