"""Advantages of steps and the policy term against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.base.types import Batch
from rtd_jax.losses.policy import (
    of_tokens,
    policy_sums,
    policy_token_losses,
    step_advantages,
    token_log_probs,
)

NAN = np.nan


def test_an_advantage_is_the_distance_from_the_mean_of_all_steps_of_the_prompts_chains():
    # Two chains of one prompt, with 2 and 1 steps: mean of (0.9, 0.3, 0.6) is 0.6, variance (0.09 + 0.09 + 0) / 3.
    rewards = np.array([[[0.9, 0.3], [0.6, NAN]]])
    mask = np.array([[[True, True], [True, False]]])
    std = 0.06**0.5
    np.testing.assert_allclose(step_advantages(rewards, mask), [[[0.3 / std, -0.3 / std], [0.0, 0.0]]], atol=1e-6)


def test_groups_do_not_see_one_another_and_equal_rewards_teach_nothing():
    rewards = np.array([[[0.2, 0.4]], [[0.7, 0.7]], [[5.0, 5.0]]])
    mask = np.array([[[True, True]], [[True, True]], [[False, False]]])
    np.testing.assert_allclose(step_advantages(rewards, mask), [[[-1, 1]], [[0, 0]], [[0, 0]]], atol=1e-6)


def test_differences_below_the_floor_are_not_blown_up():
    found = step_advantages(np.array([[[0.500, 0.502]]]), np.ones((1, 1, 2), bool), std_floor=0.01)
    np.testing.assert_allclose(found, [[[-0.1, 0.1]]], atol=1e-4)  # -0.001 / 0.01, not -1


def test_tokens_belong_to_the_step_that_they_lead_up_to():
    # Prompt 0-1; step 1 is tokens 2-3, step 2 tokens 4-6; 7 is an answer line. A second chain, 8-10, has one step.
    zeros = np.zeros((1, 12), np.int32)
    positions = np.array([[[1, 3, 6], [8, 10, 0]]], np.int32)
    mask = np.array([[[True, True, True], [True, True, False]]])
    batch = Batch(zeros, zeros, zeros, zeros.astype(np.float32), positions, mask)
    values = np.array([[[NAN, 2.0, -1.0], [NAN, 5.0, NAN]]])
    np.testing.assert_array_equal(of_tokens(values, batch), [[0, 0, 2, 2, -1, -1, -1, 0, 0, 5, 5, 0]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # as drawn: the gradient is -A
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # beyond 1.2 a good token is not pushed on
        (0.5, 2.0, -1.0, -1.0),  # and is pulled back without limit
        (0.5, -2.0, 1.6, 0.0),  # below 0.8 a bad token is not pushed further down
        (1.5, -2.0, 3.0, 3.0),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_loss_and_its_slope(ratio, advantage, loss, slope):
    found = policy_token_losses(jnp.log(0.2 * ratio), jnp.log(0.2), jnp.float32(advantage), 0.2)
    np.testing.assert_allclose(found, (loss, slope), rtol=1e-5, atol=1e-6)


def example(seed=0, length=7, vocab=5, padded=8):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(2, length, 3)), rng.normal(size=(3, padded))
    labels = rng.integers(0, vocab, (2, length))
    weights = (rng.random((2, length)) < 0.6).astype(np.float32)
    old = np.log(rng.uniform(0.1, 0.6, (2, length)))
    advantages = rng.normal(size=(2, length))
    return tuple(
        jnp.asarray(x, jnp.float32) if x.dtype.kind == "f" else jnp.asarray(x, jnp.int32)
        for x in (hidden, head, labels, weights, old, advantages)
    )


OPTIONS = {"temperature": 0.7, "clip": 0.2, "vocab_size": 5, "chunk_length": 3}


def dense(hidden, head, labels, weights, old, advantages):
    """The formula on whole logits."""
    log_probs = jax.nn.log_softmax((hidden @ head)[..., :5] / 0.7)
    ratio = jnp.exp(jnp.take_along_axis(log_probs, labels[..., None], -1)[..., 0] - old)
    return jnp.sum(weights * -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages))


def test_the_fused_term_and_its_gradients_are_those_of_the_dense_formula():
    arrays = example()
    fused = jax.value_and_grad(lambda *x: policy_sums(*x, **OPTIONS).loss, argnums=(0, 1))
    value, gradients = fused(*arrays)
    expected, expected_gradients = jax.value_and_grad(dense, argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
        assert np.abs(wanted).max() > 0.1
    sums = policy_sums(*arrays, **OPTIONS)
    assert sums.weight == arrays[3].sum()
    assert 0 < sums.clipped < sums.weight
    assert sums.kl > 0


def test_zero_advantage_gives_zero_gradient():
    *arrays, advantages = example()
    gradients = jax.grad(lambda *x: policy_sums(*x, jnp.zeros_like(advantages), **OPTIONS).loss, (0, 1))(*arrays)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_tokens_without_weight_have_no_part_whatever_they_hold():
    hidden, head, labels, weights, old, advantages = example()
    spoiled = weights == 0
    broken = (
        jnp.where(spoiled[..., None], NAN, hidden),
        head,
        jnp.where(spoiled, -7, labels),
        weights,
        *(jnp.where(spoiled, NAN, x) for x in (old, advantages)),
    )
    run = jax.value_and_grad(lambda *x: policy_sums(*x, **OPTIONS).loss, (0, 1))
    (value, gradients), (expected, wanted) = run(*broken), run(hidden, head, labels, weights, old, advantages)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradients[0][spoiled], 0.0)
    np.testing.assert_allclose(gradients[1], wanted[1], rtol=1e-6)


def test_log_probabilities_are_those_of_the_softmax_at_the_sampling_temperature():
    hidden, head, labels, weights, *_ = example()
    found = token_log_probs(hidden, head, labels, weights, temperature=0.7, vocab_size=5, chunk_length=3)
    log_probs = jax.nn.log_softmax((hidden @ head)[..., :5] / 0.7)
    wanted = jnp.where(weights > 0, jnp.take_along_axis(log_probs, labels[..., None], -1)[..., 0], 0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # Drawn just now, every ratio is 1: the loss is minus the mean advantage, whatever the clip.
    advantages = jnp.ones_like(weights)
    sums = policy_sums(hidden, head, labels, weights, found, advantages, **OPTIONS)
    np.testing.assert_allclose(sums.loss, -weights.sum(), rtol=1e-5)
    np.testing.assert_allclose((sums.kl, sums.clipped), 0.0, atol=1e-5)
