"""Turns the probability that a step ends at each token into the tokens at which steps end."""

import functools

import chex
import jax
import jax.numpy as jnp

from rtd_jax.base.types import Array
from rtd_jax.steps.head import neighbours


@functools.partial(jax.jit, static_argnames="min_tokens")
def decode(
    probabilities_BL: Array, candidates_BL: Array, chain_ids_BL: Array, threshold: Array | float, *, min_tokens: int
) -> jax.Array:
    """The tokens of packed rows at which steps end: bool [B, L].

    The last candidate of a chain is always one. Another candidate is one if its probability reaches the threshold, no
    candidate less than `min_tokens` away has a larger one (of equals the earliest counts), and the steps on both its
    sides have `min_tokens` tokens or more: non-maximum suppression and minimum step length in one rule.
    """
    chex.assert_rank([probabilities_BL, candidates_BL, chain_ids_BL], 2)
    chex.assert_equal_shape([probabilities_BL, candidates_BL, chain_ids_BL])
    candidates_BL = jnp.asarray(candidates_BL) & (chain_ids_BL > 0)
    later_BL = _any_later(candidates_BL, chain_ids_BL)
    last_BL = candidates_BL & ~later_BL
    # The end of the chain wins against every candidate close before it.
    scores_BL = jnp.where(candidates_BL, jnp.where(last_BL, 2.0, probabilities_BL), -1.0)
    best_BL = candidates_BL & ((probabilities_BL >= threshold) | last_BL)
    first_BL = neighbours(chain_ids_BL, chain_ids_BL, -1) == 0
    for offset in range(1, min_tokens):
        before_BL = neighbours(scores_BL + 1.0, chain_ids_BL, -offset) - 1.0
        after_BL = neighbours(scores_BL + 1.0, chain_ids_BL, offset) - 1.0
        too_early_BL = neighbours(first_BL, chain_ids_BL, 1 - offset)
        best_BL &= last_BL | ((scores_BL > before_BL) & (scores_BL >= after_BL) & ~too_early_BL)
    return best_BL


def _any_later(x_BL: Array, chain_ids_BL: Array) -> jax.Array:
    """Whether x is True at a later token of the same chain, whose tokens are neighbours. bool [B, L]"""
    rows, length = x_BL.shape
    places_BL = jnp.where(x_BL, jnp.arange(length), length)
    # The next place after each token. Where there is none it is `length`, at which the ids below have a 0.
    next_BL = jnp.pad(jax.lax.cummin(places_BL, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    ids_BL = jnp.concatenate([chain_ids_BL, jnp.zeros((rows, 1), chain_ids_BL.dtype)], axis=1)
    return (jnp.take_along_axis(ids_BL, next_BL, axis=1) == chain_ids_BL) & (chain_ids_BL > 0)
