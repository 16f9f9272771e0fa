"""A teacher's predictions as a cache keeps them: the k most probable tokens, and one bucket for all the others."""

import chex
import jax
import jax.numpy as jnp

from rtd_jax.base.types import Array, TopK
from rtd_jax.losses.fused import map_logits


def top_k_predictions(
    hidden_BLD: Array,
    head_DV: Array,
    *,
    k: int,
    temperature: float,
    vocab_size: int,
    chunk_length: int = 32,
) -> TopK:
    """The predictions made at each token, in float32. Traceable.

    Args:
      hidden_BLD: states that the head reads.
      head_DV: LM head; products accumulate in float32.
      k: tokens kept.
      temperature: of the soft loss; the bucket's mass is computed at it and at temperature 1.
      vocab_size: real vocabulary entries; the rest of V is padding, never among the k tokens nor in the bucket.
      chunk_length: positions of each row whose logits exist at one time.

    Raises:
      ValueError: k is less than 1 or more than the vocabulary.
    """
    chex.assert_rank([hidden_BLD, head_DV], [3, 2])
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k is {k}; it must be at least 1 and at most the vocabulary's {vocab_size} tokens")

    def keep_top(logits: Array) -> TopK:
        logits -= jnp.max(logits, axis=-1, keepdims=True)
        values, ids = jax.lax.top_k(logits, k)
        log_probs = values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return TopK(ids, log_probs, *(_mass_beyond(logits, values, T) for T in (1.0, temperature)))

    return map_logits(keep_top, hidden_BLD, head_DV, vocab_size=vocab_size, chunk_length=chunk_length)


def _mass_beyond(logits: Array, kept: Array, temperature: float) -> Array:
    """The mass of the tokens that are not kept, as a sum over them: 1 - (kept mass) is inexact near 0."""
    last = kept[..., -1:]
    weights = jnp.exp(logits / temperature)
    # Several tokens may be as probable as the last one kept, while only some of them are kept.
    equals = jnp.sum(logits >= last, axis=-1) - kept.shape[-1]
    others = jnp.sum(jnp.where(logits < last, weights, 0.0), axis=-1) + equals * jnp.exp(last[..., 0] / temperature)
    return others / jnp.sum(weights, axis=-1)
