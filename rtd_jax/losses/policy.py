"""Learning from rewards of steps: group-normalised advantages, and the clipped policy term.

N chains are drawn for each prompt. Step i of chain n gets its own reward r_ni. Its advantage is how far that reward
lies above the mean over all steps that were drawn for the prompt:

    A_ni = (r_ni - mean) / max(std, floor),    mean and std over all steps of the prompt's N chains

Source: process supervision in GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.3). There a token's advantage is
the sum over its own and all later steps. Here it is the advantage of its own step alone, because this baseline scores
each step in isolation, without credit for later steps. The policy term is PPO's (Schulman et al. 2017,
arXiv:1707.06347, equation 7), over tokens t. rho_t is the token's probability now over that when the chain was drawn:

    L_policy = -mean_t min(rho_t A_t, clip(rho_t, 1 - c, 1 + c) A_t)
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.boundaries import step_tokens
from rtd_jax.base.means import masked_sum, safe_divide, within
from rtd_jax.base.types import Array, Batch
from rtd_jax.losses.checks import check_number, check_temperature, check_vocabulary
from rtd_jax.losses.divergences import mask_padding
from rtd_jax.losses.fused import fused_sums, map_logits


class Rollouts(NamedTuple):
    """Chains that the student drew, one a row, with two numbers for each of their tokens.

    `batch.loss_weights_BL` is 1 on the tokens of finished steps.
    """

    batch: Batch
    old_log_probs_BL: Array  # float32, when the chain was drawn
    advantages_BL: Array  # float32, of the token's step


STD_FLOOR = 0.01  # of a probability: differences below it are the reward model's noise, and are not blown up to 1


class PolicySums(NamedTuple):
    """Sums over tokens, float32 scalars; divide each by `weight`. Only `loss` has a gradient."""

    loss: Array  # -min(rho A, clip(rho) A)
    clipped: Array  # tokens at which the clip stops the gradient
    kl: Array  # rho - 1 - log rho: estimates KL(policy when drawn || policy now), never negative
    weight: Array  # sum of loss weights


def step_advantages(rewards_GNK: Array, mask_GNK: Array, std_floor: float = STD_FLOOR) -> Array:
    """Group-normalised advantage of each step, float32 [G, N, K]; 0 where masked.

    Args:
      rewards_GNK: rewards of the K steps of N chains of each of G prompts; what is masked may be anything.
      mask_GNK: bool, the steps that exist.
      std_floor: smallest divisor, above 0, in units of the reward.

    Raises:
      ValueError: the floor would let equal rewards divide by 0.
    """
    check_number("std_floor", std_floor, 1e-30)
    chex.assert_rank([rewards_GNK, mask_GNK], 3)
    chex.assert_equal_shape([rewards_GNK, mask_GNK])
    rewards_GNK = jnp.where(mask_GNK, jnp.asarray(rewards_GNK, jnp.float32), 0.0)
    count_G = jnp.sum(mask_GNK, axis=(1, 2)).astype(jnp.float32)
    mean_G = safe_divide(jnp.sum(rewards_GNK, axis=(1, 2)), count_G)
    centred_GNK = jnp.where(mask_GNK, rewards_GNK - mean_G[:, None, None], 0.0)
    std_G = jnp.sqrt(safe_divide(masked_sum(jnp.square(centred_GNK), mask_GNK, axis=(1, 2)), count_G))
    return centred_GNK / jnp.maximum(std_G, std_floor)[:, None, None]


def of_tokens(values_BCK: Array, batch: Batch) -> Array:
    """For each token the value of the step that it belongs to, float32 [B, L]; 0 outside steps.

    Step i holds the tokens behind boundary i - 1 up to boundary i; slot 0, the prompt's end, has no tokens of its own.
    """
    chex.assert_equal_shape([values_BCK, batch.boundary_positions_BCK])
    return jnp.sum(jnp.where(step_tokens(batch), values_BCK[..., 1:, None], 0.0), axis=(1, 2))


def policy_token_losses(
    log_probs: Array, old_log_probs: Array, advantages: Array, clip: Array | float
) -> tuple[Array, Array]:
    """(-min(rho A, clip(rho) A), its derivative by log_probs) of each token; rho = exp(log_probs - old_log_probs)."""
    ratio = jnp.exp(log_probs - old_log_probs)
    gain, clipped_gain = ratio * advantages, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantages
    return -jnp.minimum(gain, clipped_gain), jnp.where(gain <= clipped_gain, -gain, 0.0)


@jax.named_scope("policy")
def policy_sums(
    hidden_BLS: Array,
    head_SV: Array,
    labels_BL: Array,
    weights_BL: Array,
    old_log_probs_BL: Array,
    advantages_BL: Array,
    *,
    temperature: Array | float,
    clip: Array | float,
    vocab_size: int,
    chunk_length: int = 32,
    mesh: Mesh | None = None,
) -> PolicySums:
    """Sums of the policy term over tokens, the LM head fused in as in `kd_sums`.

    Args:
      hidden_BLS: states that the student's head reads; head_SV: the head.
      labels_BL: int32, the drawn token predicted *at* each position (already shifted, as the next three).
      weights_BL: float32; tokens of weight 0 contribute nothing, whatever they hold.
      old_log_probs_BL: log-probabilities when the chain was drawn, at the same temperature.
      advantages_BL: of the step that the predicted token belongs to.
      temperature: at which the chains were drawn: the policy is softmax(logits / temperature).
      clip: c, by which a ratio may leave 1 before its gradient stops.
      vocab_size, chunk_length, mesh: see `kd_sums`.

    Raises:
      ValueError: the head has fewer than `vocab_size` columns, or a plain argument is out of range.
    """
    check_temperature(temperature)
    check_number("clip", clip, 0.0)
    check_vocabulary(vocab_size, head_SV=head_SV)
    chex.assert_equal_shape([labels_BL, weights_BL, old_log_probs_BL, advantages_BL])
    chex.assert_equal_shape_prefix([hidden_BLS, labels_BL], 2)

    def losses(logits: Array, constants: tuple, chunk: tuple) -> tuple[Array, tuple[Array, ...], Array]:
        temperature, clip = constants
        weights, labels, *others = chunk
        is_counted = weights > 0
        old, advantages = (jnp.where(is_counted, x, 0.0) for x in others)
        log_probs = jax.nn.log_softmax(mask_padding(logits, vocab_size) / temperature)
        is_label = jnp.arange(logits.shape[-1]) == jnp.where(is_counted, labels, 0)[..., None]
        label_log_probs = jnp.sum(jnp.where(is_label, log_probs, 0.0), axis=-1)
        label_log_probs = jnp.where(is_counted, label_log_probs, 0.0)
        loss, slope = policy_token_losses(label_log_probs, old, advantages, clip)
        clipped = (slope == 0.0) & (advantages != 0.0)
        log_ratio = label_log_probs - old
        kl = within(jnp.expm1(log_ratio) - log_ratio, 0.0)
        sums = tuple(jnp.sum(jnp.where(is_counted, weights * x, 0.0)) for x in (clipped, kl, 1.0))
        d_logits = (weights * slope / temperature)[..., None] * (is_label - jnp.exp(log_probs))
        return jnp.sum(jnp.where(is_counted, weights * loss, 0.0)), sums, d_logits

    traced = (jnp.asarray(temperature, jnp.float32), jnp.asarray(clip, jnp.float32))
    arrays = (weights_BL, labels_BL, old_log_probs_BL, advantages_BL)
    loss, others = fused_sums(losses, chunk_length, mesh, hidden_BLS, head_SV, traced, arrays)
    return PolicySums(loss, *jax.lax.stop_gradient(others))


def token_log_probs(
    hidden_BLS: Array,
    head_SV: Array,
    labels_BL: Array,
    weights_BL: Array,
    *,
    temperature: Array | float,
    vocab_size: int,
    chunk_length: int = 32,
) -> Array:
    """log softmax(logits / temperature) of each label, float32 [B, L], a chunk of positions at a time; 0 at weight 0.

    Arguments and what is raised as in `policy_sums`; not differentiated.
    """
    check_temperature(temperature)

    def pick_labels(logits: Array, labels: Array, weights: Array) -> Array:
        log_probs = jax.nn.log_softmax(logits / temperature)
        at_label = jnp.take_along_axis(log_probs, jnp.where(weights > 0, labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(weights > 0, at_label, 0.0)

    options: Any = {"vocab_size": vocab_size, "chunk_length": chunk_length, "weights_BL": weights_BL}
    return map_logits(pick_labels, hidden_BLS, head_SV, (labels_BL, weights_BL), **options)
