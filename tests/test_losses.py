"""Losses of arrays: by hand, where their minimum lies, and where their gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamerv3_jax import losses
from dreamerv3_jax.transforms import two_hot, two_hot_bins

BINS = np.array([-1.0, -4.0, 1.0, 4.0, 0.0], np.float32)
LN2, LN3 = np.log([2, 3])


def test_two_hot_loss_by_hand():
    # Softmax probabilities 1, 2, 3, 4, 6 of 16; 0.25 is 1/4 on bin 1 (3/16) and 3/4 on bin 0
    # (6/16): -1/4 ln 3/16 - 3/4 ln 6/16. Beyond the end: -ln 4/16.
    logits = jnp.broadcast_to(jnp.log(jnp.array([1.0, 2, 3, 4, 6])), (2, 5))
    loss = losses.two_hot_loss(logits + 3, jnp.array([0.25, 1e9]), BINS)
    expected = [-np.log(3 / 16) / 4 - 3 * np.log(6 / 16) / 4, -np.log(4 / 16)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_two_hot_loss_of_equal_logits_is_the_logarithm_of_their_number():
    bins = two_hot_bins(255)
    loss = losses.two_hot_loss(jnp.zeros((3, 255)), jnp.array([0.0, -5.0, 1e12]), bins)
    np.testing.assert_allclose(loss, np.log(255), rtol=1e-6)


def test_two_hot_loss_is_least_where_the_softmax_is_the_target():
    target = jnp.array([0.25, -2.5, 3.0])
    weights = two_hot(target, BINS)
    logits = jnp.log(weights + 1e-9)
    gradient = jax.grad(lambda x: losses.two_hot_loss(x, target, BINS).sum())
    np.testing.assert_allclose(gradient(logits), jnp.zeros((3, 5)), atol=1e-6)
    # Elsewhere it is softmax - target.
    np.testing.assert_allclose(gradient(jnp.zeros((3, 5))), 0.2 - weights, atol=1e-6)


def test_two_hot_loss_is_float32():
    loss = losses.two_hot_loss(jnp.zeros((2, 5), jnp.bfloat16), jnp.zeros(2), BINS)
    assert loss.dtype == jnp.float32
    with pytest.raises(AssertionError):
        losses.two_hot_loss(jnp.zeros((2, 5)), jnp.zeros((2, 1)), BINS)


def test_continue_loss_by_hand():
    # Target 1 - 1/4 = 3/4 while alive: -(3/4 ln p + 1/4 ln(1 - p)); p = 1/2 for logit 0, 3/4 for ln
    # 3. Target 0 at death: -ln(1 - p).
    logit = jnp.array([0.0, LN3, LN3])
    loss = losses.continue_loss(logit, jnp.array([False, False, True]), discount=0.75)
    alive = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(loss, [LN2, alive, np.log(4)], rtol=1e-5)


def test_continue_loss_is_least_at_the_discount():
    discount = 1 - 1 / 333
    gradient = jax.grad(lambda x: losses.continue_loss(x, jnp.array(False), discount=discount))
    # Probability 332/333 has the logit ln 332.
    np.testing.assert_allclose(gradient(jnp.log(332.0)), 0, atol=1e-6)
    assert gradient(jnp.log(300.0)) < 0 < gradient(jnp.log(370.0))


def test_continue_loss_of_certainty():
    # Wrong by 1000 in the logit costs 1000 nats, not infinitely many.
    loss = losses.continue_loss(
        jnp.array([1000.0, -1000.0, -1000.0]), jnp.array([True, True, False]), discount=1.0
    )
    np.testing.assert_allclose(loss, [1000, 0, 1000])


def test_continuous_loss_by_hand():
    # symlog(e - 1) = 1 and symlog(1 - e^2) = -2: (1 - 0)^2 + (-2 - 1)^2 = 10.
    target = jnp.array([[np.e - 1, 1 - np.e**2], [0.0, 0.0]])
    loss = losses.continuous_loss(jnp.array([[0.0, 1.0], [0.0, 0.0]]), target)
    np.testing.assert_allclose(loss, [10, 0], rtol=1e-6)


def test_discrete_loss_by_hand():
    # Three classes with probabilities 1/4, 1/4, 1/2 and two with 3/4, 1/4; loss of (2, 1): ln 2 +
    # ln 4.
    logits = jnp.log(jnp.array([[1.0, 1, 2, 3, 1], [1.0, 1, 1, 1, 1]]))
    loss = losses.discrete_loss(logits, jnp.array([[2, 1], [0, 0]]), (3, 2))
    np.testing.assert_allclose(loss, [3 * LN2, LN3 + LN2], rtol=1e-6)


def test_discrete_loss_of_equal_components_is_the_sum_of_theirs():
    classes = (3, 3, 2, 3)
    logits = jax.random.normal(jax.random.key(0), (5, sum(classes)))
    target = jnp.array([[2, 0, 1, 1]] * 5)
    parts = jnp.split(logits, [3, 6, 8], -1)
    each = [
        losses.discrete_loss(part, target[:, n : n + 1], classes[n : n + 1])
        for n, part in enumerate(parts)
    ]
    np.testing.assert_allclose(losses.discrete_loss(logits, target, classes), sum(each), rtol=1e-6)


def test_discrete_loss_of_certainty_is_zero():
    logits = jnp.array([[0.0, 200.0, 0.0, 0.0, 200.0]])
    assert losses.discrete_loss(logits, jnp.array([[1, 1]]), (3, 2))[0] == 0
    np.testing.assert_allclose(losses.discrete_loss(logits, jnp.array([[1, 0]]), (3, 2)), 200)
    with pytest.raises(AssertionError):
        losses.discrete_loss(logits, jnp.array([[1, 1]]), (3, 3))


def test_image_loss_by_hand():
    # Pixels 0, 51 and 255 are 0, 0.2 and 1; errors 0.5, 0.3 and -0.5: 0.25 + 0.09 + 0.25, summed.
    target = jnp.array([[[[0], [51], [255]]]], jnp.uint8)
    loss = losses.image_loss(jnp.full((1, 1, 3, 1), 0.5), target)
    np.testing.assert_allclose(loss, [0.59], rtol=1e-6)
    np.testing.assert_allclose(losses.image_loss(target / 255, target), [0], atol=1e-12)
    # Pixels and channels are summed, not averaged.
    assert (
        losses.image_loss(jnp.ones((2, 3, 8, 4, 2)), jnp.zeros((2, 3, 8, 4, 2), jnp.uint8))[1, 2]
        == 64
    )


def probabilities(*first):
    """Log-probabilities of groups of two classes with the given probability of the first."""
    return jnp.log(jnp.array([[p, 1 - p] for p in first]))[None]


def test_kl_losses_by_hand():
    # Each group: KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 4/3 = 0.1438; nine groups 1.2945. Clipping
    # every group at 1 nat would give 9 instead.
    post, prior = probabilities(*[0.5] * 9), probabilities(*[0.25] * 9)
    expected = 4.5 * np.log(4 / 3)
    dynamics, representation, kl = losses.kl_losses(post, prior, free_nats=1.0)
    np.testing.assert_allclose([dynamics, representation, kl], np.full((3, 1), expected), rtol=1e-5)


def test_free_bits_hold_for_the_sum_of_the_groups():
    # One group with much, one with nothing: 0.99 ln 99 + 0.01 ln 1/99 = 4.503, not clipped to 4.503
    # + 1.
    post, prior = probabilities(0.99, 0.5), probabilities(0.01, 0.5)
    dynamics, _, _ = losses.kl_losses(post, prior, free_nats=1.0)
    np.testing.assert_allclose(dynamics, 0.98 * np.log(99), rtol=1e-4)
    # Six groups of 0.1438 nats stay below 1 in sum.
    post, prior = probabilities(*[0.5] * 6), probabilities(*[0.25] * 6)
    dynamics, representation, kl = losses.kl_losses(post, prior, free_nats=1.0)
    assert dynamics[0] == representation[0] == 1
    np.testing.assert_allclose(kl, 3 * np.log(4 / 3), rtol=1e-5)


def test_dynamics_moves_the_prior_and_representation_the_posterior():
    post, prior = jnp.zeros((1, 4, 3)).at[:, :, 0].set(3), jnp.zeros((1, 4, 3)).at[:, :, 1].set(3)

    def loss(index, post, prior):
        log_post, log_prior = jax.nn.log_softmax(post), jax.nn.log_softmax(prior)
        return losses.kl_losses(log_post, log_prior, free_nats=1.0)[index].sum()

    moved = [
        [bool(np.any(x)) for x in jax.grad(loss, (1, 2))(index, post, prior)] for index in range(3)
    ]
    assert moved == [[False, True], [True, False], [False, False]]
    # Below the free bits nothing moves.
    for gradient in (jax.grad(loss, (1, 2))(index, 0.1 * post, 0.1 * prior) for index in range(2)):
        assert not np.any(gradient[0]) and not np.any(gradient[1])


def test_kl_of_equal_distributions_costs_the_free_bits_only():
    log_probs = probabilities(0.1, 0.7, 0.5)
    dynamics, representation, kl = losses.kl_losses(log_probs, log_probs, free_nats=1.0)
    assert (float(dynamics[0]), float(representation[0]), float(kl[0])) == (1, 1, 0)


def test_actor_loss_by_hand():
    # 0.5 * -(-2 * 3 + 0.1 * 4) = 2.8, and 1 * -(-1 * -2 + 0.1 * 5) = -2.5.
    loss = losses.actor_loss(
        jnp.array([[-2.0, -1.0]]),
        jnp.array([[4.0, 5.0]]),
        jnp.array([[3.0, -2.0]]),
        jnp.array([[0.5, 1.0]]),
        entropy_scale=0.1,
    )
    np.testing.assert_allclose(loss, [[2.8, -2.5]], rtol=1e-6)


def test_actor_loss_moves_log_probability_and_entropy_only():
    values = [jnp.full((2, 3), x) for x in (-2.0, 4.0, 3.0, 0.5)]
    gradient = jax.grad(
        lambda *xs: losses.actor_loss(*xs, entropy_scale=0.1).sum(), argnums=(0, 1, 2, 3)
    )(*values)
    # -weight * advantage = -1.5, and -weight * entropy scale = -0.05.
    np.testing.assert_allclose(gradient[0], np.full((2, 3), -1.5))
    np.testing.assert_allclose(gradient[1], np.full((2, 3), -0.05), rtol=1e-6)
    assert not np.any(gradient[2]) and not np.any(gradient[3])


def test_actor_loss_without_weight_is_nothing():
    zeros = jnp.zeros((1, 2))
    assert not np.any(losses.actor_loss(zeros - 9, zeros + 9, zeros + 9, zeros, entropy_scale=1.0))


def test_critic_loss_is_the_sum_of_two_cross_entropies():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 3, 5)), jnp.float32)
    returns, slow = jnp.asarray(rng.uniform(-5, 5, (2, 4, 3)), jnp.float32)
    first, second = (losses.two_hot_loss(logits, x, BINS) for x in (returns, slow))
    for scale in (0.0, 1.0, 0.3):
        loss = losses.critic_loss(logits, returns, slow, BINS, slow_scale=scale)
        np.testing.assert_allclose(loss, first + scale * second, rtol=1e-5)


def test_critic_loss_by_hand():
    # Probabilities 1, 2, 3, 4, 6 of 16: return 1 costs -ln 3/16, slow value 4 costs -ln 4/16.
    logits = jnp.log(jnp.array([1.0, 2, 3, 4, 6]))
    loss = losses.critic_loss(logits, jnp.array(1.0), jnp.array(4.0), BINS, slow_scale=1.0)
    np.testing.assert_allclose(loss, np.log(16 / 3) + np.log(4), rtol=1e-5)


def test_critic_loss_moves_the_critic_only():
    logits, values = jnp.zeros((2, 5)), jnp.array([0.25, -2.0])
    gradient = jax.grad(
        lambda *xs: losses.critic_loss(*xs, BINS, slow_scale=1.0).sum(), argnums=(0, 1, 2)
    )(logits, values, values)
    assert np.any(gradient[0]) and not np.any(gradient[1]) and not np.any(gradient[2])
