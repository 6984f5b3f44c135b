"""Layers against plain forms of the same thing."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from dreamerv3_jax.nets import convolutions, layers
from dreamerv3_jax.nets.convolutions import Conv
from dreamerv3_jax.nets.layers import MLP, BlockLinear, Hidden, Linear, RMSNorm

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomised(module, *inputs, seed=1):
    """Parameters without zeros."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([random(*x.shape, seed=seed + i) for i, x in enumerate(leaves)])


def init(module, *inputs):
    return jax.jit(module.init)(jax.random.key(0), *inputs)['params']


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# Initial weights.


@pytest.mark.parametrize('scale', [1.0, 0.01])
@pytest.mark.parametrize('fan_in', [16, 500])
def test_truncated_normal(fan_in, scale):
    weights = layers.truncated_normal(fan_in, scale)(jax.random.key(0), (200, 200))
    deviation = scale / np.sqrt(fan_in)
    # The factor 1.1368 restores the deviation 0.8796 of a normal that is cut off at two deviations.
    np.testing.assert_allclose(np.std(weights), deviation, rtol=0.02)
    assert np.abs(weights).max() <= 2 * 1.1368 * deviation * (1 + 1e-6)
    assert np.abs(weights).max() > 1.99 * 1.1368 * deviation
    assert abs(np.mean(weights)) < 0.02 * deviation
    assert weights.dtype == jnp.float32


def test_scale_zero_starts_at_exactly_zero():
    assert not np.any(layers.truncated_normal(8, 0.0)(jax.random.key(0), (8, 8)))


def test_linear_starts_with_its_fan_in():
    params = init(Linear((300, 100), 200), random(1, 300), random(1, 100))
    np.testing.assert_allclose(np.std(params['kernel']), np.sqrt(1 / 400), rtol=0.02)
    assert not np.any(params['bias'])


def test_block_linear_starts_with_the_fan_in_of_the_whole_input():
    params = init(BlockLinear(800, 400, 8), random(8, 1, 100))
    assert params['kernel'].shape == (8, 100, 50)
    # One over the root of 800 inputs, not of the 100 that one block sees.
    np.testing.assert_allclose(np.std(params['kernel']), np.sqrt(1 / 800), rtol=0.02)
    assert not np.any(params['bias'])


def test_convolution_starts_with_its_fan_in():
    params = init(Conv(16, 64), random(1, 4, 4, 16))
    assert params['kernel'].shape == (5, 5, 16, 64)
    np.testing.assert_allclose(np.std(params['kernel']), np.sqrt(1 / 400), rtol=0.02)
    assert not np.any(params['bias'])


# Linear layers.


def test_linear_by_hand():
    params = {'kernel': jnp.array([[1.0, 2], [3, 4]]), 'bias': jnp.array([10.0, 20])}
    # (1, 1) -> (1 + 3 + 10, 2 + 4 + 20).
    result = Linear((2,), 2).apply({'params': params}, jnp.ones((1, 2)))
    np.testing.assert_array_equal(result, [[14, 26]])


def test_linear_of_parts_is_linear_of_the_concatenation():
    xs = random(2, 4, 3), random(2, 4, 5, seed=1)
    several, one = Linear((3, 5), 6), Linear((8,), 6)
    params = randomised(several, *xs)
    expected = one.apply(params, jnp.concatenate(xs, -1))
    close(several.apply(params, *xs), expected)
    parts = [several.apply(params, i, x, method='part') for i, x in enumerate(xs)]
    close(sum(parts) + params['params']['bias'][None, None], expected)
    with pytest.raises(AssertionError):
        several.apply(params, xs[0])


def dense_blocks(kernel):
    """The matrix that has the blocks [G, in, out] on its diagonal."""
    blocks, rows, columns = kernel.shape
    dense = np.zeros((blocks * rows, blocks * columns), np.float32)
    for g in range(blocks):
        dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = kernel[g]
    return dense


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize(
    ('blocks', 'inputs', 'features'), [(1, 3, 4), (2, 6, 4), (4, 8, 12), (8, 8, 8)]
)
def test_block_linear_is_a_dense_block_matrix(blocks, inputs, features, axis):
    module, x = BlockLinear(inputs, features, blocks, axis), random(5, inputs)
    params = randomised(module, layers.to_blocks(x, blocks, axis))
    result = module.apply(params, layers.to_blocks(x, blocks, axis))
    assert result.shape[axis] == blocks
    assert result.shape[2] == features // blocks
    dense = dense_blocks(np.asarray(params['params']['kernel']))
    close(layers.from_blocks(result, axis), x @ dense + params['params']['bias'][None])


@pytest.mark.parametrize('axis', [0, 1])
def test_every_block_sees_the_shared_input(axis):
    blocks, own, shared, features = 4, 3, 5, 8
    module = BlockLinear(blocks * (own + shared), features, blocks, axis)
    x, more = random(6, blocks * own), random(6, shared, seed=1)
    params = randomised(module, layers.to_blocks(x, blocks, axis), more)
    result = module.apply(params, layers.to_blocks(x, blocks, axis), more)
    # The plain form: each block's own slice and a copy of the shared input, side by side.
    slices = [x[:, g * own : (g + 1) * own] for g in range(blocks)]
    whole = jnp.concatenate([jnp.concatenate([piece, more], -1) for piece in slices], -1)
    dense = dense_blocks(np.asarray(params['params']['kernel']))
    close(layers.from_blocks(result, axis), whole @ dense + params['params']['bias'][None])


def test_blocks_by_hand():
    x = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    blocks = layers.to_blocks(x, 2)
    assert blocks.tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    assert layers.from_blocks(blocks).tolist() == x.tolist()
    rows = layers.to_blocks(x, 2, axis=1)
    assert rows.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert layers.from_blocks(rows, axis=1).tolist() == x.tolist()


def test_gradient_of_blocks_side_by_side():
    x, weight = random(3, 4, 2), random(4, 6, seed=1)
    gradient = jax.grad(lambda x: jnp.sum(weight * layers.from_blocks(x)))(x)
    assert np.array_equal(gradient, layers.to_blocks(weight, 3))


def test_product_by_hand():
    # d(x W) for the gradient (1, 2) of the result: (1, 2) W^T and x^T (1, 2).
    x, kernel = jnp.array([[3.0]]), jnp.array([[5.0, 7.0]])
    result, backward = jax.vjp(layers.product, x, kernel)
    assert result.tolist() == [[15, 21]]
    assert [x.tolist() for x in backward(jnp.array([[1.0, 2.0]]))] == [[[19]], [[3, 6]]]


@pytest.mark.parametrize(
    ('x', 'kernel'), [((5, 2), (2, 7)), ((5, 7), (7, 2)), ((3, 5, 2), (3, 2, 7))]
)
def test_gradients_of_products(x, kernel):
    x, kernel = random(*x), random(*kernel, seed=1)
    weight = random(*x.shape[:-1], kernel.shape[-1], seed=2)

    def gradients(product):
        return jax.grad(lambda *xs: jnp.sum(weight * product(*xs)), (0, 1))(x, kernel)

    jax.tree.map(close, gradients(layers.product), gradients(jnp.matmul))
    # Nothing but the transposed kernel is kept where no gradient of the kernel is needed.
    backward = jax.vjp(lambda x: layers.product(x, kernel), x)[1]
    assert [x.shape for x in jax.tree.leaves(backward)] == [kernel.mT.shape]
    close(*backward(weight), weight @ kernel.mT)


def test_a_scan_transposes_its_kernels_once():
    def last(x, kernel):
        step = lambda x, _: (jnp.tanh(layers.product(x, kernel)), None)  # noqa: E731
        return jax.lax.scan(step, x, length=3)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(last))(random(2, 4), random(4, 4, seed=1)))
    before, *scans = text.split('scan[')
    assert before.count('transpose') == 1 and len(scans) == 2
    assert not any('transpose' in inside for inside in scans)


# Normalisation.


def rms_norm(x, dtype=jnp.float32):
    return RMSNorm(x.shape[-1], dtype).apply({'params': {'scale': jnp.ones(x.shape[-1])}}, x)


def test_rms_norm_by_hand():
    # Mean square (9 + 16) / 2 = 12.5; 3 / sqrt(12.5001) and 4 / sqrt(12.5001).
    np.testing.assert_allclose(
        rms_norm(jnp.array([[3.0, 4.0]])), [[3 / 12.5001**0.5, 4 / 12.5001**0.5]], rtol=1e-6
    )


def test_epsilon_of_rms_norm():
    # The mean square 1e-4 meets the epsilon 1e-4 inside the root: 0.01 / sqrt(2e-4) = 0.7071.
    np.testing.assert_allclose(
        rms_norm(jnp.full((1, 8), 0.01)), np.full((1, 8), 0.5**0.5), rtol=1e-5
    )
    np.testing.assert_array_equal(rms_norm(jnp.zeros((1, 8))), 0)
    # Far below the epsilon, x / sqrt(1e-4).
    np.testing.assert_allclose(rms_norm(jnp.full((1, 8), 1e-6)), np.full((1, 8), 1e-4), rtol=1e-5)


def test_rms_norm_forgets_the_magnitude_but_not_the_mean():
    x = random(4, 16) + 5
    close(rms_norm(1e6 * x), rms_norm(1e3 * x))
    np.testing.assert_allclose(jnp.mean(rms_norm(x) ** 2, -1), np.ones(4), rtol=1e-4)
    assert np.all(jnp.mean(rms_norm(x), -1) > 0.9)  # nothing was subtracted


def test_rms_norm_is_computed_in_float32():
    # The square of 1e30 does not fit, that of 1e15 does; in bfloat16 sums of 4096 would be off by
    # far.
    x = (1e15 * random(2, 4096)).astype(jnp.bfloat16)
    result = rms_norm(x, jnp.bfloat16)
    assert result.dtype == jnp.bfloat16
    expected = rms_norm(x.astype(jnp.float32))
    np.testing.assert_array_equal(result, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize('axis', [0, 1])
def test_silu_of_rms_norm_over_blocks(axis):
    x, module = random(5, 12), RMSNorm(12)
    params = {'params': {'scale': random(12, seed=2)}}
    blocks = module.apply(params, layers.to_blocks(x, 4, axis), axis, method='silu_over_blocks')
    close(layers.from_blocks(blocks, axis), jax.nn.silu(module.apply(params, x)))
    close(module.apply(params, x), rms_norm(x) * params['params']['scale'][None])


@given(st.floats(1e-6, 1e6))
def test_inverse_root(x):
    # 1 / sqrt(x), whose derivative is -1/2 x^-3/2.
    value, gradient = jax.value_and_grad(layers.inverse_root)(np.float32(x))
    np.testing.assert_allclose([value, gradient], [x**-0.5, -0.5 * x**-1.5], rtol=1e-5)


def test_recomputing_keeps_inputs_and_norms():
    def kept(function):
        backward = jax.eval_shape(lambda x: jax.vjp(function, x)[1], random(2, 8))
        return sorted(x.shape for x in jax.tree.leaves(backward) if x.shape[:1] == (2,))

    def activate(x):
        return layers.normalised_silu(x, jnp.ones(8), jnp.ones(8))

    assert len(kept(activate)) > 3
    assert kept(layers.recompute(activate)) == [(2, 1), (2, 8)]


def test_hidden_layer_is_linear_norm_silu():
    x, module = random(3, 4), Hidden((4,), 6)
    params = randomised(module, x)['params']
    linear = x @ params['linear']['kernel'] + params['linear']['bias'][None]
    normalised = linear / np.sqrt(np.mean(linear**2, -1, keepdims=True) + 1e-4)
    normalised = normalised * params['norm']['scale'][None]
    expected = normalised / (1 + np.exp(-normalised))
    close(module.apply({'params': params}, x), expected)
    close(
        module.apply({'params': params}, x @ params['linear']['kernel'], method='activate'),
        expected,
    )


def plain_normalised_silu(x, bias, scale):
    y = x.astype(jnp.float32) + bias[None]
    mean_square = jnp.mean(jnp.square(y), -1, keepdims=True)
    return jax.nn.silu(y / jnp.sqrt(mean_square + 1e-4) * scale[None]).astype(x.dtype)


def test_normalised_silu_by_hand():
    # x + b = (3, 4), mean square 12.5, root with epsilon 3.5355; times (2, 1): z = 1.6970, 1.1314.
    # silu(z) = z / (1 + exp(-z)) = 1.6970 / 1.18323 = 1.4342 and 1.1314 / 1.32259 = 0.8554.
    result = layers.normalised_silu(
        jnp.array([[2.0, 6.0]]), jnp.array([1.0, -2.0]), jnp.array([2.0, 1.0])
    )
    np.testing.assert_allclose(result, [[1.4342, 0.8554]], rtol=2e-4)


@pytest.mark.parametrize('magnitude', [1e-6, 1e-2, 1.0, 1e6])
def test_gradient_of_normalised_silu(magnitude):
    """It is the derivative of the form with a root and a quotient, on both sides of the epsilon."""
    x, gradient = magnitude * random(7, 5), random(7, 5, seed=1)
    bias, scale = magnitude * random(5, seed=2), random(5, seed=3)

    def gradients(function):
        value, backward = jax.vjp(function, x, bias, scale)
        return value, *backward(gradient)

    for ours, plain in zip(
        gradients(layers.normalised_silu), gradients(plain_normalised_silu), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())


def test_normalised_silu_does_not_see_the_length_of_a_row():
    # f(c y) = f(y) far above the epsilon, so the gradient is orthogonal to y, and zeros stay zeros.
    y, scale, zero = random(6, 8), random(8, seed=1), jnp.zeros(8)
    gradient = jax.grad(lambda y: layers.normalised_silu(y, zero, scale).sum())(y)
    np.testing.assert_allclose(jnp.sum(gradient * y, -1), 0, atol=1e-3)
    assert np.abs(gradient).max() > 0.1
    assert not np.any(layers.normalised_silu(jnp.zeros((2, 8)), zero, scale))


def test_normalised_silu_is_computed_in_float32():
    x, bias, scale = random(4, 64), random(64, seed=1), random(64, seed=2)
    result, backward = jax.vjp(layers.normalised_silu, x.astype(jnp.bfloat16), bias, scale)
    plain = plain_normalised_silu(x.astype(jnp.bfloat16).astype(jnp.float32), bias, scale)
    # Half a unit in the last of 8 bits, from rounding the result alone.
    np.testing.assert_allclose(result.astype(jnp.float32), plain, rtol=2**-8)
    gradients = backward(jnp.ones_like(result))
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_mlp_stacks_hidden_layers():
    xs, module = (random(3, 4), random(3, 2, seed=1)), MLP((4, 2), 2, 6)
    params = randomised(module, *xs)['params']
    hidden = Hidden((4, 2), 6).apply({'params': params['hidden_0']}, *xs)
    expected = Hidden((6,), 6).apply({'params': params['hidden_1']}, hidden)
    close(module.apply({'params': params}, *xs), expected)
    assert sorted(params) == ['hidden_0', 'hidden_1']


# Convolutions.

SIZES = [(4, 4), (6, 6), (2, 8), (12, 4)]


def test_convolution_by_hand():
    # Ones under a kernel of ones count the pixels within two rows and columns: 9 in the corner of
    # a 6x6 image, 25 in the middle.
    params = {'kernel': jnp.ones((5, 5, 1, 1)), 'bias': jnp.array([0.5])}
    result = Conv(1, 1).apply({'params': params}, jnp.ones((1, 6, 6, 1)))[0, :, :, 0]
    assert (result[0, 0], result[2, 2], result[0, 2]) == (9.5, 25.5, 15.5)


@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_pooled_convolution(height, width):
    inputs, features = 3, 2
    module, x = Conv(inputs, features), random(2, height, width, inputs)
    params = randomised(module, x)
    convolved = module.apply(params, x)
    windows = convolved.reshape(2, height // 2, 2, width // 2, 2, features)
    close(module.apply(params, x, method='pooled'), windows.max((2, 4)))
    close(convolutions.max_pool(convolved), windows.max((2, 4)))


@pytest.mark.parametrize(('height', 'width'), [*SIZES, (3, 5), (1, 1)])
def test_upsampled_convolution(height, width):
    inputs, features = 3, 2
    module, x = Conv(inputs, features), random(2, height, width, inputs)
    params = randomised(module, x)
    expected = module.apply(params, jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
    result = module.apply(params, x, method='upsampled')
    assert result.shape == (2, 2 * height, 2 * width, features)
    close(result, expected)


def test_gradients_of_folded_convolutions():
    module, x = Conv(2, 3), random(1, 6, 4, 2)
    params = randomised(module, x)

    def gradient(function):
        return jax.grad(lambda p: jnp.sum(function(p) ** 2))(params)['params']

    for folded, plain in (
        (
            lambda p: module.apply(p, x, method='pooled'),
            lambda p: convolutions.max_pool(module.apply(p, x)),
        ),
        (
            lambda p: module.apply(p, x, method='upsampled'),
            lambda p: module.apply(p, jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)),
        ),
    ):
        actual, expected = gradient(folded), gradient(plain)
        for name in ('kernel', 'bias'):
            close(actual[name] / 100, expected[name] / 100)


def test_space_to_depth_by_hand():
    x = jnp.arange(16).reshape(1, 4, 4, 1)
    assert convolutions.space_to_depth(x)[0].tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7]],
        [[8, 9, 12, 13], [10, 11, 14, 15]],
    ]
    y = random(2, 6, 8, 3)
    np.testing.assert_array_equal(convolutions.depth_to_space(convolutions.space_to_depth(y)), y)


def test_many_channels_are_pooled_like_few(monkeypatch):
    module, x = Conv(3, 2), random(1, 4, 6, 3)
    params = {'params': randomised(module, x)['params']}
    few = module.apply(params, x, method='pooled')
    monkeypatch.setattr(convolutions, 'MANY_CHANNELS', 3)
    close(module.apply(params, x, method='pooled'), few)


@pytest.mark.parametrize('group', [1, 2, 6])  # each by itself, and all of them at once
@pytest.mark.parametrize(('side', 'height', 'width'), [(3, 4, 5), (5, 2, 3), (5, 1, 1)])
def test_gradients_from_groups_of_images(group, side, height, width):
    x, kernel, other = random(6, height, width, 2), random(side, side, 2, 3), random(6, 1, 1, 3)

    def gradients(function):
        return jax.grad(lambda *args: jnp.sum(other * function(*args) ** 2), (0, 1))(x, kernel)

    found = gradients(lambda x, kernel: convolutions.convolve_in_groups(x, kernel, group))
    for actual, expected in zip(found, gradients(convolutions.convolve), strict=True):
        close(actual, expected)


@pytest.mark.parametrize('count', [8, 12, 6])  # in two turns, three, and all of them at once
def test_pooling_in_turns(count):
    module, x = Conv(2, 3), jnp.round(2 * random(count, 4, 6, 2))
    params = randomised(module, x)
    params = jax.tree.map(lambda x: jnp.round(2 * x) / 2, params)  # so that some are equal
    other = random(count, 2, 3, 3)

    def gradients(module):
        def loss(params, x):
            return jnp.sum(other * module.apply(params, x, method='pooled') ** 2)

        return jax.value_and_grad(loss, (0, 1))(params, x)

    in_turns = Conv(2, 3, group=2, turn=4)
    program = jax.make_jaxpr(lambda: in_turns.apply(params, x, method='pooled'))()
    assert ('pool_in_turns' in str(program)) == (count != 6)
    jax.tree.map(close, gradients(in_turns), gradients(module))


def test_gradient_of_a_kernel_from_groups_by_hand():
    # Two images of one pixel, 2 and 3, and their gradients 5 and 7: the center has 2 * 5 + 3 * 7.
    x, gradient = jnp.array([2.0, 3]).reshape(2, 1, 1, 1), jnp.array([5.0, 7]).reshape(2, 1, 1, 1)
    function = functools.partial(convolutions.convolve_in_groups, x, group=1)
    (found,) = jax.vjp(lambda kernel: function(kernel), jnp.ones((3, 3, 1, 1)))[1](gradient)
    assert found[..., 0, 0].tolist() == [[0, 0, 0], [0, 31, 0], [0, 0, 0]]


def test_groups_are_left_out_where_they_do_not_divide_the_images():
    x = random(6, 4, 4, 2)
    params = randomised(Conv(2, 3), x)
    for group in (0, 4, 6):
        module = Conv(2, 3, group=group)
        program = jax.make_jaxpr(lambda params, module=module: module.apply(params, x))(params)
        assert ('custom_vjp' in str(program)) == (group == 6)


def test_gradients_of_maxima_are_shared():
    """As those of `jnp.max` over the four."""
    x = jnp.round(3 * random(4, 12, 10, 3))  # with many that are equal

    def gradient(function):
        return jax.grad(lambda x: jnp.sum(function(x) ** 3))(x)

    expected = gradient(lambda x: x.reshape(4, 6, 2, 5, 2, 3).max((2, 4)))
    np.testing.assert_allclose(gradient(convolutions.max_pool), expected)
    shared = jax.grad(lambda x: convolutions.largest(*x).sum())(jnp.full((4, 1), 7.0))
    assert shared.ravel().tolist() == [0.25] * 4


def test_max_pool_needs_pairs():
    with pytest.raises(ValueError, match='of 4x3 pixels'):
        convolutions.max_pool(jnp.ones((1, 4, 3, 1)))


def test_max_pool_by_hand():
    x = jnp.array([[1.0, 2, 5, 0], [3, 0, -1, -2]]).reshape(1, 2, 4, 1)
    assert convolutions.max_pool(x)[0, :, :, 0].tolist() == [[3, 5]]


def test_products_are_computed_in_the_dtype_and_parameters_stay_float32():
    for module, x in (
        (Linear((4,), 3, dtype=jnp.bfloat16), random(2, 4)),
        (Conv(4, 3, jnp.bfloat16), random(1, 4, 4, 4)),
        (MLP((4,), 2, 3, jnp.bfloat16), random(2, 4)),
    ):
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
        assert jax.eval_shape(module.apply, params, x).dtype == jnp.bfloat16
