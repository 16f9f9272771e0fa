"""Perplexity: exp of the mean cross-entropy per predicted token."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rtd_jax.base.types import Batch, Params
from rtd_jax.eval.estimates import Estimate, Values, ratio
from rtd_jax.eval.scoring import PackedModel, TokenScores, token_scores


class Perplexity(NamedTuple):
    """Cross-entropy kept as (sum, count), so that parts can be added."""

    nats: float  # sum over predicted tokens
    tokens: float  # how many, by weight

    @property
    def value(self) -> float:
        """exp(nats / tokens); infinite where that overflows, NaN where nothing was predicted."""
        if not self.tokens:
            return math.nan
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def perplexity_estimate(nats: Values, tokens: Values) -> Estimate:
    """Perplexity of texts of which each has so many nats over so many predicted tokens; n is the number of texts.

    stderr by the delta method, texts being independent: perplexity times that of the mean cross-entropy per token.
    """
    mean = ratio(nats, tokens)
    value = Perplexity(mean.value, 1).value
    return Estimate.with_error(value, None if mean.stderr is None else value * mean.stderr, mean.n)


def perplexity(
    model: PackedModel, params: Params, batches: Iterable[Batch], *, vocab_size: int, chunk_tokens: int = 512
) -> Perplexity:
    """Perplexity over packed batches, each token counted by its loss weight (so neither prompt nor padding counts).

    Sums are float32 within a batch and Python floats between batches.
    """
    nats = tokens = 0.0
    for batch in batches:
        scores = token_scores(
            model,
            params,
            batch.tokens_BL,
            batch.positions_BL,
            batch.chain_ids_BL,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
        )
        batch_nats, batch_tokens = jax.device_get(_sums(scores, batch.loss_weights_BL))
        nats, tokens = nats + float(batch_nats), tokens + float(batch_tokens)
    return Perplexity(nats, tokens)


@jax.jit
def _sums(scores: TokenScores, weights_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights_BL = weights_BL.astype(jnp.float32)
    # where(), not a product: a token of weight 0 may have any log-probability, -inf included.
    return -jnp.sum(jnp.where(weights_BL > 0, weights_BL * scores.log_probs, 0.0)), jnp.sum(weights_BL)
