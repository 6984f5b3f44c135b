"""The recurrent model: its equations in plain numpy, its scans as loops, and its resets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_agent import ACTION_SPECS, CONFIG, OBSERVATION_SPECS, config, networks, parameters

from dreamerv3_jax import distributions, rssm
from dreamerv3_jax.nets import layers
from dreamerv3_jax.networks import make_networks
from dreamerv3_jax.types import Latent, StoredLatent

D, S, C, G, U = CONFIG.deter, CONFIG.stoch, CONFIG.classes, CONFIG.blocks, CONFIG.hidden
A, TOKENS, STEPS = 7, 8, 5
UNIMIX = dict(unimix=CONFIG.unimix)


pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def latent(count, seed=0):
    index = np.random.default_rng(seed).integers(C, size=(count, S))
    return Latent(random(count, D, seed=seed), jax.nn.one_hot(index, C))


@functools.partial(jax.jit, static_argnums=5)
def observe(start, action, tokens, is_first, params, key=None):
    return rssm.observe(
        networks().dynamics, params['dynamics'], start, action, tokens, is_first, key, **UNIMIX
    )


@functools.cache
def inputs():
    """Four rows: none reset, reset at step 2, at step 0, at every step."""
    is_first = np.zeros((4, STEPS), bool)
    is_first[1, 2] = is_first[2, 0] = True
    is_first[3] = True
    return latent(4), random(4, STEPS, A), random(4, STEPS, TOKENS, seed=1), jnp.asarray(is_first)


def observed(*arguments):
    return observe(*arguments, parameters())


# The cell.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm_silu(x, scale):
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-4) * scale[None]
    return x * sigmoid(x)


def linear(x, layer):
    return x @ layer['kernel'] + layer['bias'][None]


def hidden(x, layer):
    return norm_silu(linear(x, layer['linear']), layer['norm']['scale'])


def block_linear(slices, layer):
    """Each of G inputs [N, in] through its own block -> [G, N, out]."""
    bias = layer['bias'].reshape(G, 1, -1)
    return np.stack([x @ layer['kernel'][g] + bias[g] for g, x in enumerate(slices)])


def plain_sequence(deter, stoch, action, params):
    projections = (('deter_in', deter), ('stoch_in', stoch), ('action_in', action))
    shared = np.concatenate([hidden(x, params[name]) for name, x in projections], -1)
    slices = np.split(deter, G, -1)
    x = block_linear([np.concatenate([x, shared], -1) for x in slices], params['recurrent'])
    x = norm_silu(np.concatenate(list(x), -1), params['recurrent_norm']['scale'])
    gates = block_linear(np.split(x, G, -1), params['gates'])
    result = []
    for gate, old in zip(gates, slices, strict=True):
        reset, candidate, update = np.split(gate, 3, -1)
        update = sigmoid(update - 1)
        result.append(update * np.tanh(sigmoid(reset) * candidate) + (1 - update) * old)
    return np.concatenate(result, -1)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_cell_is_its_plain_form(platform):
    params = parameters()['dynamics']
    dynamics = make_networks(OBSERVATION_SPECS, ACTION_SPECS, CONFIG, platform).dynamics
    deter, stoch, action, tokens = (
        np.asarray(random(3, n, seed=n), np.float64) for n in (D, S * C, A, TOKENS)
    )
    deter_after, prior, posterior = dynamics(
        params, *map(jnp.float32, (deter, stoch, action, tokens))
    )
    expected = plain_sequence(deter, stoch, action, params)
    np.testing.assert_allclose(deter_after, expected, rtol=1e-4, atol=1e-5)
    layer = hidden(expected, params['prior_hidden']['hidden_0'])
    np.testing.assert_allclose(
        prior.reshape(3, -1), linear(layer, params['prior_logits']), rtol=1e-3, atol=1e-4
    )
    layer = hidden(np.concatenate([expected, tokens], -1), params['posterior_first'])
    np.testing.assert_allclose(
        posterior.reshape(3, -1), linear(layer, params['posterior_logits']), rtol=1e-3, atol=1e-4
    )
    assert prior.shape == posterior.shape == (3, S, C)


# Scans.


def test_observe_is_a_loop_of_steps():
    start, action, tokens, is_first = inputs()
    result = observed(start, action, tokens, is_first)
    params, dynamics = parameters()['dynamics'], networks().dynamics
    now = start
    for t in range(STEPS):
        embedded = rssm.embed_previous_action(dynamics, params, action[:, t], is_first[:, t])
        now, log_posterior = rssm.observe_step(
            dynamics,
            params,
            now,
            embedded,
            dynamics(params, tokens[:, t], method='embed_tokens'),
            is_first[:, t],
            None,
            **UNIMIX,
        )
        np.testing.assert_allclose(result.latent.deter[:, t], now.deter, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.latent.stoch[:, t], now.stoch, atol=1e-6)
        np.testing.assert_allclose(result.log_posterior[:, t], log_posterior, rtol=1e-3, atol=1e-4)


def test_flags_of_first_steps_may_be_numbers():
    start, action, tokens, is_first = inputs()
    expected = observed(start, action, tokens, is_first)
    found = observed(start, action, tokens, is_first.astype(jnp.uint8))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_imagine_is_a_loop_of_steps():
    """States from the start on, each with the action that leads to the next one."""
    start, params, dynamics = latent(2, seed=5), parameters()['dynamics'], networks().dynamics
    weights = random(D, A, seed=6)

    def act(state, uniform):
        assert uniform.shape == (2, 1)
        return jnp.tanh(state.deter @ weights), state.deter[:, 0]

    latents, last, record = jax.jit(
        lambda start: rssm.imagine(dynamics, params, start, act, 1, 3, None, **UNIMIX)
    )(start)
    deter, stoch = (np.asarray(x, np.float64) for x in (start.deter, start.stoch))
    for t in range(4):
        reached = last if t == 3 else Latent(latents.deter[:, t], latents.stoch[:, t])
        np.testing.assert_allclose(reached.deter, deter, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(reached.stoch, stoch, atol=1e-6)
        if t < 3:
            np.testing.assert_allclose(record[:, t], deter[:, 0], rtol=1e-3, atol=1e-4)
        deter = plain_sequence(deter, stoch.reshape(2, -1), np.tanh(deter @ weights), params)
        logits = linear(hidden(deter, params['prior_hidden']['hidden_0']), params['prior_logits'])
        stoch = np.eye(C)[logits.reshape(2, S, C).argmax(-1)]
    assert latents.deter.shape == (2, 3, D) and latents.stoch.shape == (2, 3, S, C)


def test_open_loop_is_a_loop_of_steps():
    """States after each given action; those before a reset do not matter after it."""
    start, params, dynamics = latent(2, seed=5), parameters()['dynamics'], networks().dynamics
    action, is_first = random(2, 3, A, seed=6), np.array([[False] * 3, [False, True, False]])
    latents = jax.jit(
        lambda start: rssm.open_loop(
            dynamics, params, start, action, jnp.asarray(is_first), None, **UNIMIX
        )
    )(start)
    deter, stoch = (np.asarray(x, np.float64) for x in (start.deter, start.stoch))
    for t in range(3):
        keep = ~is_first[:, t, None]
        deter, stoch = deter * keep, stoch * keep[..., None]
        deter = plain_sequence(deter, stoch.reshape(2, -1), np.asarray(action[:, t]) * keep, params)
        logits = linear(hidden(deter, params['prior_hidden']['hidden_0']), params['prior_logits'])
        stoch = np.eye(C)[logits.reshape(2, S, C).argmax(-1)]
        np.testing.assert_allclose(latents.deter[:, t], deter, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(latents.stoch[:, t], stoch, atol=1e-6)


def test_batched_gradients_by_hand():
    # x' = a x + u from x = 1 with a = 3, u = 1, 2: 4, then 14. d(14)/da = 1 * a + 4 = 7 = 4 + 3.
    def step(a, x, u):
        return a * x + u, a * u

    def last(a, start, inputs):
        states, outputs = rssm.scan_with_batched_gradients(step, a, start, inputs)
        return states[-1, 0], outputs

    a, start, inputs = jnp.array(3.0), jnp.array([1.0]), jnp.array([[1.0], [2.0]])
    (value, outputs), gradients = jax.value_and_grad(last, (0, 1, 2), has_aux=True)(
        a, start, inputs
    )
    assert value == 14 and outputs.tolist() == [[3], [6]]
    assert [x.tolist() for x in gradients] == [7, [9], [[3], [1]]]


@pytest.mark.medium
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_batched_gradients_are_those_of_a_scan(platform, monkeypatch):
    """Of every parameter, state and input, whatever the weights of states and outputs."""
    dynamics = make_networks(OBSERVATION_SPECS, ACTION_SPECS, CONFIG, platform).dynamics

    def loss(start, action, tokens, params):
        result = rssm.observe(
            dynamics, params['dynamics'], start, action, tokens, inputs()[3], None, **UNIMIX
        )
        parts = jax.tree.leaves(result)
        return sum(jnp.sum(random(*x.shape, seed=i) * x) for i, x in enumerate(parts))

    arguments = (*inputs()[:3], parameters())
    batched = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments)
    monkeypatch.setattr(
        rssm,
        'scan_with_batched_gradients',
        lambda step, params, start, inputs: jax.lax.scan(
            lambda state, x: (lambda state, y: (state, (state, y)))(*step(params, state, x)),
            start,
            inputs,
        )[1],
    )
    plain = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), batched, plain
    )


def test_a_scan_keeps_products_and_norms_only():
    backward = jax.eval_shape(lambda: jax.vjp(lambda x: observe(*x, parameters()), inputs())[1])
    kept = [x.shape for x in jax.tree.leaves(backward) if x.shape[:1] == (STEPS,)]
    assert len(kept) <= 18, kept  # 49 where nothing is computed again


def test_recomputing_keeps_logits_only():
    def kept(function):
        backward = jax.eval_shape(lambda x: jax.vjp(function, x)[1], random(2, C))
        return [x.shape for x in jax.tree.leaves(backward) if x.shape == (2, C)]

    def probabilities(logits):
        return jnp.exp(distributions.unimix(logits, 0.01))

    assert len(kept(probabilities)) > 1
    assert len(kept(layers.recompute(probabilities))) == 1


# Resets.


def changed_before(row, step):
    """The inputs with everything that a row knew before a step changed, that step's action too."""
    start, action, tokens, is_first = inputs()
    return (
        Latent(start.deter.at[row].add(1.0), start.stoch.at[row].set(start.stoch[row, ::-1])),
        action.at[row, : step + 1].add(1.0),
        tokens.at[row, :step].add(1.0),
        is_first,
    )


@pytest.mark.parametrize(('row', 'step'), [(1, 2), (2, 0), (3, 4)])
def test_nothing_passes_a_reset(row, step):
    before, after = observed(*inputs()), observed(*changed_before(row, step))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x[row, step:], y[row, step:]), before, after
    )
    # The change was noticed before the reset, and never by other rows.
    others = np.arange(4) != row
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[others], y[others]), before, after)
    if step:
        assert np.any(before.log_posterior[row, :step] != after.log_posterior[row, :step])


def test_everything_passes_where_there_is_no_reset():
    start, action, tokens, is_first = inputs()
    result = observed(start, action, tokens, is_first)
    for changed in (
        (start._replace(deter=start.deter.at[0].add(1.0)), action, tokens),
        (start._replace(stoch=start.stoch.at[0].set(start.stoch[0, ::-1])), action, tokens),
        (start, action.at[0, 0].add(1.0), tokens),
        (start, action, tokens.at[0, 0].add(1.0)),
    ):
        other = observed(*changed, is_first)
        assert np.all(np.any(result.log_posterior[0] != other.log_posterior[0], (-2, -1))[:2])
        assert np.any(result.log_prior[0, -1] != other.log_prior[0, -1])


def test_a_reset_starts_from_zeros():
    start, action, tokens, is_first = inputs()
    result = observed(start, action, tokens, is_first)
    blank = observed(
        jax.tree.map(jnp.zeros_like, start),
        jnp.zeros_like(action).at[:, 1:].set(action[:, 3:].repeat(2, 1)),
        tokens[:, jnp.array([2, 3, 4, 4, 4])],
        jnp.zeros_like(is_first),
    )
    np.testing.assert_allclose(
        result.log_posterior[1, 2:4], blank.log_posterior[1, :2], rtol=1e-4, atol=1e-5
    )


def test_a_reset_also_stops_what_is_not_a_number():
    start, action, tokens, is_first = inputs()
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), start)
    result = observed(broken, action.at[:, 0].set(jnp.nan), tokens, is_first)
    assert np.all(np.isfinite(result.log_posterior[2:])) and np.all(
        np.isnan(result.latent.deter[0])
    )


def test_the_prior_does_not_see_the_present():
    # The prior of a step knows the actions up to it but not its observation; the posterior does.
    start, action, tokens, is_first = inputs()
    result = observed(start, action, tokens, is_first)
    other = observed(start, action, tokens.at[0, 1].add(1.0), is_first)
    np.testing.assert_array_equal(result.log_prior[0, :2], other.log_prior[0, :2])
    assert np.any(result.log_posterior[0, 1] != other.log_posterior[0, 1])
    other = observed(start, action.at[0, 1].add(1.0), tokens, is_first)
    np.testing.assert_array_equal(result.log_prior[0, 0], other.log_prior[0, 0])
    assert np.any(result.log_prior[0, 1] != other.log_prior[0, 1])


# Latents.


def test_prior_and_posterior_are_one_percent_uniform():
    # Even with enormous logits no class is less likely than 1% / C.
    params = parameters()
    for name in ('prior_logits', 'posterior_logits'):
        layer = params['dynamics'][name]
        layer = {**layer, 'kernel': 1e4 * layer['kernel']}
        params = {**params, 'dynamics': {**params['dynamics'], name: layer}}
    result = observe(*inputs(), params)
    for log_probs in (result.log_posterior, result.log_prior):
        np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(jnp.exp(log_probs).min(), 0.01 / C, rtol=1e-3)
        np.testing.assert_allclose(jnp.exp(log_probs).max(), 0.99 + 0.01 / C, rtol=1e-3)


def counted(key, shape):
    return (jnp.arange(np.prod(shape), dtype=jnp.float32) / np.prod(shape)).reshape(shape)


def test_latents_and_actions_are_imagined_by_numbers_of_their_own(monkeypatch):
    monkeypatch.setattr(jax.random, 'uniform', counted)

    def imagine_step(dynamics, params, state, action, uniform, *, unimix):
        return state._replace(deter=state.deter.at[:, :S].set(uniform))

    def act(state, uniform):
        return jnp.zeros((4, A)), uniform

    monkeypatch.setattr(rssm, 'imagine_step', imagine_step)
    arguments = networks().dynamics, parameters()['dynamics'], latent(4), act, 3, STEPS
    latents, last, of_actions = rssm.imagine(*arguments, jax.random.key(0), **UNIMIX)
    of_latents = np.concatenate([latents.deter[:, 1:], last.deter[:, None]], 1)[..., :S]
    assert of_latents.shape == (4, STEPS, S) and of_actions.shape == (4, STEPS, 3)
    both = np.concatenate([of_latents, of_actions], -1)
    assert len(np.unique(both)) == both.size
    monkeypatch.setattr(rssm, 'imagine_step', lambda *arguments, unimix: arguments[2])
    assert np.all(rssm.imagine(*arguments, None, **UNIMIX)[2] == 0.5)


def test_noise_is_another_for_every_step_and_row():
    """Seen where all classes are equally likely, as the weights of the logits are zero."""
    params, rows = parameters()['dynamics'], 4
    params = params | {
        name: jax.tree.map(jnp.zeros_like, params[name])
        for name in ('prior_logits', 'posterior_logits')
    }

    def act(state, uniform):
        return jnp.zeros((rows, A)), uniform

    key = jax.random.key(0)
    dynamics = networks().dynamics
    latents, last, numbers = rssm.imagine(
        dynamics, params, latent(rows), act, 3, STEPS, key, **UNIMIX
    )
    assert numbers.shape == (rows, STEPS, 3) and len(np.unique(numbers)) == numbers.size
    assert numbers.min() >= 0 and numbers.max() < 1
    imagined = np.concatenate([latents.stoch[:, 1:], last.stoch[:, None]], 1)
    result = rssm.observe(dynamics, params, *inputs(), key, **UNIMIX)
    for stoch in (imagined, np.asarray(result.latent.stoch)):
        drawn = stoch.argmax(-1)  # [rows, STEPS, S]
        assert drawn.shape == (rows, STEPS, S)
        for same in (*drawn, *drawn.swapaxes(0, 1)):
            assert len(np.unique(same, axis=0)) > 2


def test_imagined_latents_are_one_percent_uniform(monkeypatch):
    # With a uniform number just below 1 the last class is drawn, however unlikely it is by itself.
    monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.full(shape, 0.9999))
    params = parameters()['dynamics']
    layer = params['prior_logits']
    bias = jnp.where(jnp.arange(S * C) % C == 0, 1e6, 0.0)
    params = {**params, 'prior_logits': {'kernel': layer['kernel'], 'bias': bias}}
    act = lambda state, uniform: (jnp.zeros((2, A)), ())  # noqa: E731
    _, last, _ = rssm.imagine(
        networks().dynamics, params, latent(2), act, 1, 1, jax.random.key(0), **UNIMIX
    )
    np.testing.assert_array_equal(last.stoch.argmax(-1), C - 1)


def test_sampled_latents_pass_the_gradient_of_their_probabilities():
    log_probs = jnp.log(jnp.array([[[0.2, 0.8], [0.7, 0.3]]]))
    sample = rssm.sample_latent(log_probs, jnp.array([[0.3, 0.3]]), jnp.float32)
    assert np.isin(np.round(sample, 6), [0, 1]).all()
    np.testing.assert_allclose(sample.sum(-1), 1, rtol=1e-6)
    gradient = jax.grad(lambda x: rssm.sample_latent(x, None, jnp.float32)[..., 0].sum())
    # d exp(log p) / d log p = p of the first class.
    np.testing.assert_allclose(gradient(log_probs), [[[0.2, 0], [0.7, 0]]], rtol=1e-6)
    mode = rssm.sample_latent(log_probs, None, jnp.float32)
    np.testing.assert_allclose(mode, [[[0, 1], [1, 0]]], atol=1e-7)


def test_stored_latents_come_back():
    state = latent(6, seed=9)
    stored = rssm.store_latent(state)
    assert stored.deter.dtype == jnp.float32 and stored.stoch.dtype == jnp.uint8
    assert stored.stoch.shape == (6, S)
    restored = rssm.restore_latent(stored, CONFIG, jnp.dtype('float32'))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    # The largest size has 96 classes.
    last = StoredLatent(jnp.zeros((1, 1)), jnp.full((1, 1), 95, jnp.uint8))
    restored = rssm.restore_latent(last, config(classes=96), jnp.dtype('bfloat16'))
    assert restored.stoch.argmax() == 95 and restored.stoch.dtype == jnp.bfloat16


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_scans_carry_the_compute_dtype(dtype, platform):
    settings = config(compute_dtype=dtype)
    dynamics = make_networks(OBSERVATION_SPECS, ACTION_SPECS, settings, platform).dynamics
    start, action, tokens, is_first = jax.eval_shape(inputs)
    start = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), start)
    tokens = jax.ShapeDtypeStruct(tokens.shape, dtype)
    params, key = parameters()['dynamics'], jax.random.key(0)
    result = jax.eval_shape(
        lambda *xs: rssm.observe(dynamics, params, *xs, key, **UNIMIX),
        start, action, tokens, is_first,
    )  # fmt: skip
    assert result.latent.deter.dtype == result.latent.stoch.dtype == dtype
    assert result.log_posterior.dtype == result.log_prior.dtype == jnp.float32
    latents, last, _ = jax.eval_shape(
        lambda start: rssm.imagine(
            dynamics, params, start, lambda *_: (jnp.zeros((4, A)), ()), 1, 2, key, **UNIMIX
        ),
        start,
    )
    assert {x.dtype for x in (*latents, *last)} == {jnp.dtype(dtype)}
